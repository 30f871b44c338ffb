// The paged KV cache as the kernels lay it out inside a block.
//
// The tensor is [2, num_blocks, block_size * num_kv * head_dim]: keys, then values. Inside a block each KV head has its
// chunks of 16 tokens one after the other, and a chunk is stored in the order in which attention multiplies it, 16 lanes
// at a time. `P` elements that one instruction multiplies together stand side by side (bfloat16: 2, others: 1):
//   keys    [head_dim / P][16 tokens][P]   lanes are tokens: one vector has the next P dims of 16 keys
//   values  [16 / P tokens][head_dim][P]   lanes are dims: one vector has 16 dims of the next P tokens
#pragma once
#include "simd.h"

namespace lockstep {

constexpr int64_t CHUNK = 16;  // tokens

template <class T>
constexpr int64_t PACK = 1;
template <>
constexpr int64_t PACK<bf16> = 2;

struct KvCache {
  char* keys;
  char* values;
  int64_t num_blocks, block_size, num_kv, head_dim;
  DType dtype;

  // Throws invalid_argument where the layout has no place for such blocks or heads.
  KvCache(void* kv, int64_t num_blocks, int64_t block_size, int64_t num_kv, int64_t head_dim, DType dtype);

  // Element at which the chunk of slot `slot` begins, for one KV head.
  int64_t chunk(int64_t slot, int64_t head) const {
    int64_t block = slot / block_size, offset = slot % block_size / CHUNK * CHUNK;
    return ((block * num_kv + head) * block_size + offset) * head_dim;
  }
};

// Where in its chunk dim `d` of the token `t` (0..15) is.
template <class T>
LS_INLINE int64_t key_place(int64_t t, int64_t d) {
  return (d / PACK<T> * CHUNK + t) * PACK<T> + d % PACK<T>;
}
template <class T>
LS_INLINE int64_t value_place(int64_t t, int64_t d, int64_t head_dim) {
  return (t / PACK<T> * head_dim + d) * PACK<T> + t % PACK<T>;
}

// One token's key and value [head_dim] of one head into its place, and back.
template <class T>
void kv_put(const KvCache& kv, int64_t slot, int64_t head, const T* k, const T* v) {
  T *keys = reinterpret_cast<T*>(kv.keys) + kv.chunk(slot, head), *values = reinterpret_cast<T*>(kv.values) + kv.chunk(slot, head);
  const int64_t t = slot % CHUNK;
  for (int64_t d = 0; d < kv.head_dim; d += PACK<T>) memcpy(keys + key_place<T>(t, d), k + d, PACK<T> * sizeof(T));
  for (int64_t d = 0; d < kv.head_dim; d++) values[value_place<T>(t, d, kv.head_dim)] = v[d];
}
template <class T>
void kv_get(const KvCache& kv, int64_t slot, int64_t head, T* k, T* v) {
  const T *keys = reinterpret_cast<const T*>(kv.keys) + kv.chunk(slot, head), *values = reinterpret_cast<const T*>(kv.values) + kv.chunk(slot, head);
  for (int64_t d = 0; d < kv.head_dim; d++) {
    k[d] = keys[key_place<T>(slot % CHUNK, d)];
    v[d] = values[value_place<T>(slot % CHUNK, d, kv.head_dim)];
  }
}
// Zeroes the values of the slots after `slot` in its chunk. What somebody else left there is masked, but 0 * NaN is NaN.
// (Masked keys cannot do harm: each has a lane of its own.)
template <class T>
void kv_clear_after(const KvCache& kv, int64_t slot, int64_t head) {
  T* values = reinterpret_cast<T*>(kv.values) + kv.chunk(slot, head);
  for (int64_t t = slot % CHUNK + 1; t < CHUNK; t++)
    for (int64_t d = 0; d < kv.head_dim; d++) values[value_place<T>(t, d, kv.head_dim)] = T{};
}

// Tokens at `slots` [n] from or to plain k, v [n, num_kv, head_dim].
void kv_write(void* kv, int64_t num_blocks, int64_t block_size, int64_t num_kv, int64_t head_dim, int64_t dtype, const int64_t* slots, int64_t n,
              const void* k, const void* v);
void kv_read(void* kv, int64_t num_blocks, int64_t block_size, int64_t num_kv, int64_t head_dim, int64_t dtype, const int64_t* slots, int64_t n,
             void* k, void* v);

}  // namespace lockstep
