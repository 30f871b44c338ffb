"""One packed product as a callable: the output head's logits."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from lockstep.kernels.library import DTYPE_CODES, library
from lockstep.kernels.packed import PackedLinear
from lockstep.kernels.program import Program, StepArgs


class Product:
    """`x [rows, k] -> x W^T [rows, n]` float32, unrounded. The result is a view that the next call overwrites."""

    def __init__(self, packed: PackedLinear) -> None:
        self._lib: Any = library()
        self._packed = packed
        self._step = StepArgs(self._lib)
        self._program: Program | None = None
        self._source = self._out = torch.empty(0)

    def __call__(self, x: Tensor) -> Tensor:
        rows = x.shape[0]
        if self._program is None or rows > self._out.shape[0] or x.dtype != self._source.dtype:
            self._program = self._build(rows, x.dtype)
        self._source[:rows] = x
        self._step.set_rows(rows)
        self._program.run(self._step)
        return self._out[:rows]

    @property
    def nbytes(self) -> int:
        """What it keeps now, for the most rows so far."""
        return self._source.nbytes + self._out.nbytes

    @staticmethod
    def bytes(rows: int, n: int, k: int, itemsize: int) -> int:
        """What calls with up to `rows` rows keep, with activations of `itemsize` bytes."""
        return _room(rows) * (4 * n + itemsize * k)

    def _build(self, rows: int, dtype: torch.dtype) -> Program:
        """Room for `rows` rows and some more, so that growing batches seldom come back here."""
        room = _room(rows)
        n, k = self._packed.shape
        self._source, self._out = torch.empty((room, k), dtype=dtype), torch.empty((room, n))
        program = Program(self._lib)
        program.keep(self._packed, self._source, self._out)
        code = DTYPE_CODES[str(dtype).removeprefix("torch.")]
        op = self._lib.op_linear(self._packed.handle, self._source.data_ptr(), k, code, self._out.data_ptr(), n, DTYPE_CODES["float32"], 0)
        program.add("product", op)
        return program


def _room(rows: int) -> int:
    return 1 << max(rows - 1, 0).bit_length()
