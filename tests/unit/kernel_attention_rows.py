"""Rows of random queries, keys and values that go through the kernels' rotary embedding, KV store and attention."""

from __future__ import annotations

import random
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from lockstep.attention.batch import AttentionBatch
from lockstep.kernels.library import DTYPE_CODES
from lockstep.kernels.reference import attention as reference
from lockstep.kernels.reference.rowwise import norm


@dataclass(frozen=True)
class Shape:
    """One attention layer. half: rotated pairs; qk_norm: None, or plus_one."""

    kv_of_q: tuple[int, ...] = (0, 0, 1, 1)
    head_dim: int = 16
    half: int = 8
    scale: float = 0.3
    window: int = 0
    softcap: float = 0.0
    qk_norm: bool | None = None
    dtype: torch.dtype = torch.float32

    @property
    def num_q(self) -> int:
        return len(self.kv_of_q)

    @property
    def num_kv(self) -> int:
        return max(self.kv_of_q) + 1

    @property
    def code(self) -> int:
        return DTYPE_CODES[str(self.dtype).removeprefix("torch.")]


class Weights:
    """inv_freq, norms and each row's qkv `[length, num_q + 2 num_kv, head_dim]`: the same for equal seeds."""

    def __init__(self, shape: Shape, lengths: Sequence[int], seed: int) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.shape, self.lengths = shape, list(lengths)
        self.inv_freq = 1.0 / 10000 ** (torch.arange(shape.half) / max(shape.half, 1))
        self.q_norm, self.k_norm = ((torch.rand(shape.head_dim, generator=generator) + 0.5).to(shape.dtype) for _ in range(2))
        heads = shape.num_q + 2 * shape.num_kv
        self.qkv = [torch.randn(n, heads, shape.head_dim, generator=generator).to(shape.dtype) for n in lengths]

    def prepared(self, row: int) -> tuple[Tensor, Tensor, Tensor]:
        """The reference's q, k (rotated) and v of a row, each `[length, heads, head_dim]`."""
        s = self.shape
        q, k, v = self.qkv[row].split([s.num_q, s.num_kv, s.num_kv], dim=1)
        if s.qk_norm is not None:
            q, k = norm(q, self.q_norm, 1e-6, s.qk_norm), norm(k, self.k_norm, 1e-6, s.qk_norm)
        cos_sin = reference.angles(torch.arange(len(v)), self.inv_freq)
        return reference.rope(q, cos_sin), reference.rope(k, cos_sin), v

    def wanted(self, row: int) -> Tensor:
        """The reference's attention of a whole row `[length, num_q * head_dim]`."""
        s = self.shape
        q, k, v = self.prepared(row)
        return reference.attention(q, k, v, torch.arange(len(v)), s.kv_of_q, s.scale, s.window, s.softcap).flatten(1)


class Cache:
    """A paged cache in which each row has its blocks, dealt at random; it begins as `fill`."""

    def __init__(self, shape: Shape, lengths: Sequence[int], block_size: int, seed: int, fill: float) -> None:
        needs = [-(-n // block_size) for n in lengths]
        self.block_size, self.num_blocks = block_size, sum(needs) + 2
        blocks = random.Random(seed).sample(range(self.num_blocks), self.num_blocks)
        self.tables = [[blocks.pop() for _ in range(need)] for need in needs]
        self.kv = torch.full((2, self.num_blocks, block_size * shape.num_kv * shape.head_dim), fill, dtype=shape.dtype)

    def slots(self, row: int, length: int) -> Tensor:
        positions = torch.arange(length)
        return torch.tensor(self.tables[row])[positions // self.block_size] * self.block_size + positions % self.block_size


class Layer:
    """The three operations of one layer as a program of `lib`, over buffers that hold one step."""

    def __init__(self, lib: Any, weights: Weights, cache: Cache, room: int) -> None:
        s = weights.shape
        self.lib, self.weights, self.cache = lib, weights, cache
        # Rows are longer than what is read, so that a kernel that ignores a stride is found out.
        self.qkv = torch.full((room, (s.num_q + 2 * s.num_kv) * s.head_dim + 8), torch.nan, dtype=s.dtype)
        self.out = torch.full((room, s.num_q * s.head_dim + 16), torch.nan, dtype=s.dtype)
        self.cos_sin = torch.full((room, 2 * s.half), torch.nan)
        self.kv_of_q = torch.tensor(s.kv_of_q, dtype=torch.int32)
        norms = (0, 0) if s.qk_norm is None else (weights.q_norm.data_ptr(), weights.k_norm.data_ptr())
        paged = (cache.kv.data_ptr(), cache.num_blocks, cache.block_size, s.code)
        heads = (s.num_q, s.num_kv, s.head_dim)
        self.program, self.step = lib.program_new(), lib.step_new()
        ops = {
            "angles": lib.op_angles(weights.inv_freq.data_ptr(), s.half, self.cos_sin.data_ptr()),
            "rope_store": lib.op_rope_store(
                self.qkv.data_ptr(), self.qkv.stride(0), *heads, s.half, self.cos_sin.data_ptr(), *norms, 1e-6, bool(s.qk_norm), *paged
            ),
            "attention": lib.op_attention(
                self.qkv.data_ptr(), self.qkv.stride(0), self.out.data_ptr(), self.out.stride(0), *heads,
                self.kv_of_q.data_ptr(), s.scale, s.window, s.softcap, *paged
            ),
        }  # fmt: skip
        for name, op in ops.items():
            lib.program_add(self.program, op, name)

    def close(self) -> None:
        self.lib.program_free(self.program)
        self.lib.step_free(self.step)

    def run(self, rows: Sequence[int], done: Sequence[int], counts: Sequence[int]) -> list[Tensor]:
        """Tokens `done..done + counts` of `rows` in one step: each row's result `[count, num_q * head_dim]`."""
        s = self.weights.shape
        ends = [d + n for d, n in zip(done, counts, strict=True)]
        batch = AttentionBatch.build(list(counts), ends, [self.cache.tables[r] for r in rows], self.cache.block_size)
        parts = [self.weights.qkv[r][d:e].flatten(1) for r, d, e in zip(rows, done, ends, strict=True)]
        self.qkv[: batch.num_tokens, :-8] = torch.cat(parts)
        tables = torch.from_numpy(batch.block_tables).to(torch.int32)
        start, seqs = torch.from_numpy(batch.query_start), torch.from_numpy(batch.seq_lens)
        ids = torch.zeros(batch.num_tokens, dtype=torch.int64)
        arrays = (batch.num_tokens, ids.data_ptr(), batch.positions.data_ptr(), batch.slot_mapping.data_ptr())
        self.lib.step_set(self.step, *arrays, len(rows), start.data_ptr(), seqs.data_ptr(), tables.data_ptr(), tables.stride(0), None, 0)
        assert self.lib.program_run(self.program, self.step, 0) == -1
        assert self.out[:, -16:].isnan().all() and self.qkv[:, -8:].isnan().all(), "wrote past a row"
        return list(self.out[: batch.num_tokens, : s.num_q * s.head_dim].clone().split(list(counts)))


def run(
    lib: Any,
    weights: Weights,
    steps: Sequence[Sequence[int]] | None = None,
    *,
    block_size: int = 16,
    threads: int = 1,
    deal: int = 0,
    fill: float = torch.nan,
    order: Sequence[int] | None = None,
) -> list[Tensor]:
    """Every row's attention `[length, num_q * head_dim]`, computed in `steps` (each row's token count; None: all at once)."""
    lengths = weights.lengths
    steps = steps or [lengths]
    lib.team_set(threads, 0, 0)
    layer = Layer(lib, weights, Cache(weights.shape, lengths, block_size, deal, fill), max(sum(counts) for counts in steps))
    found: list[list[Tensor]] = [[] for _ in lengths]
    done = [0] * len(lengths)
    for counts in steps:
        rows = [r for r in (order or range(len(lengths))) if counts[r]]
        for row, part in zip(rows, layer.run(rows, [done[r] for r in rows], [counts[r] for r in rows]), strict=True):
            found[row].append(part)
            done[row] += counts[row]
    layer.close()
    assert done == list(lengths)
    return [torch.cat(parts) for parts in found]


def cut(rng: random.Random, lengths: Sequence[int]) -> list[list[int]]:
    """Random steps that compute every row to its end: chunks, decode, and steps in which a row waits."""
    steps, done = [], [0] * len(lengths)
    while done != list(lengths):
        counts = [min(rng.choice([0, 1, 1, rng.randint(1, 40), n]), n - at) for n, at in zip(lengths, done, strict=True)]
        if any(counts):
            steps.append(counts)
        done = [at + n for at, n in zip(done, counts, strict=True)]
    return steps


def alone(weights: Weights, row: int) -> Weights:
    """The same row as the only one."""
    single = Weights(replace(weights.shape), [1], 0)
    single.lengths, single.qkv = [weights.lengths[row]], [weights.qkv[row]]
    single.q_norm, single.k_norm = weights.q_norm, weights.k_norm
    return single
