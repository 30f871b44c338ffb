// The way from a row-parallel product back to the residual stream: partial sums, their combination over ranks, bias and
// scale, norms. One operation, so that partial sums are added while they are still in cache.
#include <algorithm>
#include <memory>

#include "bind.h"
#include "comm.h"
#include "gemm.h"
#include "linear.h"
#include "program.h"
#include "rowwise.h"
#include "sum_tree.h"

namespace lockstep {
namespace {

// A group of one rank: its slot is private memory and there is nobody to wait for.
struct LocalGroup : Group {
  std::unique_ptr<char[]> memory;
  explicit LocalGroup(size_t bytes) : memory(new char[bytes]) { slot_bytes = bytes; }
  char* slot(int) override { return memory.get(); }
  char* slot_after(int) override { return memory.get(); }
  void arrive(uint64_t) override {}
  void await() override {}
};

// How a finished sum goes back into the residual stream:
//   h = round(sum * scale + bias); h = norm(h) if post; residual = round(h + residual); out = norm(residual) if weight
struct Finish {
  const float* scale;  // [n], int8 weights only
  const void* bias;    // [n]
  const void* post;    // [n] weight of the norm on the way out (Gemma)
  void* residual;      // [tokens, n]
  const void* weight;  // [n] weight of the next norm; null: nobody norms (a pipeline stage ends here)
  void* out;           // [tokens, n]
  int64_t n;
  float eps;
  bool plus_one;

  // h[0, count) = `count` elements of the sum, from column j on, scaled, biased and rounded.
  template <class T>
  LS_INLINE void round_part(f32x16 sum, int64_t j, int64_t count, T* h) const {
    if (scale) sum = sum * load_n(scale + j, count);
    if (bias) sum = sum + load_n(static_cast<const T*>(bias) + j, count);
    store_n(h, sum, count);
  }
  // A whole row; sum(j, count): `count` elements of it from j on.
  template <class T, class Sum>
  LS_INLINE void round_sum(const Sum& sum, T* h) const {
    for (int64_t j = 0; j < n; j += W) {
      const int64_t count = std::min<int64_t>(W, n - j);
      round_part(sum(j, count), j, count, h + j);
    }
  }

  // h [n]: the rounded sum of row `row`. spare [n] may be h.
  template <class T>
  void stream(const T* h, T* spare, int64_t row) const {
    T* r = static_cast<T*>(residual) + row * n;
    if (post) rms_norm_row<T>(h, static_cast<const T*>(post), spare, n, eps, plus_one);
    const f32x16 squares = add_row<T>(post ? spare : h, r, n);
    if (weight) rms_norm_row<T>(squares, r, static_cast<const T*>(weight), static_cast<T*>(out) + row * n, n, eps, plus_one);
  }
};

// Rounded sums [rows, n], made while the product's are in registers. theirs: the tree's other leaf, [rows, n]; null: there is none.
template <class T>
struct RoundSink : Sink {
  const Finish& finish;
  const float* theirs;
  T* out;
  RoundSink(const Finish& finish, const float* theirs, T* out) : finish(finish), theirs(theirs), out(out) {}

  void take(int64_t p, int64_t row, int64_t rows, const float* sums, int64_t) const override {
    const int64_t column = p * PANEL, width = std::min(PANEL, finish.n - column);
    for (int64_t r = 0; r < rows; r++) {
      const int64_t at = (row + r) * finish.n + column;
      for (int64_t c = 0; c < width; c += W) {
        const int64_t count = std::min<int64_t>(W, width - c);
        f32x16 v = load(sums + r * PANEL + c);
        if (theirs) {
          v = load_n(theirs + at + c, count) + v;
          __builtin_prefetch(theirs + at + rows * finish.n + c);  // the next tile's: they are in another core's cache
        }
        finish.round_part(v, column + c, count, out + at + c);
      }
    }
  }
};

// src [tokens, k of this rank] times the packed weight, combined over the group, into the residual stream.
struct Row : Op {
  const Packed& w;
  const void* src;
  int64_t lds;
  DType type;
  Group& group;
  Tree tree;
  Finish finish;
  uint64_t tag;
  int64_t most_leaves = 1, rows_fit;

  // Up to so many bytes each rank adds up all rows; above, each its part, and they exchange the results. The bytes are of one leaf
  // of each other rank: eight ranks read that much of fewer rows than two, and a second meeting costs less than every rank's
  // reading all. With fewer rows than ranks one leaf counts, not one of each: most ranks would have no row to add up.
  static constexpr int64_t ONE_SHOT_BYTES = 128 << 10;
  // Partial sums of more rows than this leave the caches before they are added up: the bytes are of one leaf of the tree, of
  // which a rank with an uneven share has more. At least so many rows that a block of the panel is used by more than a few.
  static constexpr int64_t CHUNK_BYTES = 2 << 20, CHUNK_ROWS = 96;
  // Two ranks with one leaf each: from so many rows on each adds the other's in its product of its half. Below, weights are what a
  // product waits for, and are not to be read for each half.
  static constexpr int64_t JOIN_ROWS = 2 * CHUNK_ROWS;

  Row(const Packed& w, const void* src, int64_t lds, DType type, Group& group, Tree tree, Finish finish, uint64_t tag, const int32_t* counts)
      : w(w), src(src), lds(lds), type(type), group(group), tree(std::move(tree)), finish(finish), tag(tag) {
    for (int r = 0; r < group.world; r++) most_leaves = std::max<int64_t>(most_leaves, counts[r]);
    if (packed_n(w) != finish.n) throw std::invalid_argument("the weight's outputs are not the stream's width");
    if (w.gated) throw std::invalid_argument("a gated weight has no partial sums by column");
    if (packed_subtrees(w) != counts[group.rank] || (group.world == 1 && most_leaves != 1)) throw std::invalid_argument("the weight's partial sums are not those announced");
    const int64_t partials = most_leaves * finish.n * 4, results = group.world > 1 ? finish.n * itemsize(type) : 0;
    rows_fit = int64_t(group.slot_bytes) / (partials + results);
    if (rows_fit < 1) throw std::invalid_argument("a slot of " + std::to_string(group.slot_bytes) + " bytes does not hold one row of partial sums");
    rows_fit = std::min(rows_fit, std::max(CHUNK_BYTES / (finish.n * 4), CHUNK_ROWS));
  }

  void run(const Step& step, Lane& lane) override {
    if (group.world == 1) return dispatch(type, [&](auto t) { alone<decltype(t)>(step.tokens, lane); });
    const int64_t leaf = step.tokens * finish.n * 4, read = step.tokens < group.world ? leaf : leaf * (group.world - 1);
    if (tree.climbs(group)) return dispatch(type, [&](auto t) { climbed<decltype(t)>(step.tokens, lane); });
    if (read <= ONE_SHOT_BYTES && step.tokens <= rows_fit) return one_shot(step.tokens, lane);
    const bool join = group.world == 2 && tree.rank.size() == 2 && step.tokens >= JOIN_ROWS;
    dispatch(type, [&](auto t) { join ? joined<decltype(t)>(step.tokens, lane) : two_shot<decltype(t)>(step.tokens, lane); });
  }

  // Partial sums of rows [at, at + rows) into this rank's slot.
  void multiply(int64_t at, int64_t rows, Lane& lane) {
    const char* a = static_cast<const char*>(src) + at * lds * itemsize(type);
    gemm_partials(w, a, type, lds, rows, reinterpret_cast<float*>(group.slot(group.rank)), finish.n, rows * finish.n, lane);
  }

  // Rounded sums of rows [at, at + rows); see RoundSink.
  template <class T>
  void multiply_and_round(int64_t at, int64_t rows, const float* theirs, T* out, Lane& lane) {
    gemm(w, {static_cast<const char*>(src) + at * lds * itemsize(type), type, lds}, rows, RoundSink<T>(finish, theirs, out), lane);
  }

  // meanwhile(): what needs no other rank is done before this one waits for them.
  template <class F>
  void meet(Lane& lane, uint64_t detail, const F& meanwhile) {
    lane.barrier();
    if (lane.id == 0) group.arrive(tag << 32 | detail);
    meanwhile();
    if (lane.id == 0) group.await();
    lane.barrier();
  }
  void meet(Lane& lane, uint64_t detail) {
    meet(lane, detail, [] {});
  }

  // Every rank adds up all rows.
  void add_all(int64_t at, int64_t rows, Lane& lane) {
    dispatch(type, [&](auto t) {
      using T = decltype(t);
      std::vector<T> h(static_cast<size_t>(finish.n));
      for (int64_t i = lane.first(rows); i < lane.last(rows); i++) {
        sum_row<T>(i, rows, h.data());
        finish.stream<T>(h.data(), h.data(), at + i);
      }
    });
  }

  template <class T>
  void alone(int64_t tokens, Lane& lane) {
    T* sums = reinterpret_cast<T*>(group.slot(0));
    for (int64_t at = 0; at < tokens; at += rows_fit) {
      const int64_t rows = std::min(rows_fit, tokens - at);
      multiply_and_round<T>(at, rows, nullptr, sums, lane);
      lane.barrier();
      for (int64_t i = lane.first(rows); i < lane.last(rows); i++) finish.stream<T>(sums + i * finish.n, sums + i * finish.n, at + i);
      if (at + rows < tokens) lane.barrier();  // the next chunk writes what this one reads
    }
  }

  void one_shot(int64_t rows, Lane& lane) {
    multiply(0, rows, lane);
    meet(lane, uint64_t(rows));
    add_all(0, rows, lane);
  }

  // Row i of `rows`: the tree's sum, scaled, biased and rounded.
  template <class T>
  void sum_row(int64_t i, int64_t rows, T* h) {
    const int64_t n = finish.n;
    const float* base[64];
    const size_t leaves = tree.rank.size();
    for (size_t x = 0; x < leaves; x++)
      base[x] = reinterpret_cast<const float*>(group.slot_after(tree.rank[x])) + (tree.place[x] * rows + i) * n;
    finish.round_sum([&](int64_t j, int64_t count) { return tree.at([&](int32_t x) { return base[x] + j; }, count); }, h);
  }

  // Rows in chunks; each rank adds up its part of every chunk. A slot holds the partial sums of one chunk and, behind them,
  // this rank's results of the chunk before: the ranks meet once for both.
  template <class T>
  void two_shot(int64_t tokens, Lane& lane) {
    const int64_t chunks = (tokens + rows_fit - 1) / rows_fit;
    auto first = [&](int64_t c) { return tokens * c / chunks; };
    for (int64_t c = 0; c <= chunks; c++) {
      const int64_t at = first(c), rows = c < chunks ? first(c + 1) - at : 0;
      if (rows) multiply(at, rows, lane);
      char* mine = group.slot(group.rank);  // the epoch may end while other threads are in what follows
      meet(lane, uint64_t(rows) | (c ? 1u << 31 : 0), [&] {
        if (c) stream_results<T>(mine, group.rank, first(c - 1), at, lane);
      });
      if (rows) add_part<T>(rows, lane);
      if (c) take_results<T>(first(c - 1), at, lane);
    }
  }

  // For ranks that share cores: they meet once for a chunk. The last to come has the sums, and leaves them in the first rank's slot.
  template <class T>
  void climbed(int64_t tokens, Lane& lane) {
    const int64_t chunks = (tokens + rows_fit - 1) / rows_fit, n = finish.n;
    auto first = [&](int64_t c) { return tokens * c / chunks; };
    for (int64_t c = 0; c < chunks; c++) {
      const int64_t at = first(c), rows = first(c + 1) - at;
      multiply(at, rows, lane);
      auto leaf = [&](size_t i) { return reinterpret_cast<float*>(group.slot(tree.rank[i])) + tree.place[i] * rows * n; };
      T* sums = results<T>(group.slot(0));
      tree.climb(group, leaf, rows, n, lane, [&](const float* a, const float* b, int64_t i) {
        finish.round_sum([&](int64_t j, int64_t count) { return load_n(a + j, count) + load_n(b + j, count); }, sums + i * n);
      });
      meet(lane, uint64_t(rows));
      stream_all(results<T>(group.slot_after(0)), at, rows, lane);
    }
  }

  // As two_shot, of two ranks with one leaf each: a rank's product gives the other rank's half of a chunk as partial sums, and what
  // the other gave for its own half is added in its product of these. Halves are as long as two_shot's chunks.
  template <class T>
  void joined(int64_t tokens, Lane& lane) {
    const int64_t chunks = (tokens + 2 * rows_fit - 1) / (2 * rows_fit), other = 1 - group.rank;
    auto first = [&](int64_t c) { return tokens * c / chunks; };
    auto from = [&](int64_t c, int64_t r) { return first(c) + part(r, first(c + 1) - first(c)); };
    for (int64_t c = 0; c <= chunks; c++) {
      if (c) {
        const int64_t at = from(c - 1, group.rank), rows = from(c - 1, group.rank + 1) - at;
        const float* theirs = reinterpret_cast<const float*>(group.slot_after(int(other)));
        multiply_and_round<T>(at, rows, theirs, results<T>(group.slot(group.rank)), lane);
        lane.barrier();
      }
      if (c < chunks) multiply(from(c, other), from(c, other + 1) - from(c, other), lane);
      char* mine = group.slot(group.rank);  // as above
      meet(lane, uint64_t(c < chunks ? first(c + 1) - first(c) : 0) | (c ? 1u << 31 : 0), [&] {
        if (c) stream_results<T>(mine, group.rank, first(c - 1), first(c), lane);
      });
      if (c) take_results<T>(first(c - 1), first(c), lane);
    }
  }

  // Rows that rank r adds up, of `rows`: [part(r, rows), part(r + 1, rows)).
  int64_t part(int64_t r, int64_t rows) const { return rows * r / group.world; }
  template <class T>
  T* results(char* slot) const {
    return reinterpret_cast<T*>(slot + most_leaves * rows_fit * finish.n * 4);
  }

  template <class T>
  void add_part(int64_t rows, Lane& lane) {
    const int64_t begin = part(group.rank, rows), mine = part(group.rank + 1, rows) - begin;
    T* to = results<T>(group.slot(group.rank));
    for (int64_t i = lane.first(mine); i < lane.last(mine); i++) sum_row<T>(begin + i, rows, to + i * finish.n);
  }

  // The other ranks' results of rows [at, end).
  template <class T>
  void take_results(int64_t at, int64_t end, Lane& lane) {
    for (int64_t r = 0; r < group.world; r++)
      if (r != group.rank) stream_results<T>(group.slot_after(int(r)), r, at, end, lane);
  }
  template <class T>
  void stream_results(char* slot, int64_t r, int64_t at, int64_t end, Lane& lane) {
    const int64_t from = part(r, end - at), count = part(r + 1, end - at) - from;
    stream_all(results<T>(slot), at + from, count, lane);
  }
  // Rounded sums of rows [at, at + rows) that others may read too.
  template <class T>
  void stream_all(const T* sums, int64_t at, int64_t rows, Lane& lane) {
    std::vector<T> spare(static_cast<size_t>(finish.n));
    for (int64_t i = lane.first(rows); i < lane.last(rows); i++) finish.stream<T>(sums + i * finish.n, spare.data(), at + i);
  }
};

// For groups without shared memory: partial sums [subtrees, tokens, n] of this rank, for Python to combine ...
struct Partials : Op {
  const Packed& w;
  const void* src;
  int64_t lds;
  DType type;
  float* out;
  Partials(const Packed& w, const void* src, int64_t lds, DType type, float* out) : w(w), src(src), lds(lds), type(type), out(out) {}
  void run(const Step& step, Lane& lane) override {
    gemm_partials(w, src, type, lds, step.tokens, out, packed_n(w), step.tokens * packed_n(w), lane);
  }
};

// ... and what happens to the sum [tokens, n] that Python got.
struct Finished : Op {
  const float* sum;
  DType type;
  Finish finish;
  Finished(const float* sum, DType type, Finish finish) : sum(sum), type(type), finish(finish) {}
  void run(const Step& step, Lane& lane) override {
    dispatch(type, [&](auto t) {
      using T = decltype(t);
      const int64_t n = finish.n;
      std::vector<T> h(static_cast<size_t>(n));
      for (int64_t i = lane.first(step.tokens); i < lane.last(step.tokens); i++) {
        finish.round_sum([&](int64_t j, int64_t count) { return load_n(sum + i * n + j, count); }, h.data());
        finish.stream<T>(h.data(), h.data(), i);
      }
    });
  }
};

Group* local_group_new(int64_t bytes) { return new LocalGroup(size_t(bytes)); }
void local_group_free(Group* g) { delete g; }

Finish* finish_new(const float* scale, const void* bias, const void* post, void* residual, const void* weight, void* out, int64_t n, double eps, bool plus_one) {
  return new Finish{scale, bias, post, residual, weight, out, n, float(eps), plus_one};
}
void finish_free(Finish* f) { delete f; }

Op* op_row(Packed* w, const void* src, int64_t lds, int64_t dtype, Group* group, const int32_t* code, int64_t n_code, const int32_t* counts, Finish* finish, int64_t tag) {
  return new Row(*w, src, lds, DType(dtype), *group, Tree(code, n_code, counts, group->world), *finish, uint64_t(tag), counts);
}
Op* op_partials(Packed* w, const void* src, int64_t lds, int64_t dtype, float* out) { return new Partials(*w, src, lds, DType(dtype), out); }
Op* op_finish(const float* sum, int64_t dtype, Finish* finish) { return new Finished(sum, DType(dtype), *finish); }

}  // namespace

extern const std::vector<PyMethodDef> row_methods;
const std::vector<PyMethodDef> row_methods = {
    BIND(local_group_new), BIND(local_group_free), BIND(finish_new), BIND(finish_free),
    BIND(op_row),          BIND(op_partials),      BIND(op_finish),
};

}  // namespace lockstep
