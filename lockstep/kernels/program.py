"""A model step as one list of C++ operations: build it once, run it with one call per step (csrc/program.h)."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import numpy.typing as npt
from torch import Tensor

I64 = npt.NDArray[np.int64]
I32 = npt.NDArray[np.int32]


class StepArgs:
    """What a program reads anew in each step. Keeps the arrays of the last `set` alive."""

    def __init__(self, lib: Any) -> None:
        self._lib = lib
        self.handle: int = lib.step_new()
        self.tokens = self.wanted = 0
        self._kept: tuple[Any, ...] = ()

    def set_rows(self, tokens: int, ids: Tensor | None = None) -> None:
        """`tokens` rows of activations, and nothing about requests: for programs without attention."""
        self.tokens = self.wanted = tokens
        self._kept = (ids,)
        self._lib.step_set(self.handle, tokens, None if ids is None else ids.data_ptr(), None, None, 0, None, None, None, 0, None, 0)

    def set(
        self,
        *,
        ids: Tensor | None,
        query_lens: I64,
        seq_lens: I64,
        block_tables: npt.NDArray[Any],
        block_size: int,
        wanted: I64 | None = None,
    ) -> None:
        """ids `[tokens]` int64; query_lens (tokens computed now), seq_lens (in the KV cache afterwards) `[rows]` int64; block_tables
        `[rows, blocks]`.

        wanted: the tokens that a program with `narrow` computes to the end, strictly ascending, at least one; None: all. Raises
        ValueError for a row that computes none, or more than it has, or has too few blocks.
        """
        tables = np.ascontiguousarray(block_tables, np.int32)
        query_lens, seq_lens = np.ascontiguousarray(query_lens), np.ascontiguousarray(seq_lens)
        self.tokens = int(query_lens.sum())
        if wanted is not None:
            wanted = np.ascontiguousarray(wanted, np.int64)
            assert len(wanted) and wanted[0] >= 0 and wanted[-1] < self.tokens and (np.diff(wanted) > 0).all(), wanted
        self.wanted = self.tokens if wanted is None else len(wanted)
        self._kept = (ids, query_lens, seq_lens, tables, wanted)
        self._lib.step_set_rows(
            self.handle,
            None if ids is None else ids.data_ptr(),
            len(seq_lens),
            query_lens.ctypes.data,
            seq_lens.ctypes.data,
            tables.ctypes.data,
            tables.shape[1],
            block_size,
            None if wanted is None else wanted.ctypes.data,
            0 if wanted is None else len(wanted),
        )

    def __del__(self) -> None:
        self._lib.step_free(self.handle)


class Program:
    """Operations in order, with names. `keep` holds whatever their pointers point to."""

    def __init__(self, lib: Any) -> None:
        self._lib = lib
        self._handle: int = lib.program_new()
        self._kept: list[Any] = []
        self._stops: dict[int, Callable[[int], None]] = {}
        self._narrow: int | None = None
        self.names: list[str] = []

    def add(self, name: str, op: int) -> None:
        """Append an operation that one of the library's `op_*` functions made; the program owns it from now on."""
        self._lib.program_add(self._handle, op, name)
        self.names.append(name)

    def add_stop(self, name: str, do: Callable[[int], None]) -> None:
        """Append a place where Python acts: `do(tokens)` is called between the operations before and after."""
        self._stops[len(self.names)] = do
        self.add(name, self._lib.op_stop())

    def narrow(self, name: str, a: Tensor, b: Tensor) -> None:
        """From here on only the step's wanted tokens are computed: their rows of these two buffers move to the front."""
        self._narrow = len(self.names)
        self.add(name, self._lib.op_narrow(a.data_ptr(), a.stride(0) * a.itemsize, b.data_ptr(), b.stride(0) * b.itemsize))

    def keep(self, *things: Any) -> None:
        """Hold `things` as long as the program lives."""
        self._kept += things

    def run(self, step: StepArgs) -> None:
        """Run all operations. Raises RuntimeError when a peer died or is late in a collective."""
        at = self._lib.program_run(self._handle, step.handle, 0)
        while at >= 0:
            self._stops[at](step.tokens if self._narrow is None or at < self._narrow else step.wanted)
            at = self._lib.program_run(self._handle, step.handle, at + 1)

    def timed(self, on: bool) -> None:
        """Record when each operation of the next runs begins and ends."""
        self._lib.program_timed(self._handle, int(on))

    def clocks(self) -> tuple[npt.NDArray[np.float64], npt.NDArray[np.float64]]:
        """When each operation of the last timed run began and when it ended, 0 where it was not in it; see `times`."""
        began, ended = np.zeros(len(self.names)), np.zeros(len(self.names))
        self._lib.program_times(self._handle, began.ctypes.data, ended.ctypes.data)
        return began, ended

    def times(self) -> list[tuple[str, float, float]]:
        """(name, began, ended) of each operation in the last timed run, seconds of time.monotonic()."""
        began, ended = self.clocks()
        return [(n, b, e) for n, b, e in zip(self.names, began.tolist(), ended.tolist(), strict=True) if e > 0]

    def __del__(self) -> None:
        self._lib.program_free(self._handle)
