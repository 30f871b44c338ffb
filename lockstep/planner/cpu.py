"""The engine's step on a CPU, from what `lockstep calibrate` measured: seconds of every operation of every stage.

A stage's step is

    step(rows), on the first + prompts + prompt tokens
    + embedding on the first, + angles + norm
    + layers x (qkv + rope + attention + out + gate and up + down)
    + head and choice on the last

where `out`, `gate and up` and `down` of the model's last layer are for the tokens that are sampled only, and with TP each of
`out`, `down` and the embedding also sums over the ranks. A product costs launch + edge x (n + k) + work x n x k with the constants
of its number of rows; between two measured numbers the seconds are interpolated on logarithms. Where samples are kept, products
and attention are corrected by those around (`cpu_tables.py`).
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from lockstep.distributed.partition import head_shard, shard, vocab_shard
from lockstep.planner.calibration import Calibration, Mode
from lockstep.planner.cpu_ops import attention_s, far_share, pairs_of, product_s
from lockstep.planner.cpu_tables import GATED, PLAIN, ROW, corrected
from lockstep.planner.layout import Layout
from lockstep.planner.memory import stages, weight_bytes
from lockstep.planner.model import ModelShape
from lockstep.planner.price import Price


@dataclass(frozen=True)
class OpTime:
    """One operation of a stage, all its layers together, and shares of its seconds. `memory`: what reading weights or keys from memory
    alone would take. `cached`: what it would take had it nothing to read there, of which `compute` is multiplying, and the rest
    launches, caches and the interpreter. Where they make more than the whole, it reads some while it multiplies by others."""

    name: str
    seconds: float
    memory: float = 0.0
    compute: float = 0.0
    cached: float = 1.0
    table: float = 0.0  # the share of it that measured samples gave
    error: float = 0.0  # expected mean error, as a fraction; 0 where nobody tried


@dataclass(frozen=True)
class Scales:
    """Speeds of the mode's ranks now, over those of the calibration: of memory, of multiplying, and of all that is neither."""

    bandwidth: float = 1.0
    compute: float = 1.0
    others: float = 1.0

    def seconds(self, op: OpTime) -> float:
        """Of an operation, now: as much of the shorter of reading and what goes on beside is hidden by the longer as before."""
        hidden, rest = max(0.0, op.memory + op.cached - 1), max(0.0, 1 - op.memory - op.cached)
        memory, cached = op.memory / self.bandwidth, (op.cached - op.compute) / self.others + op.compute / self.compute
        both = min(memory, cached) / min(op.memory, op.cached) * hidden if hidden else 0.0
        return op.seconds * (rest / self.others + memory + cached - both)


def op_of(name: str, seconds: float, memory: float = 0.0, compute: float = 0.0, cached: float = 1.0) -> OpTime:
    """An operation with the shares of its price. compute: at most what it takes without memory."""
    compute = min(compute, cached)
    if not isinstance(seconds, Price) or not seconds:
        return OpTime(name, seconds, memory, compute, cached)
    return OpTime(name, float(seconds), memory, compute, cached, seconds.table_s / seconds, seconds.error_s / seconds)


def together(a: OpTime, b: OpTime) -> OpTime:
    """Two parts of one operation."""
    seconds = a.seconds + b.seconds
    if not seconds:
        return a

    def mean(x: float, y: float) -> float:
        return x if x == y else (a.seconds * x + b.seconds * y) / seconds

    shares = (mean(getattr(a, name), getattr(b, name)) for name in ("memory", "compute", "cached", "table", "error"))
    return OpTime(a.name, seconds, *shares)


@dataclass(frozen=True)
class CpuModel:
    """The engine of one replica on a calibrated machine. `layout.dp` replicas share it, each rank with its share of the cores.

    scales: the speeds now. alone: one request, so that other stages and replicas idle.
    """

    calibration: Calibration
    shape: ModelShape
    layout: Layout
    how: str = "balanced"
    weight_dtype: str = ""
    scales: Scales = Scales()
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
        hop_s = self.mode.hop.at(tokens * self.shape.hidden_size * self.shape.itemsize) / self.scales.others
        return hop_s if self.layout.pp > 1 else 0.0

    def operations(self, stage: int, queries: Sequence[int], contexts: Sequence[int], sampled: int) -> list[OpTime]:
        """Every operation of a stage's step, on its first TP rank, at the present speeds."""
        every = self._operations(stage, queries, contexts, sampled)
        return [replace(op, seconds=self.scales.seconds(op)) for op in every]

    def _operations(self, stage: int, queries: Sequence[int], contexts: Sequence[int], sampled: int) -> Iterator[OpTime]:
        shape, mode, tokens, tp = self.shape, self.mode, sum(queries), self.layout.tp
        layers = stages(shape, self.layout.pp, self.how)[stage]
        hidden, first, last = shape.hidden_size, stage == 0, stage == self.layout.pp - 1
        heads = head_shard(shape.num_heads, shape.num_kv_heads, tp, 0)
        q, kv = heads.q.size * shape.head_dim, heads.kv.size * shape.head_dim
        columns = shard(shape.intermediate_size, tp, 0).size
        combine = mode.combine.at(tokens * hidden) if tp > 1 else 0.0
        wanted = max(sampled, 1) if last else tokens
        weights = weight_bytes(shape, self.layout, stage, 0, self.how, self.weight_dtype)
        cold, rows = self._cold(self.layout.devices * weights), len(queries)
        engine_s = (1 - cold) * mode.step.at(rows) + cold * mode.step_far.at(rows)
        yield OpTime("engine, executor and worker", engine_s + (self._prompts_s(queries, contexts) if first else 0.0))
        if first:
            yield OpTime("embedding", mode.embed.at(tokens * hidden) + combine)
        yield OpTime("angles and first norm", mode.angles.at(tokens * shape.head_dim) + mode.norm.at(tokens * hidden))
        for name, n, k, gated, row in (
            ("qkv", q + 2 * kv, hidden, False, False),
            ("out", hidden, q, False, True),
            ("gate and up", 2 * columns, hidden, True, False),
            ("down", hidden, columns, False, True),
        ):
            part = name != "qkv" and wanted < tokens  # the model's last layer does this for what is sampled only
            whole = self._product(name, tokens, n, k, stage, count=layers.size - part, gated=gated, row=row)
            yield whole if not part else together(whole, self._product(name, wanted, n, k, stage, count=1, gated=gated, row=row))
        ones = sum(n == 1 for n in queries)
        yield OpTime("rope", layers.size * self._rope_s(ones, tokens - ones, q + 2 * kv))
        yield self._attention(layers.start, layers.stop, queries, contexts, q, kv, weights)
        if tp > 1:
            yield OpTime("sums over the ranks", 2 * (layers.size - 1) * combine + 2 * mode.combine.at(wanted * hidden))
        if last and sampled:
            vocab = vocab_shard(shape.vocab_size, tp, 0).size
            yield self._product("head", sampled, vocab, hidden, stage, count=1, gated=False, row=False)
            exchange_s = mode.exchange.at(sampled * vocab) if tp > 1 else 0.0
            far_s = mode.choose_far_s if cold else 0.0  # all or nothing, as it was found
            yield OpTime("choice", mode.choose.at(sampled * vocab) + far_s + exchange_s)

    def _cold(self, work: float) -> float:
        """How far a step that reads `work` bytes of weights leaves the engine no caches, 0 to 1: between the last cache and the model
        that it was measured with a line over the logarithm, as for what a weight costs."""
        cache, far = self.calibration.cache_bytes, self.mode.far_bytes
        if not 0 < cache < work < far:
            return float(work > cache)
        return math.log(work / cache) / math.log(far / cache)

    def _prompts_s(self, queries: Sequence[int], contexts: Sequence[int]) -> float:
        """What the engine does for the prompts of a step, once however many stages there are."""
        begun = sum(n == c > 1 for n, c in zip(queries, contexts, strict=True))
        return self.mode.prompt_s * begun + self.mode.prompt_token_s * (sum(queries) - len(queries))

    def _rope_s(self, ones: int, others: int, width: int) -> float:
        """Of one layer: requests of one token, and tokens of prompts."""
        one = self.mode.rope_one or self.mode.rope
        return (one.at(ones * width) if ones else 0.0) + (self.mode.rope.at(others * width) if others else 0.0)

    def _product(self, name: str, rows: int, n: int, k: int, stage: int, *, count: int, gated: bool, row: bool) -> OpTime:
        narrow = self.weight_dtype == "int8" and name != "head"
        work = weight_bytes(self.shape, self.layout, stage, 0, self.how, self.weight_dtype)
        kind = GATED if gated else ROW if row else PLAIN
        seconds = product_s(self.mode.products, rows, n, k, work, gated=gated, row=row)
        if not narrow:
            seconds = corrected(self.mode, "product", seconds, rows, n, k, work, kind)
        compute = 2 * rows * n * k / self.mode.flops / seconds
        if work * self.layout.devices <= self.calibration.cache_bytes:
            return op_of(name, count * seconds, 0.0, compute)
        read = n * k * (1 if narrow else self.shape.itemsize) / self.mode.bandwidth
        cached = product_s(self.mode.products, rows, n, k, 0, gated=gated, row=row)
        return op_of(name, count * seconds, min(1.0, read / seconds), compute, min(1.0, cached / seconds))

    def _attention(self, start: int, stop: int, queries: Sequence[int], contexts: Sequence[int], q: int, kv: int, weights: int) -> OpTime:
        """Rows of one token are priced as decode, others as prefill. weights: bytes of them that the step reads too."""
        seconds = read_s = compute_s = 0.0
        size = 2 * kv * self.shape.itemsize
        seen = sum(min(c, w) if w else c for w in map(self.shape.window, range(start, stop)) for c in contexts)
        far = far_share(self.layout.devices * (weights + seen * size), self.calibration.cache_bytes)
        for window in (self.shape.window(i) for i in range(start, stop)):
            ones = [min(c, window) if window else c for n, c in zip(queries, contexts, strict=True) if n == 1]
            more = [(n, c) for n, c in zip(queries, contexts, strict=True) if n > 1]
            if ones:
                seconds += self._attention_s("decode attention", sum(ones) * size, sum(ones) * q, len(ones) * q, far)
                read_s += far * sum(ones) * size / self.mode.bandwidth
            if more:
                pairs = sum(pairs_of(n, c, window) for n, c in more)
                read = sum(c for _, c in more) * size
                prompts_s = self._attention_s("prefill attention", read, pairs * q, sum(n for n, _ in more) * q, far)
                seconds, compute_s = seconds + prompts_s, compute_s + prompts_s
        if not seconds:
            return OpTime("attention", 0.0)
        memory = min(1.0, read_s / seconds)
        return op_of("attention", seconds, memory, compute_s / seconds, 1 - memory)

    def _attention_s(self, kind: str, read: float, pairs: float, rows: float, far: float) -> float:
        rates = self.mode.decode if kind.startswith("decode") else self.mode.prefill
        scores = pairs / self.shape.head_dim
        return corrected(self.mode, kind, attention_s(rates, read, pairs, rows, far, scores), read, pairs, rows, far, scores, pairs / read)
