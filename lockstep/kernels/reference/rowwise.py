"""Norms, residual additions and gated activations in plain torch: what the kernels must compute."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional as F


def norm(x: Tensor, weight: Tensor, eps: float, plus_one: bool) -> Tensor:
    """RMS norm over the last dim of `x [..., width]`, like x: float32 inside; rounded before the weight unless plus_one."""
    wide = x.float()
    wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + eps)
    if plus_one:
        return (wide * (1.0 + weight.float())).to(x.dtype)
    return wide.to(x.dtype) * weight


def add_norm(delta: Tensor, residual: Tensor, weight: Tensor, eps: float, plus_one: bool) -> tuple[Tensor, Tensor]:
    """(normed sum, sum) of `delta` and `residual [tokens, width]`: the sum is rounded, then normed."""
    total = (delta.float() + residual.float()).to(residual.dtype)
    return norm(total, weight, eps, plus_one), total


def gated_act(x: Tensor, activation: int) -> Tensor:
    """`act(gate) * up` of `x [..., gate | up]`, float32 inside, rounded once. 0 silu, 1 gelu by tanh, 2 gelu by erf."""
    gate, up = x.float().chunk(2, dim=-1)
    acted = F.silu(gate) if activation == 0 else F.gelu(gate, approximate="tanh" if activation == 1 else "none")
    return (acted * up).to(x.dtype)
