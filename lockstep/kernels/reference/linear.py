"""The packed linear kernel in plain torch: the same atoms, the same tree, float32 (csrc/linear.h).

Sums over k within an atom are torch's, so they agree with the kernels' up to float32 rounding, not bit for bit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.nn import functional as F

ACTIVATIONS: tuple[Callable[[Tensor], Tensor], ...] = (F.silu, lambda x: F.gelu(x, approximate="tanh"), F.gelu)  # by op_gated's code


def int8_scale(weight: Tensor) -> Tensor:
    """Float32 scales `[n]` of a weight `[n, k]`: a row's largest magnitude becomes 127; 0 for a row of zeros."""
    return weight.abs().amax(dim=1).float() / 127


def quantize_int8(weight: Tensor, scale: Tensor) -> Tensor:
    """`weight [n, k]` as int8 `[n, k]` in steps of `scale [n]` (of the whole row, where `weight` is a rank's columns of it)."""
    steps = torch.where(scale[:, None] > 0, weight.float() / scale[:, None], 0.0)
    return steps.round().clamp(-127, 127).to(torch.int8)


def partial_sums(x: Tensor, weight: Tensor, bounds: Sequence[int] | None = None, first: int = 0, total: int | None = None) -> Tensor:
    """x `[m, k]` times weight `[n, k]` transposed: the maximal subtrees' sums `[subtrees, m, n]`, float32.

    Atom i of this run is columns [bounds[i], bounds[i + 1]); it is atom `first + i` of `total`.
    """
    bounds = (0, weight.shape[1]) if bounds is None else bounds
    stop = first + len(bounds) - 1
    total = stop if total is None else total
    found: list[Tensor] = []

    def node(lo: int, hi: int, inside: bool) -> Tensor | None:
        if hi <= first or stop <= lo:
            return None
        whole = first <= lo and hi <= stop
        if hi - lo == 1:
            columns = slice(bounds[lo - first], bounds[hi - first])
            result = x[:, columns].float() @ weight[:, columns].float().T
        else:
            mid = lo + (1 << ((hi - lo - 1).bit_length() - 1))
            left, right = node(lo, mid, inside or whole), node(mid, hi, inside or whole)
            if not (inside or whole):
                return None
            assert left is not None and right is not None
            result = left + right
        if whole and not inside:
            found.append(result)
        return result

    node(0, total, False)
    return torch.stack(found)


def finish(sums: Tensor, scale: Tensor | None = None, bias: Tensor | None = None) -> Tensor:
    """What follows the tree: `sums * scale + bias`, float32."""
    if scale is not None:
        sums = sums * scale
    return sums if bias is None else sums + bias.float()


def linear(
    x: Tensor, weight: Tensor, bias: Tensor | None = None, *, bounds: Sequence[int] | None = None, scale: Tensor | None = None
) -> Tensor:
    """op_linear: `[m, k] -> [m, n]`, float32 (the kernel then rounds once to the type it stores)."""
    (sums,) = partial_sums(x, weight, bounds)
    return finish(sums, scale, bias)


def gated(
    x: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    activation: int = 0,
    bounds: Sequence[int] | None = None,
    scale: Tensor | None = None,
) -> Tensor:
    """op_gated: `[m, k] -> [m, n / 2]`, act(gate) * up in float32; rows [0, n / 2) of the weight are gate."""
    gate, up = linear(x, weight, bias, bounds=bounds, scale=scale).chunk(2, dim=1)
    return ACTIVATIONS[activation](gate) * up
