// Attention over the paged KV cache (Kwon et al. 2023, vLLM; Dao et al. 2022, FlashAttention) with one order of additions.
//
// For each query and head, rule 4 of docs/numerics.md:
//   1. The keys are cut into spans of 256 by absolute position.
//   2. Of each span that the query sees something of: float32 scores, each one chain over the dims; their largest m;
//      weights exp(score - m), 0 where masked; their sum l; and o, the weighted values, one chain over the keys.
//   3. Spans are merged in order of position into the running (m, l, o); the result is o / l, rounded once.
// So a result does not depend on how a prompt was cut into steps, on what was cached, on the rows around it, on block
// tables, tiles or threads. A span is more than a block and less than a context: partial results are few, and chunks
// of 16 that no query of a tile sees are skipped, which changes nothing: they would add 0 to each chain. Where a result is
// not finite, the values that its query does not see are kept out of it one by one, for 0 times infinity is not 0.
#pragma once
#include <cstdint>

namespace lockstep {

struct Op;
// dst [tokens, num_q * head_dim] = attention of the queries in qkv (rotated, first in its rows) over the cache, which holds
// the keys and values up to each row's length, those of this step included. kv_of_q [num_q]: the KV head that each query
// head reads. window: a query at p sees (p - window, p]; 0: all before it. softcap: scores become cap * tanh(score / cap).
Op* op_attention(const void* qkv, int64_t ldq, void* dst, int64_t ldd, int64_t num_q, int64_t num_kv, int64_t head_dim, const int32_t* kv_of_q,
                 double scale, int64_t window, double softcap, void* kv, int64_t num_blocks, int64_t block_size, int64_t dtype);

}  // namespace lockstep
