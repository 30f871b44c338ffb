// Rotary position embedding (Su et al. 2021, RoFormer; half-split), the norms of query and key heads, and the KV store.
#pragma once
#include <cstdint>

namespace lockstep {

struct Op;
// cos_sin [tokens, 2 * half] float32: the cosines, then the sines of position * inv_freq [half]. Once a step.
Op* op_angles(const float* inv_freq, int64_t half, float* cos_sin);
// On each row of qkv [tokens, (num_q + 2 num_kv) * head_dim]: norms q and k heads where there is a weight [head_dim], rotates
// their first 2 * half dims in place, and stores k and v at the step's slots.
Op* op_rope_store(void* qkv, int64_t ld, int64_t num_q, int64_t num_kv, int64_t head_dim, int64_t half, const float* cos_sin, const void* q_norm,
                  const void* k_norm, double eps, bool plus_one, void* kv, int64_t num_blocks, int64_t block_size, int64_t dtype);

}  // namespace lockstep
