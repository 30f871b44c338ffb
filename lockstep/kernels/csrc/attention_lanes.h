// Vectors as wide as a register of this CPU.
//
// GCC keeps a vector that is wider than a register in memory, which costs an inner loop an order of magnitude. So attention
// is written in these instead of simd.h's 16 lanes. What each lane computes is the same for every width.
#pragma once
#include "simd.h"
#if defined(__F16C__)
#include <immintrin.h>
#endif

namespace lockstep {

#if defined(__AVX512F__)
constexpr int64_t LANES = 16;
#elif defined(__AVX2__)
constexpr int64_t LANES = 8;
#else
constexpr int64_t LANES = 4;
#endif
typedef float lanes __attribute__((vector_size(LANES * 4)));
typedef uint32_t lanes_u32 __attribute__((vector_size(LANES * 4)));
typedef int32_t lanes_i32 __attribute__((vector_size(LANES * 4)));

LS_INLINE lanes all(float x) { return lanes{} + x; }
LS_INLINE lanes lanes_at(const float* p) { return load_raw<lanes>(p); }
LS_INLINE lanes multiply_add(lanes a, lanes b, lanes c) {
#if defined(__AVX512F__)
  return (lanes)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
  return a * b + c;  // as fma in simd.h
#endif
}

LS_INLINE lanes widened(const float* p) { return load_raw<lanes>(p); }
LS_INLINE lanes widened(const f16* p) {
#if defined(__AVX512F__)
  return (lanes)load(p);
#elif defined(__F16C__) && defined(__AVX2__)
  return (lanes)_mm256_cvtph_ps(load_raw<__m128i>(p));
#else
  float out[LANES];
  for (int64_t i = 0; i < LANES; i++) {  // by the fields of the number
    const uint32_t h = p[i].bits, e = (h >> 10) & 31u, m = h & 1023u;
    const float v = e == 31 ? as<float>(0x7f800000u | (m << 13)) : e ? as<float>(((e + 112u) << 23) | (m << 13)) : float(m) * 5.9604644775390625e-8f;
    out[i] = as<float>(as<uint32_t>(v) | (h & 0x8000u) << 16);
  }
  return load_raw<lanes>(out);
#endif
}

// 2^x for x <= about 0, relative error 1e-7; 0 below -126, so that what is masked (-inf) adds exactly nothing.
LS_INLINE lanes exp2_down(lanes x) {
  lanes shifted = x + 12582912.f, r = x - (shifted - 12582912.f);
  lanes p = all(1.5353361959569156e-4f);
  p = multiply_add(p, r, all(1.3398875016719103e-3f));
  p = multiply_add(p, r, all(9.61843691766262e-3f));
  p = multiply_add(p, r, all(5.5503323674201965e-2f));
  p = multiply_add(p, r, all(2.4022647738456726e-1f));
  p = multiply_add(p, r, all(6.931471824645996e-1f));
  p = multiply_add(p, r, all(1.f));
  p = as<lanes>(as<lanes_u32>(p) + (as<lanes_u32>(shifted) << 23));
  return x < -126.f ? lanes{} : p;
}

}  // namespace lockstep
