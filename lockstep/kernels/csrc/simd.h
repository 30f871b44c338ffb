// Vectors of 16 floats and the element types that kernels read and write.
//
// Everything is written with GCC's vector extensions, so that it compiles for any CPU; a few functions use intrinsics
// where the compiler does not find the instruction. One library is built per variant (see build.py), and within a
// variant the result of an operation depends on its operands alone: scalar tails go through the same vector code.
#pragma once
#include <cmath>
#include <cstdint>
#include <cstring>
#include <stdexcept>
#include <string>
#if defined(__AVX512F__)
#include <immintrin.h>
#endif

namespace lockstep {

constexpr int W = 16;  // lanes
typedef float f32x16 __attribute__((vector_size(64)));
typedef int32_t i32x16 __attribute__((vector_size(64)));
typedef uint32_t u32x16 __attribute__((vector_size(64)));
typedef uint16_t u16x16 __attribute__((vector_size(32)));
typedef int8_t i8x16 __attribute__((vector_size(16)));

struct bf16 { uint16_t bits; };
struct f16 { uint16_t bits; };

enum class DType : int { F32 = 0, BF16 = 1, F16 = 2, I8 = 3 };  // the numbers are known to library.py

inline int64_t itemsize(DType t) { return t == DType::F32 ? 4 : t == DType::I8 ? 1 : 2; }

// Calls f with a value of the C++ type of `t`, one of the types of activations: `dispatch(t, [&](auto tag) {...})`.
template <class F>
auto dispatch(DType t, F&& f) {
  switch (t) {
    case DType::F32: return f(float{});
    case DType::BF16: return f(bf16{});
    case DType::F16: return f(f16{});
    default: throw std::invalid_argument("not a type of activations: " + std::to_string(int(t)));
  }
}

#define LS_INLINE inline __attribute__((always_inline))

template <class To, class From>
LS_INLINE To as(From x) {
  static_assert(sizeof(To) == sizeof(From));
  To y;
  memcpy(&y, &x, sizeof y);
  return y;
}

LS_INLINE f32x16 splat(float x) { return f32x16{} + x; }
LS_INLINE u32x16 splat_u32(uint32_t x) { return u32x16{} + x; }

template <class V, class T>
LS_INLINE V load_raw(const T* p) {
  V v;
  memcpy(&v, p, sizeof v);
  return v;
}
template <class V, class T>
LS_INLINE void store_raw(T* p, V v) { memcpy(p, &v, sizeof v); }

LS_INLINE f32x16 fma(f32x16 a, f32x16 b, f32x16 c) {
#if defined(__AVX512F__)
  return (f32x16)_mm512_fmadd_ps((__m512)a, (__m512)b, (__m512)c);
#else
  return a * b + c;  // contracted where the CPU can: see the flags in build.py
#endif
}
LS_INLINE f32x16 vmax(f32x16 a, f32x16 b) { return a > b ? a : b; }
LS_INLINE f32x16 vmin(f32x16 a, f32x16 b) { return a < b ? a : b; }

// ---- widening and rounding -----------------------------------------------------------------------------------------
LS_INLINE f32x16 widen_bits(u16x16 x) {
#if defined(__AVX512F__)
  return as<f32x16>(_mm512_slli_epi32(_mm512_cvtepu16_epi32((__m256i)x), 16));  // the compiler goes through two halves
#else
  return as<f32x16>(__builtin_convertvector(x, u32x16) << 16);
#endif
}

// Round to nearest, ties to even; a NaN stays one.
LS_INLINE u16x16 round_bf16(f32x16 x) {
#if defined(__AVX512BF16__) && defined(__AVX512VL__)
  return (u16x16)_mm512_cvtneps_pbh((__m512)x);  // subnormal numbers become zero
#else
  u32x16 b = as<u32x16>(x);
  u32x16 r = b + 0x7fffu + ((b >> 16) & 1u);
  u32x16 nan = b | 0x400000u;
  i32x16 is_nan = (x != x);
  return __builtin_convertvector((is_nan ? nan : r) >> 16, u16x16);
#endif
}

LS_INLINE f32x16 widen_f16(u16x16 x) {
#if defined(__AVX512F__)
  return (f32x16)_mm512_cvtph_ps((__m256i)x);
#else
  f32x16 out;
  for (int i = 0; i < W; i++) {  // any CPU: by the fields of the number
    uint32_t s = uint32_t(x[i] & 0x8000u) << 16, e = (x[i] >> 10) & 31u, m = x[i] & 1023u;
    float v;
    if (e == 31) v = as<float>(0x7f800000u | (m << 13));
    else if (e) v = as<float>(((e + 112u) << 23) | (m << 13));
    else v = float(m) * 5.9604644775390625e-8f;
    out[i] = as<float>(as<uint32_t>(v) | s);
  }
  return out;
#endif
}

LS_INLINE u16x16 round_f16(f32x16 x) {
#if defined(__AVX512F__)
  return (u16x16)_mm512_cvtps_ph((__m512)x, _MM_FROUND_TO_NEAREST_INT | _MM_FROUND_NO_EXC);
#else
  u16x16 out;
  for (int i = 0; i < W; i++) {
    uint32_t b = as<uint32_t>(float(x[i])), s = (b >> 16) & 0x8000u;
    b &= 0x7fffffffu;
    uint32_t r;
    if (b > 0x7f800000u) r = 0x7e00u;
    else if (b >= 0x477ff000u) r = 0x7c00u;
    else if (b < 0x38800000u) {  // a subnormal half: one addition aligns and rounds it
      float v = as<float>(b) + 0.5f;
      r = as<uint32_t>(v) - 0x3f000000u;
    } else r = (b - 0x38000000u + 0xfffu + ((b >> 13) & 1u)) >> 13;
    out[i] = uint16_t(s | r);
  }
  return out;
#endif
}

// ---- 16 elements of any type, or the first n of 16 (the others zero) -----------------------------------------------
LS_INLINE f32x16 load(const float* p) { return load_raw<f32x16>(p); }
LS_INLINE f32x16 load(const bf16* p) { return widen_bits(load_raw<u16x16>(p)); }
LS_INLINE f32x16 load(const f16* p) { return widen_f16(load_raw<u16x16>(p)); }
LS_INLINE void store(float* p, f32x16 v) { store_raw(p, v); }
LS_INLINE void store(bf16* p, f32x16 v) { store_raw(p, round_bf16(v)); }
LS_INLINE void store(f16* p, f32x16 v) { store_raw(p, round_f16(v)); }

template <class T>
LS_INLINE f32x16 load_n(const T* p, int64_t n) {
  if (n >= W) return load(p);
  T part[W] = {};
  memcpy(part, p, size_t(n) * sizeof(T));
  return load(part);
}
template <class T>
LS_INLINE void store_n(T* p, f32x16 v, int64_t n) {
  if (n >= W) return store(p, v);
  T part[W];
  store(part, v);
  memcpy(p, part, size_t(n) * sizeof(T));
}

LS_INLINE float to_float(float x) { return x; }
LS_INLINE float to_float(bf16 x) { return as<float>(uint32_t(x.bits) << 16); }
LS_INLINE float to_float(f16 x) { return load_n(&x, 1)[0]; }

// The value after a trip through type T: what a tensor of that type would hold.
template <class T>
LS_INLINE f32x16 rounded(f32x16 v) {
  if constexpr (sizeof(T) == 4) return v;
  T part[W];
  store(part, v);
  return load(part);
}

// ---- reductions over lanes, always in the same order ---------------------------------------------------------------
LS_INLINE float sum_lanes(f32x16 v) {
#if defined(__AVX512F__)
  return _mm512_reduce_add_ps((__m512)v);  // the same order
#endif
  float a[W];
  memcpy(a, &v, sizeof a);
  for (int step = W / 2; step; step /= 2)
    for (int i = 0; i < step; i++) a[i] += a[i + step];
  return a[0];
}
LS_INLINE float max_lanes(f32x16 v) {
#if defined(__AVX512F__)
  return _mm512_reduce_max_ps((__m512)v);
#endif
  float a[W];
  memcpy(a, &v, sizeof a);
  for (int step = W / 2; step; step /= 2)
    for (int i = 0; i < step; i++) a[i] = a[i] > a[i + step] ? a[i] : a[i + step];
  return a[0];
}

// ---- exp, tanh: one polynomial on every path -----------------------------------------------------------------------
// exp(x), relative error below 2e-7 of normal results; 0 below -104, inf above 88.8; of not-a-number not-a-number (Cephes' expf).
LS_INLINE f32x16 vexp(f32x16 x) {
  f32x16 y = vmin(splat(88.9f), vmax(splat(-104.f), x));  // in this order, what compares false stays
  f32x16 n = fma(y, splat(1.44269504088896341f), splat(12582912.f)) - 12582912.f;
  f32x16 r = fma(n, splat(-0.693359375f), y);
  r = fma(n, splat(2.12194440e-4f), r);
  f32x16 p = splat(1.9875691500e-4f);
  p = fma(p, r, splat(1.3981999507e-3f));
  p = fma(p, r, splat(8.3334519073e-3f));
  p = fma(p, r, splat(4.1665795894e-2f));
  p = fma(p, r, splat(1.6666665459e-1f));
  p = fma(p, r, splat(5.0000001201e-1f));
  p = fma(p * r, r, r) + 1.f;
#if defined(__AVX512F__)
  return (f32x16)_mm512_scalef_ps((__m512)p, (__m512)n);
#else
  // 2^n in two factors, so that results near the ends of the range stay right
  i32x16 e = __builtin_convertvector(n, i32x16), h = e >> 1;
  return p * as<f32x16>((h + 127) << 23) * as<f32x16>((e - h + 127) << 23);
#endif
}
// tanh(x) = 1 - 2 / (exp(2x) + 1); by its series where that would cancel.
LS_INLINE f32x16 vtanh(f32x16 x) {
  f32x16 big = 1.f - 2.f / (vexp(x + x) + 1.f);
  f32x16 s = x * x;
  f32x16 p = splat(-5.70498872745e-3f);
  p = fma(p, s, splat(2.06390887954e-2f));
  p = fma(p, s, splat(-5.37397155531e-2f));
  p = fma(p, s, splat(1.33314422036e-1f));
  p = fma(p, s, splat(-3.33332819422e-1f));
  f32x16 small = fma(p * s, x, x);
  f32x16 a = x < 0.f ? -x : x;
  return a < 0.625f ? small : big;
}

}  // namespace lockstep
