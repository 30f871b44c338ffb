// Work on single rows: norms, residual additions. One row, one order of additions (sums over 16 lanes, then the lanes).
#pragma once
#include <algorithm>
#include <cmath>

#include "simd.h"

namespace lockstep {

// out = x / rms(x) * w over n elements, out may be x. As layers/norm.py: float32 inside; rounded to T before the weight
// unless plus_one, where the weight is 1 + w and the product is rounded once.
template <class T>
inline void rms_norm_row(const T* x, const T* w, T* out, int64_t n, float eps, bool plus_one) {
  f32x16 squares = splat(0.f);
  int64_t j = 0;
  for (; j + W <= n; j += W) {
    f32x16 v = load(x + j);
    squares = fma(v, v, squares);
  }
  if (j < n) {
    f32x16 v = load_n(x + j, n - j);
    squares = fma(v, v, squares);
  }
  const f32x16 scale = splat(1.f / std::sqrt(sum_lanes(squares) / float(n) + eps));
  for (j = 0; j < n; j += W) {
    const int64_t count = std::min<int64_t>(W, n - j);
    f32x16 v = load_n(x + j, count) * scale, weight = load_n(w + j, count);
    store_n(out + j, plus_one ? v * (1.f + weight) : rounded<T>(v) * weight, count);
  }
}

// residual = round(a + residual)
template <class T>
inline void add_row(const T* a, T* residual, int64_t n) {
  for (int64_t j = 0; j < n; j += W) {
    const int64_t count = std::min<int64_t>(W, n - j);
    store_n(residual + j, load_n(a + j, count) + load_n(residual + j, count), count);
  }
}

}  // namespace lockstep
