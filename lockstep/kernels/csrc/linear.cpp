// Packed products: which panel, block and tile is computed when, and what happens to finished sums.
//
//   for rows in blocks of at most ROW_BLOCK        (their activations stay in the second-level cache)
//     for panels of this thread
//       for blocks of k                            (the weights' block stays in the first-level cache)
//         for tiles of up to 6 rows                (sums stay in registers)
//       finished sums -> epilogue
#include "linear.h"

#include <algorithm>

#include "activate.h"
#include "bind.h"
#include "gemm.h"
#include "program.h"

namespace lockstep {
namespace {

constexpr int64_t ROW_BLOCK = 40 * ROWS;

// This thread's scratch memory, kept between calls.
struct Scratch {
  std::vector<Tile> tiles, stack;
  std::vector<char> rows, block;
};
Scratch& scratch() {
  static thread_local Scratch s;
  return s;
}

// Activations in the form that the kernel reads: bf16 in place (or filled up at the ends of atoms), others as float32.
struct Rows {
  const char* data;
  int64_t ld;  // elements
};

template <class T>
Rows plain_rows(const Packed& w, const T* a, int64_t lda, int64_t m) {
  using Out = std::conditional_t<std::is_same_v<T, bf16>, bf16, float>;
  if constexpr (std::is_same_v<T, Out>)
    if (w.direct) return {reinterpret_cast<const char*>(a), lda};
  auto& buffer = scratch().rows;
  const size_t need = size_t(m * w.k_packed) * sizeof(Out);
  if (buffer.size() < need) buffer.resize(need);
  Out* out = reinterpret_cast<Out*>(buffer.data());
  for (int64_t i = 0; i < m; i++)
    for (size_t s = 0; s + 1 < w.bounds.size(); s++) {
      const T* from = a + i * lda + w.bounds[s];
      Out* to = out + i * w.k_packed + w.starts[s];
      const int64_t len = w.bounds[s + 1] - w.bounds[s];
      const int64_t end = s + 1 < w.starts.size() ? w.starts[s + 1] : w.k_packed;
      if constexpr (std::is_same_v<T, Out>) memcpy(to, from, size_t(len) * sizeof(T));
      else for (int64_t k = 0; k < len; k += W) store_n(to + k, load_n(from + k, std::min<int64_t>(W, len - k)), std::min<int64_t>(W, len - k));
      for (int64_t k = len; k < end - w.starts[s]; k++) to[k] = Out{};
    }
  return {buffer.data(), w.k_packed};
}

// Adds finished atoms to those on the stack as the tree wants, and hands out finished partial sums.
template <class Epilogue>
void finish_atom(const KStep& step, Tile* tile, Tile* stack, int rows, int64_t row, int64_t panel, const Epilogue& done) {
  for (int i = 0; i < step.merges; i++) {
    const Tile& left = stack[step.depth - 1 - i];
    for (int m = 0; m < rows; m++)
      for (int c = 0; c < PANEL; c += W) store(&tile->sum[m][c], load(&left.sum[m][c]) + load(&tile->sum[m][c]));
  }
  if (step.emit >= 0) return done(*tile, rows, row, panel, step.emit);
  memcpy(&stack[step.depth - step.merges], tile, sizeof(float) * size_t(PANEL) * size_t(rows));
}

// Rows [0, m) times the panels of this thread; A is the type that the kernel reads, B that of the weights.
template <class A, class B, class Epilogue>
void panels(const Packed& w, Rows a, int64_t m, int64_t first_row, Lane& lane, const Epilogue& done) {
  Scratch& s = scratch();
  const int64_t tiles = (m + ROWS - 1) / ROWS, levels = w.depth;
  if (int64_t(s.tiles.size()) < tiles) s.tiles.resize(size_t(tiles));
  if (int64_t(s.stack.size()) < tiles * levels) s.stack.resize(size_t(tiles * levels));
  const int64_t begin = lane.first(w.panels), end = lane.last(w.panels);
  const char* limit = w.panel(end);
  for (int64_t p = begin; p < end; p++) {
    for (const KStep& step : w.steps) {
      const B* block = reinterpret_cast<const B*>(w.panel(p)) + step.at * PANEL;
      // The memory after this block is the next block, or the next panel: it is fetched while this one is computed.
      const char* next = reinterpret_cast<const char*>(block + step.len * PANEL);
      const int64_t per_k = sizeof(A) == 2 ? 2 : 1, steps = step.len / per_k * tiles;
      int64_t ahead = std::min<int64_t>(K_BLOCK * PANEL * int64_t(sizeof(B)), limit - next);
      int64_t each = steps > 0 ? (ahead / steps + 63) / 64 * 64 : 0;
      for (int64_t t = 0; t < tiles; t++) {
        const int64_t row = m * t / tiles;
        const int rows = int(m * (t + 1) / tiles - row);
        const char* from = next + t * (step.len / per_k) * each;
        accumulate_rows(rows, reinterpret_cast<const A*>(a.data) + row * a.ld + step.at, a.ld, block, step.len, step.first, s.tiles[size_t(t)], from,
                        from + step.len / per_k * each <= limit ? each : 0);
        if (step.last) finish_atom(step, &s.tiles[size_t(t)], s.stack.data() + t * levels, rows, first_row + row, p, done);
      }
    }
  }
}

template <class A, class Epilogue>
void with_weights(const Packed& w, Rows a, int64_t m, int64_t first_row, Lane& lane, const Epilogue& done) {
  if constexpr (std::is_same_v<A, bf16>) {
    if (w.type == DType::BF16) return panels<A, bf16>(w, a, m, first_row, lane, done);
  } else {
    if (w.type == DType::F32) return panels<A, float>(w, a, m, first_row, lane, done);
    if (w.type == DType::F16) return panels<A, f16>(w, a, m, first_row, lane, done);
  }
  if (w.type == DType::I8) return panels<A, int8_t>(w, a, m, first_row, lane, done);
  throw std::invalid_argument("weights of this type do not go with these activations");
}

// done(tile, rows, first row, panel, subtree) is called once for every finished tile of this thread.
template <class Epilogue>
void gemm(const Packed& w, const void* a, DType type, int64_t lda, int64_t m, Lane& lane, const Epilogue& done) {
  for (int64_t at = 0; at < m; at += ROW_BLOCK) {
    const int64_t rows = std::min(ROW_BLOCK, m - at);
    dispatch(type, [&](auto t) {
      using T = decltype(t);
      using A = std::conditional_t<std::is_same_v<T, bf16>, bf16, float>;
      with_weights<A>(w, plain_rows<T>(w, static_cast<const T*>(a) + at * lda, lda, rows), rows, at, lane, done);
    });
  }
}

struct Linear : Op {
  const Packed& w;
  const void* src;
  int64_t lds, ldd;
  DType type, out_type;
  void* dst;
  const void* bias;
  int activation;  // gated weights only

  Linear(const Packed& w, const void* src, int64_t lds, DType type, void* dst, int64_t ldd, DType out_type, const void* bias, int activation)
      : w(w), src(src), lds(lds), ldd(ldd), type(type), out_type(out_type), dst(dst), bias(bias), activation(activation) {
    if (w.subtrees != 1) throw std::invalid_argument("the input dim of this weight is cut: its sums are not complete");
  }

  void run(const Step& step, Lane& lane) override {
    dispatch(type, [&](auto t) {
      dispatch(out_type, [&](auto o) {
        using T = decltype(t);
        using Out = decltype(o);
        gemm(w, src, type, lds, step.tokens, lane, [&](Tile& tile, int rows, int64_t row, int64_t panel, int) {
          if (w.gated) gated<T>(tile, rows, row, panel);
          else plain<T, Out>(tile, rows, row, panel);
        });
      });
    });
  }

  template <class T>
  f32x16 value(const Tile& tile, int m, int64_t column_in_panel, int64_t output, int64_t count) const {
    f32x16 v = load(&tile.sum[m][column_in_panel]);
    if (!w.scale.empty()) v = v * load_n(w.scale.data() + output, count);
    return bias ? v + load_n(static_cast<const T*>(bias) + output, count) : v;
  }
  template <class T, class Out>
  void plain(const Tile& tile, int rows, int64_t row, int64_t panel) const {
    for (int m = 0; m < rows; m++)
      for (int64_t c = 0; c < PANEL; c += W) {
        const int64_t output = panel * PANEL + c, count = std::min<int64_t>(W, w.n - output);
        if (count > 0) store_n(static_cast<Out*>(dst) + (row + m) * ldd + output, value<T>(tile, m, c, output, count), count);
      }
  }
  template <class T>
  void gated(const Tile& tile, int rows, int64_t row, int64_t panel) const {
    const int64_t half = w.n / 2;
    for (int m = 0; m < rows; m++)
      for (int64_t c = 0; c < PANEL / 2; c += W) {
        const int64_t output = panel * PANEL / 2 + c, count = std::min<int64_t>(W, half - output);
        if (count <= 0) continue;
        const f32x16 gate = value<T>(tile, m, c, output, count), up = value<T>(tile, m, c + PANEL / 2, half + output, count);
        store_n(static_cast<T*>(dst) + (row + m) * ldd + output, activate(gate, up, activation), count);
      }
  }
};

Op* op_linear(Packed* w, const void* src, int64_t lds, int64_t src_dtype, void* dst, int64_t ldd, int64_t dst_dtype, const void* bias) {
  if (w->gated) throw std::invalid_argument("a gated weight needs op_gated");
  return new Linear(*w, src, lds, DType(src_dtype), dst, ldd, DType(dst_dtype), bias, 0);
}
Op* op_gated(Packed* w, const void* src, int64_t lds, int64_t dtype, void* dst, int64_t ldd, const void* bias, int64_t activation) {
  if (!w->gated) throw std::invalid_argument("op_gated needs a gated weight");
  return new Linear(*w, src, lds, DType(dtype), dst, ldd, DType(dtype), bias, int(activation));
}
// For tests: all partial sums of rows [0, m).
void linear_partials(Packed* w, const void* a, int64_t dtype, int64_t lda, int64_t m, float* out) {
  team().run([&](Lane& lane) { gemm_partials(*w, a, DType(dtype), lda, m, out, w->n, m * w->n, lane); });
}

}  // namespace

void gemm_partials(const Packed& w, const void* a, DType type, int64_t lda, int64_t m, float* out, int64_t ldo, int64_t stride, Lane& lane) {
  gemm(w, a, type, lda, m, lane, [&](Tile& tile, int rows, int64_t row, int64_t panel, int subtree) {
    const int64_t count = std::min<int64_t>(PANEL, w.n - panel * PANEL);
    for (int i = 0; i < rows; i++)
      memcpy(out + subtree * stride + (row + i) * ldo + panel * PANEL, tile.sum[i], size_t(count) * sizeof(float));
  });
}

extern const std::vector<PyMethodDef> linear_methods;
const std::vector<PyMethodDef> linear_methods = {BIND(op_linear), BIND(op_gated), BIND(linear_partials)};

}  // namespace lockstep
