#include "rope.h"

#include "kv.h"
#include "program.h"
#include "rowwise.h"

namespace lockstep {
namespace {

struct Angles : Op {
  const float* inv_freq;
  int64_t half;
  float* cos_sin;
  Angles(const float* inv_freq, int64_t half, float* cos_sin) : inv_freq(inv_freq), half(half), cos_sin(cos_sin) {}

  void run(const Step& step, Lane& lane) override {
    for (int64_t i = lane.first(step.tokens); i < lane.last(step.tokens); i++) {
      float* out = cos_sin + i * 2 * half;
      for (int64_t j = 0; j < half; j++) {
        float angle = float(step.positions[i]) * inv_freq[j];
        out[j] = cosf(angle), out[half + j] = sinf(angle);
      }
    }
  }
};

template <class T>
void rotate_head(T* x, const float* cos_sin, int64_t half) {
  for (int64_t j = 0; j < half; j += W) {
    const int64_t n = half - j;
    f32x16 a = load_n(x + j, n), b = load_n(x + half + j, n), c = load_n(cos_sin + j, n), s = load_n(cos_sin + half + j, n);
    store_n(x + j, a * c - b * s, n);
    store_n(x + half + j, b * c + a * s, n);
  }
}

template <class T>
struct RopeStore : Op {
  T* qkv;
  int64_t ld, num_q, half;
  const float* cos_sin;
  const T *q_norm, *k_norm;
  float eps;
  bool plus_one;
  KvCache kv;
  RopeStore(T* qkv, int64_t ld, int64_t num_q, int64_t half, const float* cos_sin, const T* q_norm, const T* k_norm, float eps, bool plus_one,
            KvCache kv)
      : qkv(qkv), ld(ld), num_q(num_q), half(half), cos_sin(cos_sin), q_norm(q_norm), k_norm(k_norm), eps(eps), plus_one(plus_one), kv(kv) {}

  void heads(T* x, int64_t n, const T* weight, const float* angles) const {
    for (int64_t h = 0; h < n; h++, x += kv.head_dim) {
      if (weight) rms_norm_row(x, weight, x, kv.head_dim, eps, plus_one);
      rotate_head(x, angles, half);
    }
  }

  // Threads share tokens out. Two may write to one chunk, but never to one slot: only the row's last token clears, and
  // only what lies behind it.
  void run(const Step& step, Lane& lane) override {
    int64_t row = 0;
    for (int64_t i = lane.first(step.tokens), last = lane.last(step.tokens); i < last; i++) {
      while (i >= step.query_start[row + 1]) row++;
      T *q = qkv + i * ld, *k = q + num_q * kv.head_dim, *v = k + kv.num_kv * kv.head_dim;
      heads(q, num_q, q_norm, cos_sin + i * 2 * half);
      heads(k, kv.num_kv, k_norm, cos_sin + i * 2 * half);
      const int64_t slot = step.slots[i], before = slot % CHUNK;
      const bool fresh = i + 1 == step.query_start[row + 1] && i - step.query_start[row] >= before;  // the chunk began in this step
      for (int64_t h = 0; h < kv.num_kv; h++) {
        kv_put(kv, slot, h, k + h * kv.head_dim, v + h * kv.head_dim);
        if (fresh) kv_clear_after<T>(kv, slot, h);
      }
    }
  }
};

}  // namespace

Op* op_angles(const float* inv_freq, int64_t half, float* cos_sin) { return new Angles(inv_freq, half, cos_sin); }

Op* op_rope_store(void* qkv, int64_t ld, int64_t num_q, int64_t num_kv, int64_t head_dim, int64_t half, const float* cos_sin, const void* q_norm,
                  const void* k_norm, double eps, bool plus_one, void* kv, int64_t num_blocks, int64_t block_size, int64_t dtype) {
  KvCache cache(kv, num_blocks, block_size, num_kv, head_dim, DType(dtype));
  if (half < 0 || 2 * half > head_dim) throw std::invalid_argument("2 * half=" + std::to_string(2 * half) + " must be at most head_dim=" + std::to_string(head_dim));
  return dispatch(cache.dtype, [&](auto tag) -> Op* {
    using T = decltype(tag);
    return new RopeStore<T>(static_cast<T*>(qkv), ld, num_q, half, cos_sin, static_cast<const T*>(q_norm), static_cast<const T*>(k_norm), float(eps),
                            plus_one, cache);
  });
}

}  // namespace lockstep
