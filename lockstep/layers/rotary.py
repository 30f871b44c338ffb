"""Rotary position embedding (Su et al. 2021, RoFormer), half-split layout, with linear and Llama-3 scaling.

The angles of a step are the same in every layer: compute them once with `cos_sin` and hand them to `apply_rotary`. No
table over all positions is kept (64 MiB a rank at 128k positions).
"""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from lockstep.config.model_spec import RopeSpec


def inverse_frequencies(rotary_dim: int, rope: RopeSpec, device: torch.device | str | None = None) -> Tensor:
    """Angle per position of each rotated pair, `[rotary_dim / 2]` float32. Raises ValueError for an unknown rope type."""
    exponents = torch.arange(0, rotary_dim, 2, dtype=torch.int64).to(dtype=torch.float32) / rotary_dim
    inv_freq = 1.0 / (rope.theta**exponents)
    if rope.type == "linear":
        inv_freq = inv_freq / rope.factor
    elif rope.type == "llama3":
        inv_freq = _llama3_scaled(inv_freq, rope)
    elif rope.type != "default":
        raise ValueError(f"rope type {rope.type!r} is not supported: use default, linear or llama3.")
    return inv_freq.to(device)


def _llama3_scaled(inv_freq: Tensor, rope: RopeSpec) -> Tensor:
    """Llama 3.1's scaling: long wavelengths are stretched by `factor`, short ones kept, those between blended."""
    trained = rope.original_max_position_embeddings
    if trained <= 0 or rope.high_freq_factor <= rope.low_freq_factor:
        raise ValueError(
            f"rope type llama3 needs original_max_position_embeddings > 0 (is {trained}) and high_freq_factor"
            f" ({rope.high_freq_factor}) above low_freq_factor ({rope.low_freq_factor}): correct rope_scaling in config.json."
        )
    wavelength = 2 * math.pi / inv_freq
    stretched = inv_freq / rope.factor
    blend = (trained / wavelength - rope.low_freq_factor) / (rope.high_freq_factor - rope.low_freq_factor)
    between = (1 - blend) * stretched + blend * inv_freq
    longest_kept, shortest_stretched = trained / rope.high_freq_factor, trained / rope.low_freq_factor
    scaled = torch.where(wavelength > shortest_stretched, stretched, inv_freq)
    return torch.where((wavelength >= longest_kept) & (wavelength <= shortest_stretched), between, scaled)


def apply_rotary(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    """Rotate `x [tokens, heads, head_dim]` by `cos`, `sin` `[tokens, 1, rotary_dim / 2]`; dims past rotary_dim pass through.

    Computed in float32, returned in x's dtype. x is not changed.
    """
    half = cos.shape[-1]
    first, second = x[..., :half], x[..., half : 2 * half]
    parts = [first * cos - second * sin, second * cos + first * sin]
    if x.shape[-1] > 2 * half:
        parts.append(x[..., 2 * half :].to(cos.dtype))
    return torch.cat(parts, dim=-1).to(x.dtype)


class RotaryEmbedding(nn.Module):
    """The rotation of one layer kind. `rotary_dim` defaults to the whole head."""

    def __init__(self, head_dim: int, rope: RopeSpec, *, rotary_dim: int | None = None, device: torch.device | str | None = None) -> None:
        super().__init__()
        self.head_dim = head_dim
        self.rotary_dim = head_dim if rotary_dim is None else rotary_dim
        if self.rotary_dim % 2 or not 0 < self.rotary_dim <= head_dim:
            raise ValueError(f"rotary_dim={self.rotary_dim} must be even, positive and at most head_dim={head_dim}.")
        self.inv_freq = inverse_frequencies(self.rotary_dim, rope, device)

    def cos_sin(self, positions: Tensor) -> tuple[Tensor, Tensor]:
        """Cosines and sines of `positions [tokens]`, each `[tokens, 1, rotary_dim / 2]` float32: the same for every layer."""
        angles = (positions.to(torch.float32).unsqueeze(-1) * self.inv_freq).unsqueeze(1)
        return angles.cos(), angles.sin()

    def forward(self, positions: Tensor, q: Tensor, k: Tensor) -> tuple[Tensor, Tensor]:
        """q and k `[tokens, heads, head_dim]` rotated to `positions [tokens]`."""
        cos, sin = self.cos_sin(positions)
        return apply_rotary(q, cos, sin), apply_rotary(k, cos, sin)
