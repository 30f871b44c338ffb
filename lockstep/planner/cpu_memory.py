"""What a rank on CPU allocates, to the byte: weights as the kernels pack them, activations, batch state, shared memory.

A packed weight [n, k] lies in panels of 64 outputs (32 gates and their 32 ups, where it is gated); k is cut at the atoms of the
reduction tree, and each atom is filled up to the granule of the kernels: pairs of 16-bit and 8-bit weights, 32 on processors with
AMX (kernels/csrc/packed.h). int8 adds a float32 scale per output.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from lockstep.distributed.partition import atom_bounds, head_shard, shard, vocab_shard
from lockstep.planner.hardware import DTYPE_BYTES
from lockstep.planner.layout import Layout
from lockstep.planner.memory import kv_bytes_per_token, stages
from lockstep.planner.model import ModelShape

PANEL = 64  # packed.h
PAIR, AMX_GRANULE = 2, 32
SLOT_BYTES, RING_BYTES = 4 << 20, 1 << 20  # shared memory (distributed/communicators/segment.py), and a lone rank's own sums
HUGE_PAGE = 2 << 20


@dataclass(frozen=True)
class Matrix:
    """A weight as one rank packs it. cuts: borders of its atoms in k."""

    n: int
    cuts: Sequence[int]
    gated: bool = False
    narrow: bool = True  # int8 where the model is


def packed_bytes(matrix: Matrix, dtype: str, granule: int) -> int:
    """Bytes of a packed weight. granule: 2, or 32 with AMX; of 16-bit and 8-bit weights only."""
    step = granule if dtype in ("bfloat16", "int8") else 1
    width = sum(-(-(b - a) // step) * step for a, b in pairwise(matrix.cuts))
    panels = -(-matrix.n // 2 // (PANEL // 2)) if matrix.gated else -(-matrix.n // PANEL)
    return panels * width * PANEL * int(DTYPE_BYTES[dtype]) + (4 * matrix.n if dtype == "int8" else 0)


def layer_matrices(shape: ModelShape, tp: int, rank: int) -> list[Matrix]:
    """The four products of a dense layer."""
    heads, columns = head_shard(shape.num_heads, shape.num_kv_heads, tp, rank), shard(shape.intermediate_size, tp, rank)
    hidden, width = shape.hidden_size, shape.head_dim
    return [
        Matrix((heads.q.size + 2 * heads.kv.size) * width, (0, hidden)),
        Matrix(hidden, _atoms(shape.num_heads, tp, heads.q.start, heads.q.stop, width)),
        Matrix(2 * columns.size, (0, hidden), gated=True),
        Matrix(hidden, _atoms(shape.intermediate_size, tp, columns.start, columns.stop, 1)),
    ]


def _atoms(units: int, tp: int, start: int, stop: int, width: int) -> list[int]:
    return [(bound - start) * width for bound in atom_bounds(units, tp) if start <= bound <= stop]


def weight_bytes(
    shape: ModelShape, layout: Layout, stage: int = 0, rank: int = 0, *, how: str = "balanced", weight_dtype: str = "", granule: int = PAIR
) -> int:
    """Bytes of TP rank `rank` of pipeline stage `stage`, as `RankMemory.weight_bytes` reports them."""
    assert shape.moe is None and shape.mla is None, f"{shape.name}: the engine runs dense models"
    tp, hidden, item = layout.tp, shape.hidden_size, shape.itemsize
    first, last = stage == 0, stage == layout.pp - 1
    layer = sum(packed_bytes(m, weight_dtype or shape.dtype, granule) for m in layer_matrices(shape, tp, rank))
    rows = vocab_shard(shape.vocab_size, tp, rank).size
    total = stages(shape, layout.pp, how)[stage].size * (layer + _vectors(shape, tp, rank) * item)
    if first and not (last and shape.tied):
        total += rows * hidden * item
    if last:
        total += packed_bytes(Matrix(rows, (0, hidden)), shape.dtype, granule) + hidden * item
    return total


def _vectors(shape: ModelShape, tp: int, rank: int) -> int:
    """Norms and biases of a layer, elements."""
    heads = head_shard(shape.num_heads, shape.num_kv_heads, tp, rank)
    columns = shard(shape.intermediate_size, tp, rank).size
    found = shape.norms * shape.hidden_size + (2 * shape.head_dim if shape.qk_norm else 0)
    found += (heads.q.size + 2 * heads.kv.size) * shape.head_dim if shape.qkv_bias else 0
    found += shape.hidden_size if shape.out_bias else 0
    return found + (2 * columns + shape.hidden_size if shape.mlp_bias else 0)


@dataclass(frozen=True)
class StepSizes:
    """What bounds a step: tokens in it, requests in it at most (and so far), tokens of the longest one."""

    tokens: int
    slots: int
    rows: int
    length: int
    block_size: int = 16


def activation_bytes(shape: ModelShape, layout: Layout, stage: int, rank: int, sizes: StepSizes) -> int:
    """Buffers of the step's activations and rotations, and of the logits so far; they stay between steps."""
    tp, item = layout.tp, shape.itemsize
    heads, columns = head_shard(shape.num_heads, shape.num_kv_heads, tp, rank), shard(shape.intermediate_size, tp, rank).size
    widths = 2 * shape.hidden_size + (2 * heads.q.size + 2 * heads.kv.size) * shape.head_dim + columns
    tables = 2 if shape.spec and shape.spec.rope_local else 1
    found = sizes.tokens * (widths * item + tables * shape.head_dim * 4)
    if stage == layout.pp - 1:
        rows = vocab_shard(shape.vocab_size, tp, rank).size
        found += (1 << max(sizes.rows - 1, 0).bit_length()) * (4 * rows + shape.hidden_size * item)
    return found


def batch_bytes(sizes: StepSizes) -> int:
    """The batch state: known tokens and block tables of every slot."""
    return 4 * sizes.slots * (sizes.length + -(-sizes.length // sizes.block_size))


def exchange_bytes(layout: Layout) -> int:
    """A rank's part of the shared memory of its groups: two slots for each rank, and a ring for each pair (kernels/csrc/comm_shm.cpp).

    All ranks of a replica are a group, and so are those of a stage, and those of a pipeline. A rank without a TP group sums alone.
    """
    groups = [size for size in (layout.tp, layout.pp, layout.replica_size) if size > 1]
    shared = sum(2 * SLOT_BYTES + (size * size * RING_BYTES // HUGE_PAGE + 1) * HUGE_PAGE // size for size in groups)
    return shared + (SLOT_BYTES if layout.tp == 1 else 0)


def owned_bytes(
    shape: ModelShape, layout: Layout, stage: int, rank: int, sizes: StepSizes, blocks: int, *, how: str = "balanced",
    weight_dtype: str = "", granule: int = PAIR,
) -> int:  # fmt: skip
    """All that the engine has allocated on a rank: weights, `blocks` KV blocks, activations, batch state and sums in exchange."""
    weights = weight_bytes(shape, layout, stage, rank, how=how, weight_dtype=weight_dtype, granule=granule)
    kv = kv_bytes_per_token(shape, layout, stage, rank, how) * blocks * sizes.block_size
    return weights + kv + activation_bytes(shape, layout, stage, rank, sizes) + batch_bytes(sizes) + exchange_bytes(layout)
