"""A weight in the order in which the CPU kernels read it (csrc/packed.h)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lockstep.kernels.library import DTYPE_CODES, library


def dtype_code(dtype: torch.dtype) -> int:
    """The kernels' number for a torch type."""
    return DTYPE_CODES[str(dtype).removeprefix("torch.")]


class PackedLinear:
    """A copy of `weight [n, k]`, packed; the source is not kept.

    bounds: borders of the atoms in which k is summed (default: one atom); they are atoms first, first + 1, ... of `total`.
    gated: rows [0, n / 2) are gates, the others go up. scale `[n]` float32: pack as int8, row i divided by scale[i].
    Activations have the weight's type.
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
        lib: Any = None,
    ) -> None:
        self._lib: Any = lib or library()
        assert self._lib is not None, "packing needs the kernel library"
        n, k = weight.shape
        assert weight.stride(1) == 1, "the rows of a weight are contiguous"
        borders = np.array([0, k] if bounds is None else bounds, np.int64)
        assert borders[0] == 0 and borders[-1] == k and (np.diff(borders) > 0).all(), f"bounds {borders.tolist()} do not cut {k} columns"
        self.shape, self.dtype = (n, k), weight.dtype
        self.int8 = scale is not None
        scale = None if scale is None else scale.float().contiguous()
        code = dtype_code(weight.dtype)
        self.handle: int = self._lib.packed_new(
            weight.data_ptr(),
            code,
            n,
            k,
            weight.stride(0),
            DTYPE_CODES["int8"] if self.int8 else code,
            code,
            borders.ctypes.data,
            len(borders),
            first,
            len(borders) - 1 if total is None else total,
            gated,
            None if scale is None else scale.data_ptr(),
        )

    @property
    def nbytes(self) -> int:
        return int(self._lib.packed_bytes(self.handle))

    @property
    def subtrees(self) -> int:
        """Partial sums per output: maximal subtrees in this run of atoms."""
        return int(self._lib.packed_subtrees_of(self.handle))

    @property
    def scale_ptr(self) -> int:
        """Address of the int8 scales; 0 without."""
        return int(self._lib.packed_scale_of(self.handle))

    def row(self, index: int) -> Tensor:
        """Row `index` `[k]` as before packing (int8: as the quantised number stands for)."""
        out = torch.empty(self.shape[1], dtype=self.dtype)
        self._lib.packed_row_to(self.handle, index, dtype_code(self.dtype), out.data_ptr())
        return out

    def tobytes(self) -> bytes:
        """All rows, for digests."""
        return b"".join(self.row(i).view(torch.uint8).numpy().tobytes() for i in range(self.shape[0]))

    def partials(self, x: Tensor) -> Tensor:
        """`x [rows, k]` -> `[subtrees, rows, n]` float32, int8 scales not applied."""
        x = x.contiguous()
        out = torch.empty((self.subtrees, x.shape[0], self.shape[0]))
        self._lib.linear_partials(self.handle, x.data_ptr(), dtype_code(x.dtype), x.shape[1], x.shape[0], out.data_ptr())
        return out

    def __del__(self) -> None:
        if hasattr(self, "handle"):
            self._lib.packed_free(self.handle)
