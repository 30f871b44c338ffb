"""A weight in the order in which the CPU kernels read it (csrc/packed.h), in memory of theirs."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lockstep.kernels.library import DTYPE_CODES, library
from lockstep.kernels.reference import linear as reference

_TYPES = (torch.float32, torch.bfloat16, torch.float16)


def dtype_code(dtype: torch.dtype) -> int:
    """The kernels' number for a torch type."""
    return DTYPE_CODES[str(dtype).removeprefix("torch.")]


class PackedLinear:
    """A copy of `weight [n, k]` (float32, bfloat16, float16), packed; the source is not kept.

    bounds: borders of the atoms in which k is summed (default: one atom); they are atoms first, first + 1, ... of `total`.
    gated: rows [0, n / 2) are gates, the others go up. scale `[n]` float32: pack as int8, row i divided by scale[i].
    dtype: what is stored, by default the weight's type, int8 where there is a scale; int8 without one makes its own.
    Activations may have any type, whatever the weight's. Raises ValueError for what cannot be packed.

    Operations made with `handle` refer to its memory: who holds them must hold this too.
    """

    def __init__(
        self,
        weight: Tensor,
        *,
        bounds: Sequence[int] | None = None,
        first: int = 0,
        total: int | None = None,
        gated: bool = False,
        scale: Tensor | None = None,
        dtype: torch.dtype | None = None,
        lib: Any = None,
    ) -> None:
        self._lib: Any = lib or library()
        assert self._lib is not None, "packing needs the kernel library"
        assert weight.dim() == 2 and weight.stride(1) == 1, "a weight is [n, k], its rows contiguous"
        n, k = weight.shape
        self.stored = dtype or (weight.dtype if scale is None else torch.int8)
        _check_types(weight, self.stored, scale)
        if self.stored is torch.int8 and scale is None:
            scale = reference.int8_scale(weight)
        scale = None if scale is None else scale.float().contiguous()
        self.shape, self.dtype, self.gated, self.scale = (n, k), weight.dtype, gated, scale
        self.bounds = (0, k) if bounds is None else tuple(bounds)
        self.first = first
        self.total = first + len(self.bounds) - 1 if total is None else total
        borders = torch.tensor(self.bounds, dtype=torch.int64)
        self.handle: int = self._lib.packed_new(
            weight.data_ptr(),
            dtype_code(weight.dtype),
            n,
            k,
            weight.stride(0),
            dtype_code(self.stored),
            borders.data_ptr(),
            len(self.bounds),
            first,
            self.total,
            gated,
            0 if scale is None else scale.data_ptr(),
        )

    @property
    def int8(self) -> bool:
        return self.scale is not None

    @property
    def nbytes(self) -> int:
        """What a step reads of it."""
        return int(self._lib.packed_bytes(self.handle))

    @property
    def subtrees(self) -> int:
        """Partial sums per output: maximal subtrees in this run of atoms."""
        return int(self._lib.packed_subtrees_of(self.handle))

    @property
    def scale_ptr(self) -> int:
        """Address of the int8 scales; 0 without."""
        return int(self._lib.packed_scale_of(self.handle))

    def row(self, index: int, dtype: torch.dtype | None = None) -> Tensor:
        """Row `index` `[k]` as before packing (int8: as the quantised number stands for)."""
        out = torch.empty(self.shape[1], dtype=dtype or self.dtype)
        self._lib.packed_row_to(self.handle, index, dtype_code(out.dtype), out.data_ptr())
        return out

    def tobytes(self) -> bytes:
        """All rows, for digests."""
        return b"".join(self.row(i).view(torch.uint8).numpy().tobytes() for i in range(self.shape[0]))

    def partials(self, x: Tensor) -> Tensor:
        """`x [rows, k]` -> `[subtrees, rows, n]` float32, int8 scales not applied."""
        assert x.dim() == 2 and x.shape[1] == self.shape[1] and x.stride(1) == 1, f"{tuple(x.shape)} are no rows of {self.shape[1]}"
        out = torch.empty((self.subtrees, x.shape[0], self.shape[0]))
        self._lib.linear_partials(self.handle, x.data_ptr(), dtype_code(x.dtype), x.stride(0), x.shape[0], out.data_ptr())
        return out

    def unpacked(self) -> Tensor:
        """The weight `[n, k]` as it is stored, float32; int8 times its scale."""
        return torch.stack([self.row(i, torch.float32) for i in range(self.shape[0])])

    def reference(self, x: Tensor) -> Tensor:
        """`partials` in plain torch, from the stored weight; int8 scales are applied."""
        return reference.partial_sums(x, self.unpacked(), self.bounds, self.first, self.total)

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            self._lib.packed_free(self.handle)


def _check_types(weight: Tensor, stored: torch.dtype, scale: Tensor | None) -> None:
    if weight.dtype not in _TYPES or stored not in (*_TYPES, torch.int8):
        raise ValueError(
            f"a weight of {weight.dtype} cannot be packed as {stored}: use one of {', '.join(map(str, _TYPES))}, stored also int8."
        )
    if scale is not None and (stored is not torch.int8 or scale.shape != weight.shape[:1]):
        raise ValueError(
            f"scale {tuple(scale.shape)} with a weight {tuple(weight.shape)} stored as {stored}: int8 takes one number per row."
        )
