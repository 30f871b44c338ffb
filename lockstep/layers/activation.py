"""Gated activations of the MLP: `[..., gate | up] -> act(gate) * up`, half as wide."""

from __future__ import annotations

from collections.abc import Callable

from torch import Tensor
from torch.nn import functional as F


def silu_and_mul(x: Tensor) -> Tensor:
    """`silu(gate) * up` (SwiGLU, Shazeer 2020)."""
    gate, up = x.chunk(2, dim=-1)
    return F.silu(gate).mul_(up)


def gelu_tanh_and_mul(x: Tensor) -> Tensor:
    """`gelu(gate) * up` with the tanh approximation (Gemma)."""
    gate, up = x.chunk(2, dim=-1)
    return F.gelu(gate, approximate="tanh").mul_(up)


def gelu_and_mul(x: Tensor) -> Tensor:
    """`gelu(gate) * up` with the error function."""
    gate, up = x.chunk(2, dim=-1)
    return F.gelu(gate).mul_(up)


_BY_NAME = {
    "silu": silu_and_mul,
    "swish": silu_and_mul,
    "gelu": gelu_and_mul,
    "gelu_pytorch_tanh": gelu_tanh_and_mul,
    "gelu_new": gelu_tanh_and_mul,
}


def gated_activation(name: str) -> Callable[[Tensor], Tensor]:
    """The gated form of a checkpoint's `hidden_act`. Raises ValueError for one that is not known."""
    try:
        return _BY_NAME[name]
    except KeyError:
        raise ValueError(f"hidden_act={name!r} is not supported: use one of {', '.join(sorted(_BY_NAME))}.") from None


_CODES = {silu_and_mul: 0, gelu_tanh_and_mul: 1, gelu_and_mul: 2}  # csrc/activate.h


def activation_code(name: str) -> int:
    """The kernels' number for a checkpoint's `hidden_act`. Raises ValueError as `gated_activation` does."""
    return _CODES[gated_activation(name)]
