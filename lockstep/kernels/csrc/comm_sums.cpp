// Collectives that add: all_reduce, combine, reduce_scatter.
//
// One way for every size up to a chunk (one-shot): publish all, meet once, each rank adds everything it needs.
// Beyond (two-shot, by chunks): each rank adds its part of a chunk and publishes the sum. The sums of one chunk travel with
// the summands of the next, so each chunk costs one meeting and nobody waits for the slowest twice.
// Both add the same leaves in the same tree, so the bits are the same.
#include <map>

#include "comm_reduce.h"
#include "comm_shm.h"

namespace lockstep {

Tree::Tree(const int64_t* program, int64_t n) : code(program, program + n) {
  int depth = 0;
  for (int32_t c : code) {
    if (c >= 0 ? c != leaves : depth < 2) throw std::invalid_argument("a reduction tree must push its leaves in order and add what it pushed");
    if (c >= 0) leaves++, depth++;
    else depth--;
    if (depth > TREE_DEPTH) throw std::invalid_argument("the reduction tree is deeper than " + std::to_string(TREE_DEPTH));
  }
  if (depth != 1) throw std::invalid_argument("a reduction tree must leave one value");
}

static void balance(int lo, int hi, std::vector<int64_t>& code) {
  if (hi - lo == 1) return code.push_back(lo);
  int mid = 1;
  while (mid * 2 < hi - lo) mid *= 2;
  balance(lo, lo + mid, code);
  balance(lo + mid, hi, code);
  code.push_back(-1);
}

const Tree& Tree::over_ranks(int world) {
  thread_local std::map<int, Tree> made;
  auto found = made.find(world);
  if (found == made.end()) {
    std::vector<int64_t> code;
    balance(0, world, code);
    found = made.emplace(world, Tree(code.data(), int64_t(code.size()))).first;
  }
  return found->second;
}

// Elements per meeting. Ranks with a core each take small bites, which stay in the cache; ranks that take turns meet seldom.
constexpr int64_t BITE_BYTES = 128 << 10;
constexpr int64_t ONE_SHOT_BYTES = 512 << 10;

static int64_t bite(const ShmGroup& g, int64_t room, int64_t element) {
  int64_t bytes = g.may_spin() ? std::min<int64_t>(room, BITE_BYTES) : room;
  return std::max<int64_t>(bytes / element / 64, 1) * 64;
}

namespace {

// The sum over ranks of leaves: rank r brings counts[r] arrays of n elements, one after another.
template <class T>
struct Reduction {
  ShmGroup& g;
  const Tree& tree;
  const int64_t* counts;
  uint64_t tag;
  const T* in;  // [counts[rank], n]
  T* out;       // [n], may be `in` where counts[rank] is 1
  int64_t n;
  std::vector<const T*> leaves = std::vector<const T*>(size_t(tree.leaves));
  int64_t most = *std::max_element(counts, counts + g.world);

  T* slot(int r) { return reinterpret_cast<T*>(g.slot(r)); }

  // Writes elements [at, at + m) of this rank's leaves, less [skip, skip_end) of them, which only this rank needs.
  void publish(int64_t at, int64_t m, int64_t stride, int64_t skip, int64_t skip_end) {
    for (int64_t c = 0; c < counts[g.rank]; c++) {
      const T* from = in + c * n + at;
      T* to = slot(g.rank) + c * stride;
      memcpy(to, from, size_t(skip) * sizeof(T));
      memcpy(to + skip_end, from + skip_end, size_t(m - skip_end) * sizeof(T));
    }
  }

  // Points at element `at + first` of every leaf: in the slots that the last meeting published, but in `in` for its own.
  void point(int64_t at, int64_t first, int64_t stride) {
    size_t leaf = 0;
    for (int r = 0; r < g.world; r++)
      for (int64_t c = 0; c < counts[r]; c++)
        leaves[leaf++] = r == g.rank ? in + c * n + at + first : reinterpret_cast<T*>(g.slot_after(r)) + c * stride + first;
  }

  void one_shot() {
    int64_t step = bite(g, int64_t(g.slot_bytes) / most, sizeof(T));
    for (int64_t at = 0; at == 0 || at < n; at += step) {
      int64_t m = std::min(step, n - at);
      publish(at, m, step, m, m);
      g.sync(tag);
      point(at, 0, step);
      evaluate(tree, leaves.data(), out + at, m);
    }
  }

  void two_shot() {
    int w = g.world;
    int64_t step = bite(g, int64_t(g.slot_bytes) / (most + 1), sizeof(T) * size_t(w)) * w;  // a multiple of w * 64
    int64_t sums = most * step;  // where the sums of the chunk before are kept in a slot
    auto part = [&](int64_t m, int r) { return std::min(m, (m + w * 64 - 1) / (w * 64) * 64 * r); };  // r's part of a chunk of m
    int64_t last = 0, last_at = 0;  // the chunk before: elements, and where it begins
    for (int64_t at = 0; at < n || last; at += step) {
      int64_t m = std::max<int64_t>(0, std::min(step, n - at));
      int64_t lo = part(m, g.rank), hi = part(m, g.rank + 1);
      publish(at, m, step, lo, hi);
      g.sync(tag);
      for (int r = 0; r < w; r++) {
        int64_t from = part(last, r), to = part(last, r + 1);
        if (r != g.rank) memcpy(out + last_at + from, reinterpret_cast<T*>(g.slot_after(r)) + sums, size_t(to - from) * sizeof(T));
      }
      point(at, lo, step);
      if (hi > lo) {
        evaluate(tree, leaves.data(), out + at + lo, hi - lo);
        memcpy(slot(g.rank) + sums, out + at + lo, size_t(hi - lo) * sizeof(T));
      }
      last = m, last_at = at;
    }
  }

  void run() {
    if (n * int64_t(sizeof(T)) <= ONE_SHOT_BYTES) one_shot();
    else two_shot();
  }
};

}  // namespace

void all_reduce(ShmGroup& g, void* x, int64_t n, int64_t dtype) {
  static const std::vector<int64_t> one(MAX_WORLD, 1);
  const Tree& tree = Tree::over_ranks(g.world);
  with_type(dtype, [&](auto t) {
    using T = decltype(t);
    uint64_t tag = make_tag(Call::AllReduce, int(dtype), uint64_t(n) * sizeof(T));
    Reduction<T>{g, tree, one.data(), tag, static_cast<T*>(x), static_cast<T*>(x), n}.run();
  });
}

// in [counts[rank], n] float32 -> out [n] float32: the tree over all ranks' arrays.
void combine(ShmGroup& g, const float* in, float* out, const int64_t* counts, const int64_t* code, int64_t n_code, int64_t n) {
  Tree tree(code, n_code);
  int64_t leaves = 0;
  for (int r = 0; r < g.world; r++) leaves += counts[r];
  if (leaves != tree.leaves) throw std::invalid_argument("the tree is of other partial sums than the ranks have");
  Reduction<float>{g, tree, counts, make_tag(Call::Combine, 0, uint64_t(n) * 4), in, out, n}.run();
}

}  // namespace lockstep
