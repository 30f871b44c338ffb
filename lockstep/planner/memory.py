"""What each rank holds, to the byte: weights, KV cache, activations, buffers. The engine's own shard map, asked without ranks.

Weights: every matrix cut as `distributed.partition` cuts it; norms, router and output biases on every rank of the TP group;
the embedding on the first stage, the head on the last one, both there where tied. KV: keys and values of this rank's heads,
in each of its layers. Models that the engine does not run (MoE, MLA) follow the rules of the field: see docs/planner.md.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache

from lockstep.config.defaults import TokenBytes
from lockstep.distributed.partition import Shard, head_shard, layer_partition, padded_vocab, shard, stage_layers, vocab_shard
from lockstep.planner.hardware import DTYPE_BYTES
from lockstep.planner.layout import Layout
from lockstep.planner.model import ModelShape

BLOCK_TOKENS = 16  # tokens in a KV block, the engine's default
LIBRARY_BYTES = 64 << 20  # what maths and collective libraries keep for themselves (worker/profile.py reserves the same)
SAMPLER_ELEMENTS = 1 << 16  # float64 elements that sampling works on at a time, see `buffer_bytes`


@dataclass(frozen=True)
class Part:
    """Some parameters of one rank. rows: outputs of a matrix that may be quantized, 0 for what never is."""

    name: str
    params: int
    rows: int = 0
    routed: bool = False  # matrices of routed experts


@dataclass(frozen=True)
class RankMemory:
    """Bytes of one rank. What is left of its memory after `fixed` is for the KV cache."""

    weights: int
    kv_per_token: int
    activations: int
    buffers: int

    @property
    def fixed(self) -> int:
        """All but the KV cache."""
        return self.weights + self.activations + self.buffers


def attention_parts(shape: ModelShape, tp: int, rank: int) -> Iterator[Part]:
    """Parameters of one layer's attention on rank `rank` of `tp`."""
    hidden = shape.hidden_size
    if shape.mla is not None:
        yield from _latent_parts(shape, tp, rank)
        return
    heads = head_shard(shape.num_heads, shape.num_kv_heads, tp, rank)
    rows = (heads.q.size + 2 * heads.kv.size) * shape.head_dim
    yield Part("qkv", rows * hidden, rows)
    yield Part("output", hidden * heads.q.size * shape.head_dim, hidden)
    biases = (rows if shape.qkv_bias else 0) + (hidden if shape.out_bias else 0) + (heads.q.size if shape.sinks else 0)
    yield Part("attention biases and norms", biases + (2 * shape.head_dim if shape.qk_norm else 0))


def _latent_parts(shape: ModelShape, tp: int, rank: int) -> Iterator[Part]:
    mla, hidden = shape.mla, shape.hidden_size
    assert mla is not None
    heads = shard(shape.num_heads, tp, rank).size
    width = heads * (mla.nope_dim + mla.rope_dim)
    if mla.q_rank:
        yield Part("query down", mla.q_rank * hidden, mla.q_rank)
    yield Part("query", width * (mla.q_rank or hidden), width)
    yield Part("latent down", mla.cached * hidden, mla.cached)
    yield Part("latent up", heads * (mla.nope_dim + mla.v_dim) * mla.kv_rank, heads * (mla.nope_dim + mla.v_dim))
    yield Part("output", hidden * heads * mla.v_dim, hidden)
    yield Part("latent norms", mla.kv_rank + mla.q_rank)


def mlp_parts(shape: ModelShape, tp: int, rank: int, experts: Shard | None, *, routed: bool) -> Iterator[Part]:
    """Parameters of one layer's MLP. `experts`: whole experts on this rank; None cuts each of them over the TP group."""
    hidden = shape.hidden_size
    if not routed:
        columns = shard(shape.intermediate_size, tp, rank).size
        yield from _gated("mlp", hidden, columns)
        if shape.mlp_bias:
            yield Part("mlp biases", 2 * columns + hidden)
        return
    moe = shape.moe
    assert moe is not None
    yield Part("router", moe.experts * hidden + (moe.experts if moe.bias else 0))
    if moe.shared_columns:
        yield from _gated("shared expert", hidden, shard(moe.shared_columns, tp, rank).size)
    held, columns = (experts.size, moe.columns) if experts is not None else (moe.experts, shard(moe.columns, tp, rank).size)
    rows = held * (2 * columns + hidden)
    yield Part("experts", held * 3 * hidden * columns, rows, routed=True)
    if moe.bias:
        yield Part("expert biases", rows)


def _gated(name: str, hidden: int, columns: int) -> Iterator[Part]:
    yield Part(f"{name} gate and up", 2 * columns * hidden, 2 * columns)
    yield Part(f"{name} down", hidden * columns, hidden)


def expert_shard(shape: ModelShape, layout: Layout, rank: int = 0) -> Shard | None:
    """The whole experts of a rank of the expert group: an even run, first ranks one more. None without expert parallelism."""
    if layout.ep == 1 or shape.moe is None:
        return None
    base, extra = divmod(shape.moe.experts, layout.ep)
    start = rank * base + min(rank, extra)
    return Shard(start, start + base + (rank < extra))


@lru_cache(maxsize=4096)
def _layer_parts(shape: ModelShape, tp: int, rank: int, experts: int | None, routed: bool) -> tuple[Part, ...]:
    local = None if experts is None else Shard(0, experts)
    parts = [*attention_parts(shape, tp, rank), *mlp_parts(shape, tp, rank, local, routed=routed)]
    return (*parts, Part("norms", shape.norms * shape.hidden_size))


def stages(shape: ModelShape, pp: int, how: str = "even") -> tuple[Shard, ...]:
    """The layers of each pipeline stage: "even" (the planner's), "reference", "balanced" (the engine's default) or counts."""
    return stage_layers(shape.spec, pp) if how == "balanced" and shape.spec else layer_partition(shape.num_layers, pp, how)


def rank_parts(
    shape: ModelShape, layout: Layout, stage: int = 0, rank: int = 0, how: str = "even", ep_rank: int | None = None
) -> list[Part]:
    """Every parameter of TP rank `rank` of pipeline stage `stage`, layer by layer. Raises ConfigError where it cannot be cut so."""
    local = expert_shard(shape, layout, rank if ep_rank is None else ep_rank)
    experts = None if local is None else local.size
    layers = stages(shape, layout.pp, how)[stage]
    found = [part for i in range(layers.start, layers.stop) for part in _layer_parts(shape, layout.tp, rank, experts, shape.routed(i))]
    rows = vocab_shard(shape.vocab_size, layout.tp, rank).size
    first, last = stage == 0, stage == layout.pp - 1
    if first:
        found.append(Part("embedding", rows * shape.hidden_size))
    if last:
        found.append(Part("final norm", shape.hidden_size))
        if not (shape.tied and first):
            found.append(Part("head", rows * shape.hidden_size))
    return found


def rank_params(shape: ModelShape, layout: Layout, stage: int = 0, rank: int = 0, how: str = "even") -> int:
    """Parameters of one rank."""
    return sum(part.params for part in rank_parts(shape, layout, stage, rank, how))


def whole_model_params(shape: ModelShape) -> int:
    """Parameters of the model on one device, without the vocabulary's padding."""
    padding = (padded_vocab(shape.vocab_size) - shape.vocab_size) * shape.hidden_size * (1 if shape.tied else 2)
    return rank_params(shape, Layout()) - padding


def part_bytes(part: Part, dtype: str, weight_dtype: str = "") -> int:
    """Bytes of one part. int8 keeps a float32 scale per output; fp8 one per output likewise (a bound for block scales).

    mxfp4 is of experts alone: 4 bits, and 8 bits for each block of 32.
    """
    if part.routed and weight_dtype == "mxfp4":
        return part.params // 2 + -(-part.params // 32)
    if part.rows and weight_dtype in ("int8", "fp8"):
        return part.params + 4 * part.rows
    return part.params * int(DTYPE_BYTES[dtype])


@lru_cache(maxsize=4096)
def layer_bytes(shape: ModelShape, tp: int, rank: int, experts: int | None, routed: bool, weight_dtype: str = "") -> int:
    """Bytes of one layer's weights on one rank. `experts`: whole experts on it, None where each is cut."""
    return sum(part_bytes(part, shape.dtype, weight_dtype) for part in _layer_parts(shape, tp, rank, experts if routed else None, routed))


def weight_bytes(shape: ModelShape, layout: Layout, stage: int = 0, rank: int = 0, how: str = "even", weight_dtype: str = "") -> int:
    """Bytes of one rank's weights. `weight_dtype`: int8 or fp8 for the layers' matrices, mxfp4 for experts; empty: the model's dtype."""
    layers = stages(shape, layout.pp, how)[stage]
    routed = Counter(shape.routed(i) for i in range(layers.start, layers.stop))
    return stage_bytes(shape, layout, routed, rank, weight_dtype, first=stage == 0, last=stage == layout.pp - 1)


def stage_bytes(
    shape: ModelShape, layout: Layout, routed: Mapping[bool, int], rank: int, weight_dtype: str, *, first: bool, last: bool
) -> int:
    """`weight_bytes` of a stage with so many layers with experts (True) and without. rank: in the expert group, if there is one."""
    local, rank = expert_shard(shape, layout, rank), rank % layout.tp
    experts = None if local is None else local.size
    layers = sum(count * layer_bytes(shape, layout.tp, rank, experts, kind, weight_dtype) for kind, count in routed.items())
    rows = vocab_shard(shape.vocab_size, layout.tp, rank).size * shape.hidden_size
    ends = rows * first + (shape.hidden_size + rows * (not (shape.tied and first))) * last
    return layers + ends * int(DTYPE_BYTES[shape.dtype])


def kv_bytes_per_token(shape: ModelShape, layout: Layout, stage: int = 0, rank: int = 0, how: str = "even", kv_dtype: str = "") -> int:
    """Bytes that one cached token takes on this rank, where it keeps that token: all its layers, keys and values."""
    layers = stages(shape, layout.pp, how)[stage].size
    width = kv_elements(shape, layout.tp, rank)
    return int(layers * width * DTYPE_BYTES[kv_dtype or shape.dtype])


def kv_elements(shape: ModelShape, tp: int, rank: int = 0) -> int:
    """Elements one token adds to one layer's cache on this rank. A latent is kept whole by every rank."""
    if shape.mla is not None:
        return shape.mla.cached
    return 2 * head_shard(shape.num_heads, shape.num_kv_heads, tp, rank).kv.size * shape.head_dim


@lru_cache(maxsize=4096)
def held(shape: ModelShape, tp: int, rank: int) -> tuple[int, ...]:
    """What TP rank `rank` has of all that is cut: query heads, KV heads, columns of the MLP and of experts, rows of the vocabulary."""
    moe, latent = shape.moe, shape.mla is not None
    heads = head_shard(shape.num_heads, shape.num_heads if latent else shape.num_kv_heads, tp, rank)
    cut = (shape.intermediate_size, *((moe.columns, moe.shared_columns) if moe else ()))
    columns = (shard(size, tp, rank).size if size >= tp else 0 for size in cut)
    return (heads.q.size, 1 if latent else heads.kv.size, *columns, vocab_shard(shape.vocab_size, tp, rank).size)


@lru_cache(maxsize=1024)
def fullest_ranks(shape: ModelShape, tp: int) -> tuple[int, ...]:
    """TP ranks one of which is the fullest, whatever counts most: mostly rank 0 alone, which gets what does not divide. Where a cut
    falls inside a KV head's group, another rank may keep one KV head more."""
    found: dict[tuple[int, ...], int] = {}
    for rank in range(tp):
        found.setdefault(held(shape, tp, rank), rank)
    return tuple(
        rank for mine, rank in found.items()
        if not any(other != mine and all(a >= b for a, b in zip(other, mine, strict=True)) for other in found)
    )  # fmt: skip


@lru_cache(maxsize=1024)
def most_heads(shape: ModelShape, tp: int) -> tuple[int, int]:
    """The most (query, KV) heads of any TP rank; a latent is one KV head that all query heads read."""
    every = [held(shape, tp, rank) for rank in fullest_ranks(shape, tp)]
    return max(each[0] for each in every), max(each[1] for each in every)


def activation_bytes(shape: ModelShape, layout: Layout, tokens: int) -> int:
    """An upper bound of what one step of `tokens` tokens holds at once: the engine's own bound, `config.defaults.TokenBytes`."""
    tp, here = layout.tp, -(-tokens // layout.cp)
    heads, kv_heads, columns = -(-shape.num_heads // tp), -(-shape.num_kv_heads // tp), -(-shape.intermediate_size // tp)
    if shape.moe is not None:
        columns = max(columns, -(-(shape.moe.columns * shape.moe.per_token + shape.moe.shared_columns) // tp))
    stream, attention, mlp = TokenBytes.of(shape, heads, kv_heads, columns, shape.itemsize)
    return here * (stream + max(attention, mlp))


def buffer_bytes(shape: ModelShape, rows: int) -> int:
    """Logits of `rows` sampled rows (as gathered, joined and in log form, float32), the sampler's chunk, and the libraries."""
    return 12 * rows * shape.vocab_size + 40 * max(SAMPLER_ELEMENTS, shape.vocab_size) + LIBRARY_BYTES


def rank_memory(
    shape: ModelShape, layout: Layout, *, tokens: int, rows: int, stage: int = 0, rank: int = 0, how: str = "even",
    weight_dtype: str = "", kv_dtype: str = "",
) -> RankMemory:  # fmt: skip
    """One rank's bytes when a step takes up to `tokens` tokens and samples up to `rows` rows."""
    return RankMemory(
        weight_bytes(shape, layout, stage, rank, how, weight_dtype),
        kv_bytes_per_token(shape, layout, stage, rank, how, kv_dtype),
        activation_bytes(shape, layout, tokens),
        buffer_bytes(shape, rows) if stage == layout.pp - 1 else LIBRARY_BYTES,
    )
