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
    const int64_t from = seen.chunk0() * CHUNK, to = seen.chunk1() * CHUNK;
    if (cap > 0)
      for (int64_t i = from; i < to; i += W) store(scores + i, vtanh(load(scores + i) * inner) * cap);
    std::fill(scores + from, scores + seen.low, -INFINITY);
    std::fill(scores + seen.high, scores + to, -INFINITY);
    lanes top = all(-INFINITY);
    for (int64_t i = from; i < to; i += LANES) {
      const lanes s = lanes_at(scores + i);
      top = s > top ? s : top;
    }
    float tops[W];
    std::fill(tops, tops + W, -INFINITY);
    store_raw(tops, top);
    return max_lanes(load_raw<f32x16>(tops));
  }

  // Weights exp(score - largest) of a span of `chunks` chunks, 0 where a chunk is not seen; returns their sum.
  template <class T>
  __attribute__((noinline)) float weigh(const float* scores, int64_t chunks, Seen seen, float largest, Value<T>* weights) const {
    constexpr int64_t PARTS = CHUNK / LANES;
    const int64_t from = seen.chunk0() * PARTS, to = seen.chunk1() * PARTS;
    const lanes shift = all(largest > -INFINITY ? -largest * log2_scale : 0.f), scale = all(log2_scale);
    lanes total[PARTS] = {};  // lane by lane of a chunk
    for (int64_t i = 0; i < from; i++) put_weights<T>(lanes{}, weights, i);
    for (int64_t i = from; i < to; i += PARTS)
      for (int64_t p = 0; p < PARTS; p++)
        total[p] += put_weights<T>(exp2_down(multiply_add(lanes_at(scores + (i + p) * LANES), scale, shift)), weights, i + p);
    for (int64_t i = to; i < chunks * PARTS; i++) put_weights<T>(lanes{}, weights, i);
    return sum_lanes(load_raw<f32x16>(total));
  }

  // into = into and then `next`. One that saw no key (largest -inf) changes nothing. The only copy of this code.
  __attribute__((noinline)) void merge(const Partial& into, const Partial& next, int64_t queries, int64_t width) const {
    for (int64_t q = 0; q < queries; q += LANES) {
      const lanes a = lanes_at(into.largest + q), b = lanes_at(next.largest + q);
      const lanes_i32 empty = b == -INFINITY;
      const lanes top = empty | (a > b) ? a : b;
      const lanes keep = empty ? all(1.f) : exp2_down((a - top) * log2_scale), gain = empty ? lanes{} : exp2_down((b - top) * log2_scale);
      store_raw(into.largest + q, top);
      store_raw(into.sum + q, multiply_add(lanes_at(next.sum + q), gain, lanes_at(into.sum + q) * keep));
      for (int64_t i = 0; i < LANES && q + i < queries; i++) {
        float *o = into.out + (q + i) * width, *n = next.out + (q + i) * width;
        const lanes k = all(keep[i]), g = all(gain[i]);
        for (int64_t d = 0; d < width; d += LANES) store_raw(o + d, multiply_add(lanes_at(n + d), g, lanes_at(o + d) * k));
      }
    }
  }
};

}  // namespace lockstep
