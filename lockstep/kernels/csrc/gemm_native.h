// Vectors as wide as this CPU's registers, for the kernels of plain vector code.
#pragma once
#include "simd.h"
#if defined(__AVX2__)
#include <immintrin.h>
#endif
#if defined(__ARM_NEON)
#include <arm_neon.h>
#endif

namespace lockstep {

#if defined(__AVX512F__)
constexpr int VL = 16, SUMS = 24;  // lanes; how many vectors of sums leave room for operands
#elif defined(__AVX2__)
constexpr int VL = 8, SUMS = 12;
#elif defined(__aarch64__)
constexpr int VL = 4, SUMS = 24;
#else
constexpr int VL = 4, SUMS = 12;
#endif
typedef float vf __attribute__((vector_size(VL * 4)));
typedef int32_t vi __attribute__((vector_size(VL * 4)));
typedef uint32_t vu __attribute__((vector_size(VL * 4)));
typedef uint16_t vh __attribute__((vector_size(VL * 2)));
typedef int16_t vs __attribute__((vector_size(VL * 2)));

LS_INLINE vf vfma(vf a, vf b, vf c) {
#if defined(__AVX512F__)
  return (vf)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#elif defined(__AVX2__) && defined(__FMA__)
  return (vf)_mm256_fmadd_ps((__m256)a, (__m256)b, (__m256)c);
#elif defined(__aarch64__)
  return (vf)vfmaq_f32((float32x4_t)c, (float32x4_t)a, (float32x4_t)b);
#else
  return a * b + c;
#endif
}

// float16 bits to float32, exactly: the exponent is put right by a multiplication, which also normalises subnormals.
LS_INLINE vf half_to_float(vh x) {
#if defined(__AVX512F__)
  return (vf)_mm512_cvtph_ps((__m256i)x);
#elif defined(__F16C__)
  return (vf)_mm256_cvtph_ps((__m128i)x);
#else
  vu h = __builtin_convertvector(x, vu), magnitude = (h & 0x7fffu) << 13;
  vf v = as<vf>(magnitude) * as<float>(0x77800000u);
  vu special = magnitude | 0x7f800000u;
  return as<vf>((magnitude >= 0x0f800000u ? special : as<vu>(v)) | ((h & 0x8000u) << 16));
#endif
}

}  // namespace lockstep
