"""One step's rows as attention sees them: where keys and values go, and which cached ones each row reads.

Built once per step from plain lists or numpy arrays, shared by all layers. What only some layers need (the plan of a
sliding window, say) is made when the first of them asks, and kept for the others.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field
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

    Host side (numpy): query_lens, seq_lens `[rows]`, query_start `[rows + 1]`, block_tables `[rows, blocks]`.
    Device side: positions, slot_mapping `[tokens]` (slot = block * block_size + offset), fresh_blocks `[blocks]`: blocks
    whose first slot is written in this step and whose last is not, or None.
    """

    query_lens: I64
    seq_lens: I64
    query_start: I64
    block_tables: I64
    block_size: int
    device: torch.device
    positions: Tensor
    slot_mapping: Tensor
    fresh_blocks: Tensor | None
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
        blocks = -(-seqs // block_size)
        assert blocks.max(initial=0) <= tables.shape[1], f"a row of {seqs.max()} tokens has only {tables.shape[1]} blocks of {block_size}"
        start = np.concatenate([np.zeros(1, np.int64), np.cumsum(queries)])
        first = seqs - queries
        if start[-1] == rows:  # decode only: one token a row
            positions, owner = first, np.arange(rows)
        else:
            owner = np.repeat(np.arange(rows), queries)
            positions = np.arange(start[-1]) - np.repeat(start[:-1] - first, queries)
        slots = tables[owner, positions // block_size] * block_size + positions % block_size
        fresh = np.flatnonzero((seqs % block_size != 0) & ((blocks - 1) * block_size >= first))
        target = torch.device(device)
        return cls(
            query_lens=queries,
            seq_lens=seqs,
            query_start=start,
            block_tables=tables,
            block_size=block_size,
            device=target,
            positions=to_device(positions, target),
            slot_mapping=to_device(slots, target),
            fresh_blocks=to_device(tables[fresh, blocks[fresh] - 1], target) if len(fresh) else None,
        )

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


def _as_table(block_tables: Sequence[Sequence[int]] | npt.NDArray[Any] | Tensor) -> I64:
    """`[rows, blocks]` int64, ragged lists padded with block 0."""
    if isinstance(block_tables, Tensor):
        return block_tables.cpu().numpy().astype(np.int64, copy=False)
    if isinstance(block_tables, np.ndarray):
        return block_tables.astype(np.int64, copy=False)
    lens = np.fromiter(map(len, block_tables), np.int64, len(block_tables))
    table = np.zeros((len(lens), int(lens.max(initial=0))), np.int64)
    flat = np.fromiter((block for row in block_tables for block in row), np.int64, int(lens.sum()))
    table[np.arange(table.shape[1]) < lens[:, None]] = flat
    return table
