// Vectors of 8 doubles, and their exponential.
#pragma once
#include "simd.h"

namespace lockstep {

constexpr int WD = 8;  // lanes
typedef double f64x8 __attribute__((vector_size(64)));
typedef int64_t i64x8 __attribute__((vector_size(64)));
typedef float f32x8 __attribute__((vector_size(32)));

LS_INLINE f64x8 splat_f64(double x) { return f64x8{} + x; }

LS_INLINE f64x8 fma(f64x8 a, f64x8 b, f64x8 c) {
#if defined(__AVX512F__)
  return (f64x8)_mm512_fmadd_pd((__m512d)a, (__m512d)b, (__m512d)c);
#else
  return a * b + c;  // contracted where the CPU can: see the flags in build.py
#endif
}

// The first 8 of n floats; -inf where there are fewer.
LS_INLINE f64x8 load_widened(const float* x, int64_t n) {
  if (n >= WD) return __builtin_convertvector(load_raw<f32x8>(x), f64x8);
  f64x8 v = splat_f64(-INFINITY);
  for (int64_t i = 0; i < n; i++) v[i] = double(x[i]);
  return v;
}

// Whether any lane of a comparison holds.
template <class Mask>
LS_INLINE bool any(Mask m) {
  static_assert(sizeof m == 64);
#if defined(__AVX512F__)
  return _mm512_test_epi64_mask((__m512i)m, (__m512i)m) != 0;
#else
  const i64x8 v = as<i64x8>(m);
  return ((v[0] | v[1]) | (v[2] | v[3])) | ((v[4] | v[5]) | (v[6] | v[7]));
#endif
}

LS_INLINE double sum_lanes(f64x8 v) { return ((v[0] + v[4]) + (v[2] + v[6])) + ((v[1] + v[5]) + (v[3] + v[7])); }
LS_INLINE double max_lanes(f64x8 v) {
  double most = v[0];
  for (int i = 1; i < WD; i++) most = most > v[i] ? most : v[i];
  return most;
}

// exp(x) for x <= 0 (-inf too), relative error below 3e-16; exactly 1 at 0, and 0 below -745.2.
// x = n ln 2 + r with |r| <= ln 2 / 2, and exp(r) by its series up to r^13, whose rest is below 5e-18.
LS_INLINE f64x8 vexp_below_0(f64x8 x) {
  const double round = 6755399441055744.0;  // 1.5 * 2^52: adding it leaves an integer in the low bits
  f64x8 y = x < -746.0 ? splat_f64(-746.0) : x;
  f64x8 shifted = fma(y, splat_f64(1.4426950408889634), splat_f64(round));
  f64x8 n = shifted - round;
  f64x8 r = fma(n, splat_f64(-6.93147180369123816490e-01), y);  // ln 2 in two parts; n times the first is exact
  r = fma(n, splat_f64(-1.90821492927058770002e-10), r);
  f64x8 p = splat_f64(1.0 / 6227020800.0);
  p = fma(p, r, splat_f64(1.0 / 479001600.0));
  p = fma(p, r, splat_f64(1.0 / 39916800.0));
  p = fma(p, r, splat_f64(1.0 / 3628800.0));
  p = fma(p, r, splat_f64(1.0 / 362880.0));
  p = fma(p, r, splat_f64(1.0 / 40320.0));
  p = fma(p, r, splat_f64(1.0 / 5040.0));
  p = fma(p, r, splat_f64(1.0 / 720.0));
  p = fma(p, r, splat_f64(1.0 / 120.0));
  p = fma(p, r, splat_f64(1.0 / 24.0));
  p = fma(p, r, splat_f64(1.0 / 6.0));
  p = fma(p, r, splat_f64(0.5));
  p = fma(p * r, r, r) + 1.0;
  // 2^n in two factors, so that results near the smallest number stay right
  i64x8 e = as<i64x8>(shifted) - as<i64x8>(splat_f64(round)), h = e >> 1;
  f64x8 out = p * as<f64x8>((h + 1023) << 52) * as<f64x8>((e - h + 1023) << 52);
  return x < -745.2 ? splat_f64(0.0) : out;
}

}  // namespace lockstep
