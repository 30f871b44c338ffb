"""Rotary embedding and attention in plain torch over keys and values as they are, not paged: what the kernels must compute."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def angles(positions: Tensor, inv_freq: Tensor) -> Tensor:
    """Cosines, then sines of `positions [tokens]` times `inv_freq [half]`: `[tokens, 2 * half]` float32."""
    found = positions.to(torch.float32).unsqueeze(-1) * inv_freq
    return torch.cat([found.cos(), found.sin()], dim=-1)


def rope(x: Tensor, cos_sin: Tensor) -> Tensor:
    """Rotate the first dims of `x [tokens, heads, head_dim]` by `cos_sin [tokens, 2 * half]`: float32, rounded once."""
    cos, sin = cos_sin.unsqueeze(1).chunk(2, dim=-1)
    half = cos.shape[-1]
    first, second = x[..., :half].float(), x[..., half : 2 * half].float()
    return torch.cat([first * cos - second * sin, second * cos + first * sin, x[..., 2 * half :].float()], dim=-1).to(x.dtype)


def attention(
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    positions: Tensor,
    kv_of_q: Sequence[int],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Tensor:
    """`q [tokens, num_q, head_dim]` at `positions` of one row over its `keys, values [length, num_kv, head_dim]`, like q.

    Scores and softmax in float32. A query at p sees the keys at [p - window + 1, p], all up to p without a window.
    """
    heads = torch.tensor(list(kv_of_q))
    k, v = keys.float()[:, heads], values.float()[:, heads]
    scores = torch.einsum("qhd,khd->hqk", q.float(), k) * scale
    if softcap:
        scores = softcap * torch.tanh(scores / softcap)
    ages = positions.unsqueeze(1) - torch.arange(keys.shape[0])
    seen = ages >= 0
    if window:
        seen &= ages < window
    weights = scores.masked_fill(~seen, -torch.inf).softmax(-1)
    return torch.einsum("hqk,khd->qhd", weights, v).to(q.dtype)
