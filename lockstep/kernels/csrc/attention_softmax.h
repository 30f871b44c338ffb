// The softmax of attention, span by span (Milakov and Gimelshein 2018, "Online normalizer calculation for softmax").
#pragma once
#include <algorithm>

#include "attention_dot.h"

namespace lockstep {

// The state of some queries after some of their keys: per query the largest score, the sum of exp(score - largest), and
// the sum of exp(score - largest) times value. `width` is head_dim in whole vectors.
struct Partial {
  float *largest, *sum, *out;  // [queries rounded up to 16], the same, [queries, width]
  static int64_t floats(int64_t queries, int64_t width) { return 2 * padded(queries) + queries * width; }
  static int64_t padded(int64_t n) { return (n + W - 1) / W * W; }
  Partial(float* at, int64_t queries) : largest(at), sum(at + padded(queries)), out(at + 2 * padded(queries)) {}
  // Nothing seen yet.
  void clear(int64_t queries, int64_t width) const {
    std::fill(largest, sum, -INFINITY);
    std::fill(sum, out + queries * width, 0.f);
  }
};

// 2^x for x <= about 0, relative error 1e-7; 0 below -126, so that what is masked (-inf) adds exactly nothing.
LS_INLINE f32x16 exp2_down(f32x16 x) {
  f32x16 shifted = x + 12582912.f, r = x - (shifted - 12582912.f);
  f32x16 p = splat(1.5353361959569156e-4f);
  p = fma(p, r, splat(1.3398875016719103e-3f));
  p = fma(p, r, splat(9.61843691766262e-3f));
  p = fma(p, r, splat(5.5503323674201965e-2f));
  p = fma(p, r, splat(2.4022647738456726e-1f));
  p = fma(p, r, splat(6.931471824645996e-1f));
  p = fma(p, r, splat(1.f));
  p = as<f32x16>(as<u32x16>(p) + (as<u32x16>(shifted) << 23));
  return x < -126.f ? splat(0.f) : p;
}

// What one query sees of the keys of a span: [low, high), counted from the first chunk that is there.
struct Seen {
  int64_t low, high;
  int64_t chunk0() const { return low / CHUNK; }
  int64_t chunk1() const { return (high + CHUNK - 1) / CHUNK; }
};

// With a cap the scores are cap * tanh(score * scale / cap).
struct Softmax {
  float log2_scale, inner, cap;  // exp(x * scale) = 2^(x * log2_scale); inner = scale / cap; cap 0: none
  Softmax(float scale, float cap) : log2_scale((cap > 0 ? 1.f : scale) * 1.44269504088896341f), inner(cap > 0 ? scale / cap : 0.f), cap(cap) {}

  // The largest score of one query in a span; the scores are capped, and -inf where they are not seen.
  __attribute__((noinline)) float largest(float* scores, Seen seen) const {
    const int64_t c0 = seen.chunk0(), c1 = seen.chunk1();
    if (cap > 0)
      for (int64_t c = c0; c < c1; c++) store(scores + c * CHUNK, vtanh(load(scores + c * CHUNK) * inner) * cap);
    if (seen.low % CHUNK) mask(scores + c0 * CHUNK, int32_t(seen.low % CHUNK), W);
    if (seen.high % CHUNK) mask(scores + (c1 - 1) * CHUNK, 0, int32_t(seen.high % CHUNK));
    f32x16 top = splat(-INFINITY);
    for (int64_t c = c0; c < c1; c++) top = vmax(load(scores + c * CHUNK), top);
    return max_lanes(top);
  }

  // Weights exp(score - largest) of a span of `chunks` chunks, 0 where a chunk is not seen; returns their sum.
  template <class T>
  __attribute__((noinline)) float weigh(const float* scores, int64_t chunks, Seen seen, float largest, Value<T>* weights) const {
    const int64_t c0 = seen.chunk0(), c1 = seen.chunk1();
    const f32x16 shift = splat(largest > -INFINITY ? -largest * log2_scale : 0.f), scale = splat(log2_scale);
    f32x16 total{};
    for (int64_t c = 0; c < c0; c++) put_weights<T>(f32x16{}, weights + c * VALUES_PER_CHUNK<T>);
    for (int64_t c = c0; c < c1; c++)
      total += put_weights<T>(exp2_down(fma(load(scores + c * CHUNK), scale, shift)), weights + c * VALUES_PER_CHUNK<T>);
    for (int64_t c = c1; c < chunks; c++) put_weights<T>(f32x16{}, weights + c * VALUES_PER_CHUNK<T>);
    return sum_lanes(total);
  }

  // into = into and then `next`. One that saw no key (largest -inf) changes nothing. The only copy of this code.
  __attribute__((noinline)) void merge(const Partial& into, const Partial& next, int64_t queries, int64_t width) const {
    for (int64_t q = 0; q < queries; q += W) {
      f32x16 a = load(into.largest + q), b = load(next.largest + q), top = vmax(b, a);
      i32x16 empty = b == -INFINITY;
      top = empty ? a : top;
      f32x16 keep = empty ? splat(1.f) : exp2_down((a - top) * log2_scale), gain = empty ? splat(0.f) : exp2_down((b - top) * log2_scale);
      store(into.largest + q, top);
      store(into.sum + q, fma(load(next.sum + q), gain, load(into.sum + q) * keep));
      for (int64_t i = 0; i < W && q + i < queries; i++) {
        float *o = into.out + (q + i) * width, *n = next.out + (q + i) * width;
        const f32x16 k = splat(keep[i]), g = splat(gain[i]);
        for (int64_t d = 0; d < width; d += W) store(o + d, fma(load(n + d), g, load(o + d) * k));
      }
    }
  }

 private:
  // Only lanes [low, high) of the chunk are seen.
  static LS_INLINE void mask(float* chunk, int32_t low, int32_t high) {
    const i32x16 lane = {0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11, 12, 13, 14, 15};
    f32x16 s = lane < low ? splat(-INFINITY) : load(chunk);
    store(chunk, lane >= high ? splat(-INFINITY) : s);
  }
};

}  // namespace lockstep
