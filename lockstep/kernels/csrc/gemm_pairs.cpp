// The kernel of AVX512-BF16: one instruction adds the products of a pair of k to a float32 sum.
#include "gemm_blocks.h"

#if defined(__AVX512BF16__)

namespace lockstep {

const bool has_pair_kernel = true;

namespace {

constexpr int MOST = 6, NV = 4;  // a tile: rows, vectors of 16 columns

// 16 columns' pairs of one step.
struct Bfloat16 {
  static constexpr int64_t BYTES = 4 * PANEL;
  static LS_INLINE __m512bh get(const char* w, int v) { return (__m512bh)_mm512_loadu_si512(w + 64 * v); }
};
struct Int8 {
  static constexpr int64_t BYTES = 2 * PANEL;
  static LS_INLINE __m512bh get(const char* w, int v) {
    const __m128i* p = reinterpret_cast<const __m128i*>(w + 32 * v);
    __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p)));
    __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p + 1)));
    return _mm512_cvtne2ps_pbh(high, low);
  }
};

LS_INLINE __m512bh pair(const bf16* a) { return (__m512bh)_mm512_set1_epi32(load_raw<int32_t>(a)); }

constexpr int64_t GROUP = 8;  // steps between prefetches

template <class Weight, int M>
void tile(const char* w, int64_t steps, const bf16* a, int64_t lda, float* c, bool fresh, Prefetch& prefetch, int64_t lines) {
  __m512 sums[M][NV];
#pragma GCC unroll 8
  for (int r = 0; r < M; r++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) sums[r][v] = fresh ? _mm512_setzero_ps() : _mm512_loadu_ps(c + r * PANEL + v * W);
  for (int64_t group = 0; group < steps; group += GROUP) {
    prefetch.lines(lines);
    for (int64_t s = group, end = std::min(steps, group + GROUP); s < end; s++, w += Weight::BYTES, a += 2) {
      __m512bh weights[NV];
#pragma GCC unroll 4
      for (int v = 0; v < NV; v++) weights[v] = Weight::get(w, v);
#pragma GCC unroll 8
      for (int r = 0; r < M; r++) {
        __m512bh x = pair(a + r * lda);
#pragma GCC unroll 4
        for (int v = 0; v < NV; v++) sums[r][v] = _mm512_dpbf16_ps(sums[r][v], x, weights[v]);
      }
    }
  }
#pragma GCC unroll 8
  for (int r = 0; r < M; r++)
#pragma GCC unroll 4
    for (int v = 0; v < NV; v++) _mm512_storeu_ps(c + r * PANEL + v * W, sums[r][v]);
}

template <class Weight, int M = MOST>
LS_INLINE void tile_of(int64_t rows, const char* w, int64_t steps, const bf16* a, int64_t lda, float* c, bool fresh, Prefetch& prefetch, int64_t lines) {
  if constexpr (M > 0) {
    if (rows == M) tile<Weight, M>(w, steps, a, lda, c, fresh, prefetch, lines);
    else tile_of<Weight, M - 1>(rows, w, steps, a, lda, c, fresh, prefetch, lines);
  }
}

// The tiles of a block, which together prefetch the bytes that follow it in memory.
template <class Weight>
void multiply(const char* w, int64_t k, const bf16* a, int64_t lda, int64_t m, float* c, bool fresh, Prefetch prefetch, int64_t bytes) {
  int64_t groups = (k / 2 + GROUP - 1) / GROUP;
  each_tile(m, MOST, [&](int64_t row, int64_t rows, int64_t, int64_t tiles) {
    int64_t lines = (bytes / 64 + groups * tiles - 1) / (groups * tiles);
    tile_of<Weight>(rows, w, k / 2, a + row * lda, lda, c + row * PANEL, fresh, prefetch, lines);
  });
}

// int8 [k / 2][64][2] as bfloat16, which holds every one of its values.
const char* unpack(const char* w, int64_t k, char* out) {
  for (int64_t s = 0; s < k / 2; s++)
    for (int v = 0; v < NV; v++) _mm512_store_si512(out + s * Bfloat16::BYTES + v * 64, (__m512i)Int8::get(w + s * Int8::BYTES, v));
  return out;
}

struct Pairs {
  using Row = bf16;
  int64_t row_block(const Packed& w) const { return std::min<int64_t>(std::max<int64_t>((384 << 10) / (w.kp * 2), 96), 384); }
  int64_t k_block(const Packed&) const { return 256; }

  const bf16* rows(const Packed& w, const Rows& a, int64_t first, int64_t count, int64_t* ld) const {
    if (!w.gaps) return *ld = a.ld, reinterpret_cast<const bf16*>(a.at(first));
    *ld = w.kp;
    bf16* out = scratches().rows.get<bf16>(count * w.kp);
    for (int64_t r = 0; r < count; r++)
      for (const Atom& atom : w.atoms) {
        bf16* to = out + r * w.kp + atom.at;
        memcpy(to, a.at(first + r) + 2 * atom.from, size_t(2 * atom.size));
        memset(to + atom.size, 0, size_t(2 * (atom.padded - atom.size)));
      }
    return out;
  }

  void block(const Packed& w, const char* weights, int64_t k, const bf16* a, int64_t lda, int64_t m, float* c, bool fresh) const {
    int64_t bytes = k * PANEL * itemsize(w.type);
    Prefetch prefetch{weights + std::max<int64_t>(bytes, 8 << 10)};
    if (w.type == DType::BF16) return multiply<Bfloat16>(weights, k, a, lda, m, c, fresh, prefetch, bytes);
    if (m <= MOST) return multiply<Int8>(weights, k, a, lda, m, c, fresh, prefetch, bytes);
    weights = unpack(weights, k, scratches().weights.get<char>(k * PANEL * 2));
    multiply<Bfloat16>(weights, k, a, lda, m, c, fresh, prefetch, bytes);
  }
};

}  // namespace

void gemm_pairs(const Packed& w, const Rows& a, int64_t m, const Sink& sink, Lane& lane) { PanelLoop<Pairs>(w, a, sink).run(m, lane); }

}  // namespace lockstep

#else

namespace lockstep {
const bool has_pair_kernel = false;
void gemm_pairs(const Packed&, const Rows&, int64_t, const Sink&, Lane&) { throw std::logic_error("this library has no kernel for pairs"); }
}  // namespace lockstep

#endif
