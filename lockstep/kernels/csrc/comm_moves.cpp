// Collectives that only move bytes, and reduce_scatter, which moves them the same way: in rounds, each of one meeting.
#include <cstring>

#include "comm_reduce.h"
#include "comm_shm.h"

namespace lockstep {

// Bytes of a slot used in one round. Ranks with a core each take small bites, which stay in the cache; ranks that take turns meet seldom.
static int64_t round_bytes(const ShmGroup& g) { return g.may_spin() ? std::min<int64_t>(int64_t(g.slot_bytes), 256 << 10) : int64_t(g.slot_bytes); }

static int64_t rounds_for(int64_t most, int64_t step) { return std::max<int64_t>(1, (most + step - 1) / step); }

// Bytes [at, at + n) of a rank's rows of `inner` bytes, to their places in rows of `stride`.
static void place(char* out, const char* from, int64_t at, int64_t n, int64_t inner, int64_t stride) {
  while (n > 0) {
    int64_t row = at / inner, column = at % inner, m = inner == stride ? n : std::min(n, inner - column);
    memcpy(out + row * stride + column, from, size_t(m));
    at += m, from += m, n -= m;
  }
}

// Every rank's [outer, inner[r]] bytes joined along the second dim, into out; a null `out` only gives. detail: of the tag.
void gather(ShmGroup& g, Call call, int64_t dtype, const char* in, char* out, int64_t outer, const int64_t* inner, uint64_t detail) {
  int64_t stride = 0, step = round_bytes(g), before = 0;
  for (int r = 0; r < g.world; r++) stride += inner[r];
  int64_t rounds = rounds_for(outer * *std::max_element(inner, inner + g.world), step);
  uint64_t tag = make_tag(call, int(dtype), uint64_t(outer * stride), detail);
  for (int64_t k = 0; k < rounds; k++) {
    int64_t at = k * step;
    auto some = [&](int r) { return std::max<int64_t>(0, std::min(step, outer * inner[r] - at)); };
    if (some(g.rank)) memcpy(g.slot(g.rank), in + at, size_t(some(g.rank)));
    g.sync(tag);
    before = 0;
    for (int r = 0; r < g.world && out; before += inner[r++])
      place(out + before, r == g.rank ? in + at : g.slot_after(r), at, some(r), inner[r], stride);
  }
}

// Of each row the id whose value is the largest over ranks; of equal ones that of the lowest rank; a NaN is larger than all. All [rows].
void largest(ShmGroup& g, const float* values, const int64_t* ids, int64_t rows, int64_t* out) {
  const int64_t fit = round_bytes(g) / int64_t(sizeof *ids + sizeof *values);
  for (int64_t at = 0; at < rows; at += fit) {
    const int64_t n = std::min(fit, rows - at);
    memcpy(g.slot(g.rank), ids + at, size_t(n) * sizeof *ids);
    memcpy(g.slot(g.rank) + n * int64_t(sizeof *ids), values + at, size_t(n) * sizeof *values);
    g.sync(make_tag(Call::Largest, 0, uint64_t(rows)));
    for (int64_t i = 0; i < n; i++) {
      float best = 0;
      for (int r = 0; r < g.world; r++) {
        const int64_t* theirs = reinterpret_cast<const int64_t*>(g.slot_after(r));
        const float v = reinterpret_cast<const float*>(theirs + n)[i];
        if (r && !(v > best) && !(v != v && best == best)) continue;
        best = v, out[at + i] = theirs[i];
      }
    }
  }
}

void broadcast(ShmGroup& g, char* x, int64_t bytes, int src, int64_t dtype) {
  std::vector<int64_t> sizes(size_t(g.world), 0);
  sizes[size_t(src)] = bytes;
  gather(g, Call::Broadcast, dtype, x, g.rank == src ? nullptr : x, 1, sizes.data(), uint64_t(src) + 1);
}

// send[r] bytes, one after another in `in`, go to rank r; recv[r] come from it. Ranks tell each other how much in the first
// round, so that all know the number of rounds.
void all_to_all(ShmGroup& g, const char* in, char* out, const int64_t* send, const int64_t* recv, int64_t dtype) {
  const int w = g.world;
  const int64_t head = (w * 8 + 63) / 64 * 64, piece = (round_bytes(g) - head) / w / 64 * 64;
  if (piece <= 0) throw std::invalid_argument("the slots are too small for " + std::to_string(w) + " ranks");
  std::vector<int64_t> from(size_t(w) + 1, 0), to(size_t(w) + 1, 0);  // where each rank's part begins
  for (int r = 0; r < w; r++) from[size_t(r) + 1] = from[size_t(r)] + send[r], to[size_t(r) + 1] = to[size_t(r)] + recv[r];
  for (int64_t k = 0, rounds = 1; k < rounds; k++) {
    auto some = [&](int64_t bytes) { return std::max<int64_t>(0, std::min(piece, bytes - k * piece)); };
    char* mine = g.slot(g.rank);
    if (k == 0) memcpy(mine, send, size_t(w) * 8);
    for (int r = 0; r < w; r++)
      if (r != g.rank && some(send[r])) memcpy(mine + head + r * piece, in + from[size_t(r)] + k * piece, size_t(some(send[r])));
    g.sync(make_tag(Call::AllToAll, int(dtype), uint64_t(k)));
    for (int r = 0; r < w && k == 0; r++) {
      const int64_t* theirs = reinterpret_cast<const int64_t*>(g.slot_after(r));
      rounds = std::max(rounds, rounds_for(*std::max_element(theirs, theirs + w), piece));
      if (theirs[g.rank] != recv[r])
        g.fail("all_to_all: rank " + g.number(r) + " sends " + std::to_string(theirs[g.rank]) + " bytes to rank " + g.number(g.rank) + ", which expects " +
               std::to_string(recv[r]));
    }
    for (int r = 0; r < w; r++)
      if (some(recv[r])) memcpy(out + to[size_t(r)] + k * piece, r == g.rank ? in + from[size_t(r)] + k * piece : g.slot_after(r) + head + g.rank * piece, size_t(some(recv[r])));
  }
}

// counts[r] elements of the sum over ranks of `in` go to rank r, in order; this rank's into `out`.
void reduce_scatter(ShmGroup& g, const void* in_, void* out_, const int64_t* counts, int64_t dtype) {
  const Tree& tree = Tree::over_ranks(g.world);
  with_type(dtype, [&](auto t) {
    using T = decltype(t);
    const int w = g.world;
    const int64_t piece = round_bytes(g) / w / int64_t(sizeof(T)) / 64 * 64;
    if (piece <= 0) throw std::invalid_argument("the slots are too small for " + std::to_string(w) + " ranks");
    const T* in = static_cast<const T*>(in_);
    std::vector<int64_t> begin(size_t(w) + 1, 0);
    for (int r = 0; r < w; r++) begin[size_t(r) + 1] = begin[size_t(r)] + counts[r];
    std::vector<const T*> leaves(static_cast<size_t>(w));
    int64_t rounds = rounds_for(*std::max_element(counts, counts + w), piece);
    uint64_t tag = make_tag(Call::ReduceScatter, int(dtype), uint64_t(begin[size_t(w)]) * sizeof(T), shares_of(counts, w));
    for (int64_t k = 0; k < rounds; k++) {
      auto some = [&](int r) { return std::max<int64_t>(0, std::min(piece, counts[r] - k * piece)); };
      for (int r = 0; r < w; r++)
        if (r != g.rank && some(r)) memcpy(reinterpret_cast<T*>(g.slot(g.rank)) + r * piece, in + begin[size_t(r)] + k * piece, size_t(some(r)) * sizeof(T));
      g.sync(tag);
      for (int r = 0; r < w; r++)
        leaves[size_t(r)] = r == g.rank ? in + begin[size_t(r)] + k * piece : reinterpret_cast<const T*>(g.slot_after(r)) + g.rank * piece;
      if (some(g.rank)) evaluate(tree, leaves.data(), static_cast<T*>(out_) + k * piece, some(g.rank));
    }
  });
}

}  // namespace lockstep
