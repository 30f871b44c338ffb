// Gated activations of the MLP: act(gate) * up, for 16 lanes, float32 inside.
#pragma once
#include "simd.h"

namespace lockstep {

enum class Activation : int { SILU = 0, GELU_TANH = 1, GELU_ERF = 2 };

// The normal distribution's tail beyond x >= 0, relative error below 2e-7 before rounding: exp(-x^2 / 2) times a polynomial in
// 1 / (1 + 0.3 x), fitted by least squares, weighted until the error was even.
LS_INLINE f32x16 normal_tail(f32x16 x) {
  f32x16 t = 1.f / fma(x, splat(0.3f), splat(1.f));
  f32x16 p = splat(0.035423763f);
  p = fma(p, t, splat(-0.156158566f));
  p = fma(p, t, splat(0.204556972f));
  p = fma(p, t, splat(-0.052034173f));
  p = fma(p, t, splat(0.12769185f));
  p = fma(p, t, splat(0.100175925f));
  p = fma(p, t, splat(0.120712139f));
  p = fma(p, t, splat(0.119632006f));
  return p * t * vexp(x * x * -0.5f);
}

LS_INLINE f32x16 silu(f32x16 x) { return x / (1.f + vexp(-x)); }

// 0.5 x (1 + tanh(u)) = x / (1 + exp(-2u)), which does not cancel for negative x.
LS_INLINE f32x16 gelu_tanh(f32x16 x) {
  f32x16 u2 = x * fma(x * x, splat(0.0713548162726f), splat(1.59576912161f));  // 2 sqrt(2 / pi) (x + 0.044715 x^3)
  return x / (1.f + vexp(-u2));
}

LS_INLINE f32x16 gelu_erf(f32x16 x) {
  f32x16 tail = normal_tail(x < 0.f ? -x : x);
  return x * (x < 0.f ? tail : 1.f - tail);
}

LS_INLINE f32x16 activate(f32x16 gate, f32x16 up, Activation kind) {
  f32x16 act = kind == Activation::SILU ? silu(gate) : kind == Activation::GELU_TANH ? gelu_tanh(gate) : gelu_erf(gate);
  return act * up;
}
LS_INLINE f32x16 activate(f32x16 gate, f32x16 up, int kind) { return activate(gate, up, Activation(kind)); }

}  // namespace lockstep
