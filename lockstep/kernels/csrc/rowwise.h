// Work on single rows: norms, residual additions. One row, one order of additions (sums over 16 lanes, then the lanes).
#pragma once
#include <algorithm>
#include <cmath>

#include "simd.h"

namespace lockstep {

// The sums of squares of n elements, by lane.
template <class T>
inline f32x16 row_squares(const T* x, int64_t n) {
  f32x16 squares = splat(0.f);
  for (int64_t j = 0; j < n; j += W) {
    const f32x16 v = load_n(x + j, std::min<int64_t>(W, n - j));
    squares = fma(v, v, squares);
  }
  return squares;
}

// out = x / rms(x) * w over n elements, out may be x. As layers/norm.py: float32 inside; rounded to T before the weight
// unless plus_one, where the weight is 1 + w and the product is rounded once.
template <class T>
inline void rms_norm_row(f32x16 squares, const T* x, const T* w, T* out, int64_t n, float eps, bool plus_one) {
  const f32x16 scale = splat(1.f / std::sqrt(sum_lanes(squares) / float(n) + eps));
  for (int64_t j = 0; j < n; j += W) {
    const int64_t count = std::min<int64_t>(W, n - j);
    f32x16 v = load_n(x + j, count) * scale, weight = load_n(w + j, count);
    store_n(out + j, plus_one ? v * (1.f + weight) : rounded<T>(v) * weight, count);
  }
}
template <class T>
inline void rms_norm_row(const T* x, const T* w, T* out, int64_t n, float eps, bool plus_one) {
  rms_norm_row(row_squares(x, n), x, w, out, n, eps, plus_one);
}

// residual = round(a + residual); its row_squares
template <class T>
inline f32x16 add_row(const T* a, T* residual, int64_t n) {
  f32x16 squares = splat(0.f);
  for (int64_t j = 0; j < n; j += W) {
    const int64_t count = std::min<int64_t>(W, n - j);
    const f32x16 v = rounded<T>(load_n(a + j, count) + load_n(residual + j, count));
    store_n(residual + j, v, count);
    squares = fma(v, v, squares);
  }
  return squares;
}

}  // namespace lockstep
