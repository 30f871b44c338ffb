// The inner loops of a packed product: a few rows times one panel, over one block of k.
//
// What is added to an output element, and in which order, is the same for every number of rows: one chain of fused
// additions along k. Tiles of different heights differ only in how many such chains run next to each other.
#pragma once
#include "packed.h"

namespace lockstep {

// Vectors of 16 columns that are summed at once: as many as the registers hold next to six rows.
#if defined(__AVX512F__)
constexpr int GROUP = 4;
#else
constexpr int GROUP = 1;
#endif
constexpr int ROWS = 6;                    // most rows of a tile
constexpr int VECTORS = int(PANEL) / W;    // in a panel's width

struct Tile {  // sums of up to ROWS rows of one panel
  float sum[ROWS][PANEL];
};

LS_INLINE void prefetch(const char* p, int64_t bytes) {
  for (int64_t i = 0; i < bytes; i += 64) __builtin_prefetch(p + i, 0, 2);
}

// ---- pairs of bf16: activations bf16, weights bf16 or int8 --------------------------------------------------------
#if defined(__AVX512BF16__)
typedef __m512i pair16;
LS_INLINE pair16 load_pairs(const bf16* w) { return _mm512_loadu_si512(w); }
LS_INLINE pair16 load_pairs(const int8_t* w) {  // int8 is exact in bf16
  __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w))));
  __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(reinterpret_cast<const __m128i*>(w + 16))));
  return (__m512i)_mm512_cvtne2ps_pbh(high, low);
}
LS_INLINE pair16 splat_pair(const bf16* a) {
  int32_t two;
  memcpy(&two, a, 4);
  return _mm512_set1_epi32(two);
}
LS_INLINE f32x16 dot(f32x16 acc, pair16 a, pair16 w) { return (f32x16)_mm512_dpbf16_ps((__m512)acc, (__m512bh)a, (__m512bh)w); }
#else
struct pair16 { f32x16 even, odd; };
LS_INLINE pair16 split_pairs(u32x16 two) { return {as<f32x16>(two << 16), as<f32x16>(two & 0xffff0000u)}; }
LS_INLINE pair16 load_pairs(const bf16* w) { return split_pairs(load_raw<u32x16>(w)); }
LS_INLINE pair16 load_pairs(const int8_t* w) {
  typedef int8_t i8x32 __attribute__((vector_size(32)));
  i8x32 v = load_raw<i8x32>(w);
  pair16 out;
  for (int i = 0; i < W; i++) out.even[i] = v[2 * i], out.odd[i] = v[2 * i + 1];
  return out;
}
LS_INLINE pair16 splat_pair(const bf16* a) { return {splat(to_float(a[0])), splat(to_float(a[1]))}; }
LS_INLINE f32x16 dot(f32x16 acc, const pair16& a, const pair16& w) { return fma(a.odd, w.odd, fma(a.even, w.even, acc)); }
#endif

// ---- single elements: activations as float32 ----------------------------------------------------------------------
LS_INLINE f32x16 load_single(const float* w) { return load(w); }
LS_INLINE f32x16 load_single(const f16* w) { return load(w); }
LS_INLINE f32x16 load_single(const int8_t* w) { return __builtin_convertvector(load_raw<i8x16>(w), f32x16); }

// tile += a [M rows, stride lda] x panel block [len k]. `fresh`: the tile begins at zero.
// ahead: memory that the next block will need; it is fetched `ahead_bytes` per step of k.
template <int M, class A, class B>
inline void accumulate(const A* a, int64_t lda, const B* w, int64_t len, bool fresh, Tile& tile, const char* ahead, int64_t ahead_bytes) {
  for (int g = 0; g < VECTORS; g += GROUP) {
    f32x16 acc[M][GROUP];
    for (int m = 0; m < M; m++)
      for (int v = 0; v < GROUP; v++) acc[m][v] = fresh ? splat(0.f) : load(&tile.sum[m][(g + v) * W]);
    if constexpr (sizeof(A) == 2) {  // bf16
      const B* p = w + g * W * 2;
      for (int64_t k = 0; k < len; k += 2, p += PANEL * 2) {
        if (ahead_bytes) prefetch(ahead, ahead_bytes), ahead += ahead_bytes;
        pair16 b[GROUP];
        for (int v = 0; v < GROUP; v++) b[v] = load_pairs(p + v * W * 2);
        for (int m = 0; m < M; m++) {
          pair16 x = splat_pair(a + m * lda + k);
          for (int v = 0; v < GROUP; v++) acc[m][v] = dot(acc[m][v], x, b[v]);
        }
      }
    } else {
      const B* p = w + g * W;
      for (int64_t k = 0; k < len; k++, p += PANEL) {
        if (ahead_bytes) prefetch(ahead, ahead_bytes), ahead += ahead_bytes;
        f32x16 b[GROUP];
        for (int v = 0; v < GROUP; v++) b[v] = load_single(p + v * W);
        for (int m = 0; m < M; m++) {
          f32x16 x = splat(a[m * lda + k]);
          for (int v = 0; v < GROUP; v++) acc[m][v] = fma(x, b[v], acc[m][v]);
        }
      }
    }
    for (int m = 0; m < M; m++)
      for (int v = 0; v < GROUP; v++) store(&tile.sum[m][(g + v) * W], acc[m][v]);
    ahead_bytes = 0;  // once is enough
  }
}

template <class A, class B>
inline void accumulate_rows(int rows, const A* a, int64_t lda, const B* w, int64_t len, bool fresh, Tile& tile, const char* ahead, int64_t ahead_bytes) {
  switch (rows) {
    case 1: return accumulate<1>(a, lda, w, len, fresh, tile, ahead, ahead_bytes);
    case 2: return accumulate<2>(a, lda, w, len, fresh, tile, ahead, ahead_bytes);
    case 3: return accumulate<3>(a, lda, w, len, fresh, tile, ahead, ahead_bytes);
    case 4: return accumulate<4>(a, lda, w, len, fresh, tile, ahead, ahead_bytes);
    case 5: return accumulate<5>(a, lda, w, len, fresh, tile, ahead, ahead_bytes);
    default: return accumulate<6>(a, lda, w, len, fresh, tile, ahead, ahead_bytes);
  }
}

}  // namespace lockstep
