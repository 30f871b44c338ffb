// Gated activations of the MLP, 16 lanes at a time, float32 inside. The numbers are known to layers/activation.py.
#pragma once
#include "simd.h"

namespace lockstep {

// act(gate) * up. kind: 0 silu, 1 gelu with the tanh approximation, 2 gelu with the error function.
LS_INLINE f32x16 activate(f32x16 gate, f32x16 up, int kind) {
  if (kind == 0) return gate / (1.f + vexp(-gate)) * up;
  if (kind == 1) {
    f32x16 cubic = gate * gate * gate;
    f32x16 inner = (gate + 0.044715f * cubic) * 0.7978845608028654f;
    return 0.5f * gate * (1.f + vtanh(inner)) * up;
  }
  f32x16 erf;
  for (int i = 0; i < W; i++) erf[i] = std::erf(gate[i] * 0.7071067811865476f);
  return 0.5f * gate * (1.f + erf) * up;
}

}  // namespace lockstep
