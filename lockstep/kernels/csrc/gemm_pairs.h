// What kernels for pairs of bfloat16 share: rows with the weight's padding, int8 weights as bfloat16.
#pragma once
#include "gemm_blocks.h"

#if defined(__AVX512BF16__)

namespace lockstep {

// 16 columns' pairs of one step.
struct PairsBfloat16 {
  static constexpr int64_t BYTES = 4 * PANEL;
  static LS_INLINE __m512bh get(const char* w, int v) { return (__m512bh)_mm512_loadu_si512(w + 64 * v); }
};
struct PairsInt8 {
  static constexpr int64_t BYTES = 2 * PANEL;
  static LS_INLINE __m512bh get(const char* w, int v) {
    const __m128i* p = reinterpret_cast<const __m128i*>(w + 32 * v);
    __m512 low = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p)));
    __m512 high = _mm512_cvtepi32_ps(_mm512_cvtepi8_epi32(_mm_loadu_si128(p + 1)));
    return _mm512_cvtne2ps_pbh(high, low);
  }
};

// int8 [k / 2][64][2] as bfloat16, which holds every one of its values.
inline const char* unpack_int8(const char* w, int64_t k, char* out) {
  for (int64_t s = 0; s < k / 2; s++)
    for (int v = 0; v < 4; v++) _mm512_store_si512(out + s * PairsBfloat16::BYTES + v * 64, (__m512i)PairsInt8::get(w + s * PairsInt8::BYTES, v));
  return out;
}

// Rows [first, first + count): in place, or copied where atoms are padded.
inline const bf16* pair_rows(const Packed& w, const Rows& a, int64_t first, int64_t count, int64_t* ld) {
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

}  // namespace lockstep

#endif
