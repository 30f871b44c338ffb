#include "kv.h"

namespace lockstep {

KvCache::KvCache(void* kv, int64_t num_blocks, int64_t block_size, int64_t num_kv, int64_t head_dim, DType dtype)
    : keys(static_cast<char*>(kv)), values(keys), num_blocks(num_blocks), block_size(block_size), num_kv(num_kv), head_dim(head_dim), dtype(dtype) {
  if (block_size <= 0 || block_size % CHUNK)
    throw std::invalid_argument("block_size=" + std::to_string(block_size) + " must be a multiple of 16, the tokens of a chunk of the CPU kernels: use 16, 32, 64...");
  if (head_dim <= 0 || head_dim % 2) throw std::invalid_argument("head_dim=" + std::to_string(head_dim) + " must be even and positive");
  if (num_blocks <= 0 || num_kv <= 0) throw std::invalid_argument("a KV cache has at least one block and one head");
  if (dtype == DType::I8) throw std::invalid_argument("the KV cache is float32, bfloat16 or float16");
  values += num_blocks * block_size * num_kv * head_dim * itemsize(dtype);
}

void kv_write(void* kv, int64_t num_blocks, int64_t block_size, int64_t num_kv, int64_t head_dim, int64_t dtype, const int64_t* slots, int64_t n,
              const void* k, const void* v) {
  KvCache cache(kv, num_blocks, block_size, num_kv, head_dim, DType(dtype));
  dispatch(cache.dtype, [&](auto tag) {
    using T = decltype(tag);
    for (int64_t i = 0; i < n * num_kv; i++)
      kv_put(cache, slots[i / num_kv], i % num_kv, static_cast<const T*>(k) + i * head_dim, static_cast<const T*>(v) + i * head_dim);
  });
}

void kv_read(void* kv, int64_t num_blocks, int64_t block_size, int64_t num_kv, int64_t head_dim, int64_t dtype, const int64_t* slots, int64_t n,
             void* k, void* v) {
  KvCache cache(kv, num_blocks, block_size, num_kv, head_dim, DType(dtype));
  dispatch(cache.dtype, [&](auto tag) {
    using T = decltype(tag);
    for (int64_t i = 0; i < n * num_kv; i++)
      kv_get(cache, slots[i / num_kv], i % num_kv, static_cast<T*>(k) + i * head_dim, static_cast<T*>(v) + i * head_dim);
  });
}

}  // namespace lockstep
