"""How the reference backend reads the cache: decode rows in padded chunks, prefill rows in tiles. Numpy, once a step.

Decode (one query token a row). Rows are sorted by how many blocks they read and cut into chunks, so that a chunk's
padding stays bounded and its gathered keys and values fit a cache-sized workspace.
Prefill (more than one). A row reads its own new keys when it has no cached prefix, else all its blocks; its queries are
cut into tiles where a mask is needed, so that the mask stays small and a window skips what it cannot see.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from lockstep.attention.batch import AttentionBatch, to_device

Flags = npt.NDArray[np.bool_]

PADDING = 1.25  # most blocks gathered per block needed, beside a few
TILE = 512  # queries that share one mask


@dataclass(frozen=True)
class DecodeChunk:
    """Rows [start, stop) of the plan. blocks `[rows * blocks per row]`, mask `[rows, 1, 1, tokens]` (0 or -inf) or None."""

    start: int
    stop: int
    blocks: Tensor
    mask: Tensor | None


@dataclass(frozen=True)
class DecodePlan:
    """token_index `[rows]`: where in `[tokens]` the plan's rows stand; None when they are all the tokens, in order."""

    rows: int
    token_index: Tensor | None
    chunks: list[DecodeChunk]


@dataclass(frozen=True)
class Tile:
    """Queries [q0, q1) of a row over its keys [k0, k1): `causal` from the first one, or by `mask [queries, keys]`."""

    q0: int
    q1: int
    k0: int
    k1: int
    causal: bool
    mask: Tensor | None


@dataclass(frozen=True)
class PrefillRow:
    """Tokens [start, stop) of the step. Keys are the new ones, or (blocks not None) those of these blocks."""

    start: int
    stop: int
    blocks: Tensor | None
    tiles: list[Tile]


def decode_plan(batch: AttentionBatch, window: int | None, block_bytes: int, workspace_bytes: int, dtype: torch.dtype) -> DecodePlan | None:
    """The plan of the rows with one query token; None when there are none."""
    rows = np.flatnonzero(batch.query_lens == 1)
    if not len(rows):
        return None
    bs, lens = batch.block_size, batch.seq_lens[rows]
    first = np.zeros_like(lens) if window is None else np.maximum(lens - window, 0) // bs
    needs = -(-lens // bs) - first
    order = np.argsort(needs, kind="stable")
    rows, lens, first, needs = rows[order], lens[order], first[order], needs[order]
    chunks = []
    for start, stop in _cut(needs.tolist(), max(1, workspace_bytes // block_bytes)):
        part = slice(start, stop)
        index = first[part, None] + np.arange(int(needs[stop - 1]))
        mine = index < (first + needs)[part, None]
        # Padding reads the row's own first block: its values are real, and masked.
        blocks = np.take_along_axis(batch.block_tables[rows[part]], np.where(mine, index, first[part, None]), axis=1)
        at = (first[part] * bs)[:, None] + np.arange(index.shape[1] * bs)
        seen = at < lens[part, None]
        if window is not None:
            seen &= at >= lens[part, None] - window
        mask = None if seen.all() else _additive(seen[:, None, None, :], batch.device, dtype)
        chunks.append(DecodeChunk(start, stop, to_device(blocks.reshape(-1), batch.device), mask))
    tokens = batch.query_start[rows]
    in_order = len(rows) == batch.num_tokens and bool((tokens == np.arange(len(rows))).all())
    return DecodePlan(len(rows), None if in_order else to_device(tokens, batch.device), chunks)


def _cut(needs: list[int], room: int) -> list[tuple[int, int]]:
    """Cut ascending block counts into runs that fit `room` blocks when padded to their last, with bounded padding."""
    cuts, start, used = [], 0, 0
    for i, need in enumerate(needs):
        padded = (i - start + 1) * need
        if i > start and (padded > room or padded > PADDING * (used + need) + 8):
            cuts.append((start, i))
            start, used = i, 0
        used += need
    cuts.append((start, len(needs)))
    return cuts


def prefill_plan(batch: AttentionBatch, window: int | None, dtype: torch.dtype, tile: int, flat_causal: bool) -> list[PrefillRow]:
    """The plan of each row with more than one query token. `flat_causal`: one causal tile will do where nothing is cached."""
    plan = []
    for row in np.flatnonzero(batch.query_lens > 1).tolist():
        start, count, length = int(batch.query_start[row]), int(batch.query_lens[row]), int(batch.seq_lens[row])
        prefix = length - count
        if prefix == 0 and flat_causal and (window is None or count <= window):
            plan.append(PrefillRow(start, start + count, None, [Tile(0, count, 0, count, True, None)]))
            continue
        base, blocks = 0, None
        if prefix:
            first = 0 if window is None else max(prefix + 1 - window, 0) // batch.block_size
            base = first * batch.block_size
            blocks = to_device(batch.block_tables[row, first : -(-length // batch.block_size)], batch.device)
        tiles = []
        for q0 in range(0, count, tile):
            q1 = min(q0 + tile, count)
            low, seen = _seen(prefix + q0, prefix + q1, window)
            tiles.append(Tile(q0, q1, low - base, prefix + q1 - base, False, _additive(seen, batch.device, dtype)))
        plan.append(PrefillRow(start, start + count, blocks, tiles))
    return plan


def _seen(first: int, stop: int, window: int | None) -> tuple[int, Flags]:
    """For queries at positions [first, stop): the first key any of them sees, and `[queries, keys]` from there to stop."""
    low = 0 if window is None else max(first + 1 - window, 0)
    query, key = np.arange(first, stop)[:, None], np.arange(low, stop)[None, :]
    seen: Flags = key <= query
    return low, seen if window is None else seen & (key > query - window)


def _additive(seen: Flags, device: torch.device, dtype: torch.dtype) -> Tensor:
    """0 where seen, -inf elsewhere. SDPA turns a boolean mask into this on every call; here it is done once a step."""
    hidden = to_device(~seen, device)
    return torch.zeros(hidden.shape, dtype=dtype, device=device).masked_fill_(hidden, float("-inf"))
