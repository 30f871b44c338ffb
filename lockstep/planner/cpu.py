"""The engine's step on a CPU, from what `lockstep calibrate` measured: seconds of every operation of every stage.

A stage's step is

    step(rows) + prompt tokens
    + embedding on the first, + angles + norm
    + layers x (qkv + rope + attention + out + gate and up + down)
    + head and choice on the last

and with TP each of `out`, `down` and the embedding also sums over the ranks. A product costs launch + edge x (n + k) + work x n x k
with the constants of its number of rows; between two measured numbers the seconds are interpolated on logarithms.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise

from lockstep.distributed.partition import head_shard, shard, vocab_shard
from lockstep.planner.calibration import AttentionRates, Calibration, Mode, ProductRates
from lockstep.planner.layout import Layout
from lockstep.planner.memory import stages, weight_bytes
from lockstep.planner.model import ModelShape


@dataclass(frozen=True)
class OpTime:
    """One operation of a stage, all its layers together. `memory`: the share of it that is reading weights or keys from memory."""

    name: str
    seconds: float
    memory: float = 0.0


@dataclass(frozen=True)
class CpuModel:
    """The engine of one replica on a calibrated machine. `layout.dp` replicas share it, each rank with its share of the cores.

    bandwidth_scale: memory bandwidth now, over that of the calibration. alone: one request, so that other stages and replicas idle.
    """

    calibration: Calibration
    shape: ModelShape
    layout: Layout
    how: str = "balanced"
    weight_dtype: str = ""
    bandwidth_scale: float = 1.0
    alone: bool = False

    @property
    def mode(self) -> Mode:
        """The measured mode: how many ranks share the machine, and are at work."""
        return self.calibration.mode(self.layout.devices, self.layout.tp if self.alone else None)

    def stage_s(self, queries: Sequence[int], contexts: Sequence[int], sampled: int) -> list[float]:
        """Seconds of each pipeline stage for a step whose row i computes queries[i] tokens, the last of contexts[i]."""
        return [sum(op.seconds for op in self.operations(stage, queries, contexts, sampled)) for stage in range(self.layout.pp)]

    def hop_s(self, tokens: int) -> float:
        """From one stage to the next."""
        return self.mode.hop.at(tokens * self.shape.hidden_size * self.shape.itemsize) if self.layout.pp > 1 else 0.0

    def operations(self, stage: int, queries: Sequence[int], contexts: Sequence[int], sampled: int) -> list[OpTime]:
        """Every operation of a stage's step, on its first TP rank, at the present bandwidth."""
        scale = self.bandwidth_scale
        return [
            OpTime(op.name, op.seconds * (1 - op.memory + op.memory / scale), op.memory)
            for op in self._operations(stage, queries, contexts, sampled)
        ]

    def _operations(self, stage: int, queries: Sequence[int], contexts: Sequence[int], sampled: int) -> Iterator[OpTime]:
        shape, mode, tokens, tp = self.shape, self.mode, sum(queries), self.layout.tp
        layers = stages(shape, self.layout.pp, self.how)[stage]
        hidden, first, last = shape.hidden_size, stage == 0, stage == self.layout.pp - 1
        heads = head_shard(shape.num_heads, shape.num_kv_heads, tp, 0)
        q, kv = heads.q.size * shape.head_dim, heads.kv.size * shape.head_dim
        columns = shard(shape.intermediate_size, tp, 0).size
        combine = mode.combine.at(tokens * hidden) if tp > 1 else 0.0
        yield OpTime("engine, executor and worker", mode.step.at(len(queries)) + mode.prompt_token_s * (tokens - len(queries)))
        if first:
            yield OpTime("embedding", mode.embed.at(tokens * hidden) + combine)
        yield OpTime("angles and first norm", mode.angles.at(tokens * shape.head_dim) + mode.norm.at(tokens * hidden))
        for name, n, k, gated, row in (
            ("qkv", q + 2 * kv, hidden, False, False),
            ("out", hidden, q, False, True),
            ("gate and up", 2 * columns, hidden, True, False),
            ("down", hidden, columns, False, True),
        ):
            yield self._product(name, tokens, n, k, stage, count=layers.size, gated=gated, row=row)
        yield OpTime("rope", layers.size * mode.rope.at(tokens * (q + 2 * kv)))
        weights = weight_bytes(shape, self.layout, stage, 0, self.how, self.weight_dtype)
        yield self._attention(layers.start, layers.stop, queries, contexts, q, kv, weights)
        if tp > 1:
            yield OpTime("sums over the ranks", 2 * layers.size * combine)
        if last and sampled:
            rows = vocab_shard(shape.vocab_size, tp, 0).size
            yield self._product("head", sampled, rows, hidden, stage, count=1, gated=False, row=False)
            yield OpTime("choice", mode.choose.at(sampled * rows) + (mode.exchange.at(sampled * rows) if tp > 1 else 0.0))

    def _product(self, name: str, rows: int, n: int, k: int, stage: int, *, count: int, gated: bool, row: bool) -> OpTime:
        narrow = self.weight_dtype == "int8" and name != "head"
        work = weight_bytes(self.shape, self.layout, stage, 0, self.how, self.weight_dtype)
        seconds = product_s(self.mode.products, rows, n, k, work, gated=gated, row=row)
        read = n * k * (1 if narrow else self.shape.itemsize) / self.mode.bandwidth
        memory = min(1.0, read / seconds) if work * self.layout.devices > self.calibration.cache_bytes else 0.0
        return OpTime(name, count * seconds, memory)

    def _attention(self, start: int, stop: int, queries: Sequence[int], contexts: Sequence[int], q: int, kv: int, weights: int) -> OpTime:
        """Rows of one token are priced as decode, others as prefill. weights: bytes of them that the step reads too."""
        seconds = read_s = 0.0
        size = 2 * kv * self.shape.itemsize
        seen = sum(min(c, w) if w else c for w in map(self.shape.window, range(start, stop)) for c in contexts)
        far = far_share(self.layout.devices * (weights + seen * size), self.calibration.cache_bytes)
        for window in (self.shape.window(i) for i in range(start, stop)):
            ones = [min(c, window) if window else c for n, c in zip(queries, contexts, strict=True) if n == 1]
            more = [(n, c) for n, c in zip(queries, contexts, strict=True) if n > 1]
            if ones:
                seconds += attention_s(self.mode.decode, sum(ones) * size, sum(ones) * q, len(ones) * q, far)
                read_s += sum(ones) * size / self.mode.bandwidth
            if more:
                pairs = sum(pairs_of(n, c, window) for n, c in more)
                seconds += attention_s(self.mode.prefill, sum(c for _, c in more) * size, pairs * q, sum(n for n, _ in more) * q, far)
        return OpTime("attention", seconds, min(1.0, read_s / seconds) if seconds else 0.0)


def pairs_of(queries: int, context: int, window: int = 0) -> int:
    """(query, key) pairs of causal attention: the last `queries` of `context` tokens, each seeing at most `window` (0: all)."""
    ends = range(context - queries + 1, context + 1)
    return sum(min(end, window) for end in ends) if window else (ends[0] + ends[-1]) * queries // 2


def attention_s(rates: AttentionRates, read_bytes: float, pairs: float, rows: float, far: float = 0.0) -> float:
    """Seconds of one layer's attention. pairs, rows: times head width and query heads. far: share of the bytes from memory."""
    return rates.base_s + (rates.byte_s + rates.far_s * far) * read_bytes + rates.pair_s * pairs + rates.row_s * rows


def far_share(step_bytes: float, cache_bytes: float) -> float:
    """Which share of what a step reads comes from memory: all of it where it is much more than the last cache holds."""
    return step_bytes / (step_bytes + cache_bytes)


def product_s(
    table: Sequence[ProductRates], rows: int, n: int, k: int, work_bytes: float, *, gated: bool = False, row: bool = False
) -> float:
    """Seconds of a packed product `[rows, k] x [k, n]` in a step that reads `work_bytes` of weights."""

    def at(rates: ProductRates) -> float:
        extra = (rates.gate_s * n / 2 if gated else 0.0) + (rates.finish_s * n if row else 0.0)
        return rates.launch_s + rates.edge_s * (n + k) + per_weight_s(rates, work_bytes) * n * k + extra

    if rows <= table[0].rows:
        return at(table[0])
    for below, above in pairwise(table):
        if rows <= above.rows:
            share = math.log(rows / below.rows) / math.log(above.rows / below.rows)
            return math.exp(math.log(at(below)) * (1 - share) + math.log(at(above)) * share)
    return at(table[-1]) * rows / table[-1].rows


def per_weight_s(rates: ProductRates, work_bytes: float) -> float:
    """Seconds per weight in a step that reads `work_bytes` of weights: a line over their logarithm between what was measured."""
    points = rates.work
    if work_bytes <= points[0][0]:
        return points[0][1]
    for (low, slow), (high, fast) in pairwise(points):
        if work_bytes <= high:
            share = math.log(work_bytes / low) / math.log(high / low)
            return slow * (1 - share) + fast * share
    return points[-1][1]
