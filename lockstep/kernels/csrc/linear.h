// y = x W^T with packed weights and one fixed order of additions per output element (rule 1 and 2 of docs/numerics.md).
#pragma once
#include <cstdint>
#include <vector>

#include "simd.h"
#include "team.h"

namespace lockstep {

// A weight [n, k] in the order in which the kernel reads it. The input dim is cut into atoms: `bounds` has their borders
// within this rank's columns, and atoms first..first + atoms - 1 of `total` are this rank's. Each atom is accumulated in
// float32 in the order of k; atoms are combined by the binary tree over 0..total - 1 that splits at the largest power of two.
struct Packed;

int64_t packed_n(const Packed&);
int64_t packed_subtrees(const Packed&);  // maximal subtrees in this rank's run of atoms: partial sums per output element
bool packed_scaled(const Packed&);       // int8: outputs must be multiplied by scale[n], after the tree
const float* packed_scale(const Packed&);  // null where it is not scaled
// Row n of the weight as a tensor of `out_type`, [k] (an embedding tied to the output layer).
void packed_row(const Packed&, int64_t n, DType out_type, void* out);
// Rows [0, m) of `a` (type `at`, row stride lda) times W^T, float32, subtree s at out + s * out_subtree_stride, row stride
// ldo. All threads of the team call it; contains no barrier and needs one after it. Scales are not applied.
void gemm_partials(const Packed& w, const void* a, DType at, int64_t lda, int64_t m, float* out, int64_t ldo, int64_t out_subtree_stride, Lane& lane);

// What follows the tree, wherever the tree ends (here, or in a collective): scale and bias of 16 outputs, either may be null.
LS_INLINE f32x16 finish(f32x16 sum, const float* scale, const float* bias) {
  if (!scale) return bias ? sum + load(bias) : sum;
  return bias ? fma(sum, load(scale), load(bias)) : sum * load(scale);
}

}  // namespace lockstep
