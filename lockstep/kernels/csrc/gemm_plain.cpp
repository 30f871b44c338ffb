// The kernel of plain vector code: float32 rows, one fused multiply-add per k. It takes every type of rows and weights, and
// is the only one on CPUs without instructions for pairs of bfloat16.
#include "gemm_blocks.h"
#include "gemm_native.h"

namespace lockstep {

namespace {

constexpr int MOST = 6;  // rows of a tile

// How VL columns of one step (one k, or a pair of them) are read. `lines` is the memory of a step.
struct Float32 {
  static constexpr int64_t KS = 1, BYTES = 4 * PANEL;
  static LS_INLINE vf get(const char* w, int64_t c, int) { return load_raw<vf>(w + 4 * c); }
};
struct Float16 {
  static constexpr int64_t KS = 1, BYTES = 2 * PANEL;
  static LS_INLINE vf get(const char* w, int64_t c, int) { return half_to_float(load_raw<vh>(w + 2 * c)); }
};
struct Bfloat16 {
  static constexpr int64_t KS = 2, BYTES = 4 * PANEL;
  static LS_INLINE vf get(const char* w, int64_t c, int odd) {
    vu pair = load_raw<vu>(w + 4 * c);
    return as<vf>(odd ? pair & 0xffff0000u : pair << 16);
  }
};
struct Int8 {
  static constexpr int64_t KS = 2, BYTES = 2 * PANEL;
  static LS_INLINE vf get(const char* w, int64_t c, int odd) {
    vs pair = load_raw<vs>(w + 2 * c);
    return __builtin_convertvector(__builtin_convertvector(odd ? pair >> 8 : pair << 8 >> 8, vi), vf);
  }
};

// c [M][COLUMNS of 64] (= or +=) a [M][k] times the block, columns from w on.
template <class Weight, int M, int NV>
void tile(const char* w, int64_t steps, const float* a, int64_t lda, float* c, bool fresh, int64_t ahead) {
  vf sums[M][NV];
#pragma GCC unroll 16
  for (int r = 0; r < M; r++)
#pragma GCC unroll 16
    for (int v = 0; v < NV; v++) sums[r][v] = fresh ? vf{} : load_raw<vf>(c + r * PANEL + v * VL);
  for (int64_t s = 0; s < steps; s++, w += Weight::BYTES) {
    for (int64_t line = 0; line < ahead; line += 64) __builtin_prefetch(w + Weight::BYTES * 16 + line, 0, 3);
#pragma GCC unroll 2
    for (int odd = 0; odd < Weight::KS; odd++, a++) {
      vf weights[NV];
#pragma GCC unroll 16
      for (int v = 0; v < NV; v++) weights[v] = Weight::get(w, v * VL, odd);
#pragma GCC unroll 16
      for (int r = 0; r < M; r++) {
        vf x = vf{} + a[r * lda];
#pragma GCC unroll 16
        for (int v = 0; v < NV; v++) sums[r][v] = vfma(x, weights[v], sums[r][v]);
      }
    }
  }
#pragma GCC unroll 16
  for (int r = 0; r < M; r++)
#pragma GCC unroll 16
    for (int v = 0; v < NV; v++) store_raw(c + r * PANEL + v * VL, sums[r][v]);
}

// Vectors across, such that M rows of them fit the registers.
constexpr int across(int m) {
  int v = PANEL / VL;
  while (v * m > SUMS || v > 8) v /= 2;
  return v;
}

template <class Weight, int M>
void panel_wide(const char* w, int64_t steps, const float* a, int64_t lda, float* c, bool fresh) {
  constexpr int NV = across(M);
  constexpr int64_t WIDTH = NV * VL;
  for (int64_t n = 0; n < PANEL; n += WIDTH)
    tile<Weight, M, NV>(w + n * Weight::BYTES / PANEL, steps, a, lda, c + n, fresh, n == 0 ? Weight::BYTES : 0);
}

template <class Weight, int M = MOST>
void tile_of(int64_t rows, const char* w, int64_t steps, const float* a, int64_t lda, float* c, bool fresh) {
  if constexpr (M > 0) {
    if (rows == M) panel_wide<Weight, M>(w, steps, a, lda, c, fresh);
    else tile_of<Weight, M - 1>(rows, w, steps, a, lda, c, fresh);
  }
}

template <class Weight>
void multiply(const char* w, int64_t k, const float* a, int64_t lda, int64_t m, float* c, bool fresh) {
  each_tile(m, MOST, [&](int64_t row, int64_t rows, int64_t, int64_t) {
    tile_of<Weight>(rows, w, k / Weight::KS, a + row * lda, lda, c + row * PANEL, fresh);
  });
}

// The block as float32 [k][64].
template <class Weight>
const char* unpack(const char* w, int64_t k, float* out) {
  for (int64_t i = 0; i < k; i += Weight::KS, w += Weight::BYTES)
    for (int64_t c = 0; c < PANEL; c += VL)
      for (int odd = 0; odd < Weight::KS; odd++) store_raw(out + (i + odd) * PANEL + c, Weight::get(w, c, odd));
  return reinterpret_cast<const char*>(out);
}

template <class Weight>
void block_of(const char* w, int64_t k, const float* a, int64_t lda, int64_t m, float* c, bool fresh) {
  if (m <= 2 * MOST) return multiply<Weight>(w, k, a, lda, m, c, fresh);
  multiply<Float32>(unpack<Weight>(w, k, scratches().weights.get<float>(k * PANEL)), k, a, lda, m, c, fresh);
}

struct Plain {
  using Row = float;
  static constexpr bool FUSES = false;
  int64_t row_block(const Packed& w) const { return std::min<int64_t>(std::max<int64_t>((384 << 10) / (w.kp * 4), 48), 384); }
  int64_t k_block(const Packed&, int64_t) const { return 128; }

  const float* rows(const Packed& w, const Rows& a, int64_t first, int64_t count, int64_t* ld) const {
    if (a.type == DType::F32 && !w.gaps) return *ld = a.ld, reinterpret_cast<const float*>(a.at(first));
    *ld = w.kp;
    float* out = scratches().rows.get<float>(count * w.kp);
    dispatch(a.type, [&](auto tag) {
      for (int64_t r = 0; r < count; r++)
        for (const Atom& atom : w.atoms) widen(reinterpret_cast<const decltype(tag)*>(a.at(first + r)) + atom.from, atom, out + r * w.kp + atom.at);
    });
    return out;
  }

  template <class T>
  static void widen(const T* from, const Atom& atom, float* to) {
    for (int64_t k = 0; k < atom.padded; k += W) {
      f32x16 v = atom.size > k ? load_n(from + k, atom.size - k) : f32x16{};
      store_n(to + k, v, atom.padded - k);
    }
  }

  void block(const Packed& w, const char* weights, int64_t k, const float* a, int64_t lda, int64_t m, float* c, bool fresh) const {
    switch (w.type) {
      case DType::F32: return multiply<Float32>(weights, k, a, lda, m, c, fresh);
      case DType::BF16: return block_of<Bfloat16>(weights, k, a, lda, m, c, fresh);
      case DType::F16: return block_of<Float16>(weights, k, a, lda, m, c, fresh);
      case DType::I8: return block_of<Int8>(weights, k, a, lda, m, c, fresh);
    }
  }
};

}  // namespace

void gemm_plain(const Packed& w, const Rows& a, int64_t m, const Sink& sink, Lane& lane) { PanelLoop<Plain>(w, a, sink).run(m, lane); }

void gemm(const Packed& w, const Rows& a, int64_t m, const Sink& sink, Lane& lane) {
  bool pairs = has_pair_kernel && a.type == DType::BF16 && w.pairs;
  (pairs ? gemm_pairs : gemm_plain)(w, a, m, sink, lane);
}

Scratches& scratches() {
  static thread_local Scratches mine;
  return mine;
}

}  // namespace lockstep
