"""One step's rows as attention sees them: where keys and values go, and which cached ones each row reads.

Built once per step from plain lists or numpy arrays, shared by all layers. What only some layers need (the plan of a
sliding window, say) is made when the first of them asks, and kept for the others.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

I64 = npt.NDArray[np.int64]
Ints = Sequence[int] | npt.NDArray[Any]
T = TypeVar("T")


@dataclass(eq=False)
class AttentionBatch:
    """Row i computes `query_lens[i]` tokens, the last of the `seq_lens[i]` tokens that its KV cache holds afterwards.

    Host side (numpy): query_lens, seq_lens `[rows]`, query_start `[rows + 1]`, given_tables `[rows, blocks]`, of any integers.
    What follows from these is made when it is first asked for; the CPU kernels work it out by themselves.
    """

    query_lens: I64
    seq_lens: I64
    query_start: I64
    given_tables: npt.NDArray[Any]
    block_size: int
    device: torch.device
    _cache: dict[Hashable, Any] = field(default_factory=dict, repr=False)

    @classmethod
    def build(
        cls,
        query_lens: Ints,
        seq_lens: Ints,
        block_tables: Sequence[Sequence[int]] | npt.NDArray[Any] | Tensor,
        block_size: int,
        device: torch.device | str = "cpu",
    ) -> AttentionBatch:
        """The batch of these rows. A block table must hold at least `ceil(seq_len / block_size)` blocks; more are not read."""
        queries, seqs = np.asarray(query_lens, np.int64), np.asarray(seq_lens, np.int64)
        tables = _as_table(block_tables)
        rows = len(queries)
        assert len(seqs) == rows and len(tables) == rows, f"{rows} query lengths, {len(seqs)} lengths, {len(tables)} block tables"
        assert (queries >= 1).all() and (queries <= seqs).all(), "a row computes at least one token and at most its length"
        longest = int(seqs.max(initial=0))
        assert longest <= tables.shape[1] * block_size, f"a row of {longest} tokens has only {tables.shape[1]} blocks of {block_size}"
        start = np.zeros(rows + 1, np.int64)
        np.cumsum(queries, out=start[1:])
        return cls(queries, seqs, start, tables, block_size, torch.device(device))

    @cached_property
    def block_tables(self) -> I64:
        """`[rows, blocks]`, host side."""
        return self.given_tables.astype(np.int64, copy=False)

    @cached_property
    def _owners(self) -> tuple[I64, I64]:
        """Of each token its row, and its position in its request."""
        first = self.seq_lens - self.query_lens
        if self.num_tokens == self.num_rows:  # decode only: one token a row
            return np.arange(self.num_rows), first
        owner = np.repeat(np.arange(self.num_rows), self.query_lens)
        return owner, np.arange(self.num_tokens) - np.repeat(self.query_start[:-1] - first, self.query_lens)

    @cached_property
    def positions(self) -> Tensor:
        """`[tokens]`, on the device."""
        return to_device(self._owners[1], self.device)

    @cached_property
    def slot_mapping(self) -> Tensor:
        """`[tokens]`, on the device: block * block_size + offset."""
        owner, positions = self._owners
        slots = self.block_tables[owner, positions // self.block_size] * self.block_size + positions % self.block_size
        return to_device(slots, self.device)

    @cached_property
    def fresh_blocks(self) -> Tensor | None:
        """`[blocks]`, on the device: those whose first slot is written in this step and whose last is not; None: there is none."""
        blocks = -(-self.seq_lens // self.block_size)
        partly, begun = self.seq_lens % self.block_size != 0, (blocks - 1) * self.block_size >= self.seq_lens - self.query_lens
        fresh = np.flatnonzero(partly & begun)
        return to_device(self.block_tables[fresh, blocks[fresh] - 1], self.device) if len(fresh) else None

    @property
    def num_rows(self) -> int:
        return len(self.query_lens)

    @property
    def num_tokens(self) -> int:
        return int(self.query_start[-1])

    def shared(self, key: Hashable, make: Callable[[AttentionBatch], T]) -> T:
        """What `make(self)` returned for this key first: plans are made once a step, not once a layer."""
        found = self._cache.get(key)
        if found is None:
            found = self._cache[key] = make(self)
        return found


def to_device(array: npt.NDArray[Any], device: torch.device) -> Tensor:
    """A tensor with the array's values on `device`; on the CPU it may share the array's memory."""
    return torch.from_numpy(np.ascontiguousarray(array)).to(device, non_blocking=True)


def _as_table(block_tables: Sequence[Sequence[int]] | npt.NDArray[Any] | Tensor) -> npt.NDArray[Any]:
    """`[rows, blocks]`, ragged lists padded with block 0."""
    if isinstance(block_tables, Tensor):
        return block_tables.cpu().numpy()
    if isinstance(block_tables, np.ndarray):
        return block_tables
    lens = np.fromiter(map(len, block_tables), np.int64, len(block_tables))
    table = np.zeros((len(lens), int(lens.max(initial=0))), np.int64)
    flat = np.fromiter((block for row in block_tables for block in row), np.int64, int(lens.sum()))
    table[np.arange(table.shape[1]) < lens[:, None]] = flat
    return table
