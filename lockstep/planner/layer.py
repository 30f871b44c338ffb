"""The terms of one decoder layer on one rank: products, attention, experts, and the messages between ranks.

Everything is priced on the rank with the largest shares: the most heads of any, and of the rest those of rank 0 (first ranks get
one atom more). docs/planner.md has the table of formulas.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

from lockstep.distributed.partition import shard
from lockstep.planner import collectives, ops
from lockstep.planner.hardware import DTYPE_BYTES, Cluster, Device
from lockstep.planner.layout import Layout, Span, cp_span, ep_span, tp_span
from lockstep.planner.memory import most_heads
from lockstep.planner.model import ModelShape
from lockstep.planner.price import Price
from lockstep.planner.terms import Term

LAUNCHES = 4  # memory-bound kernels of a layer: two norms with the residual, rope with the KV write, the activation
MLA_FLOP_SHARE = 0.6  # of peak, that latent decode attention reaches when its heads make it compute-bound
GEMM, ATTENTION, MOE = "docs/planner.md#products", "docs/planner.md#attention", "docs/planner.md#experts"
MESSAGES, MEMORY = "docs/planner.md#collectives", "docs/planner.md#elementwise"
LINK = "launch + steps * step * S / (S + knee)"  # of every message and collective, before its traffic


@dataclass(frozen=True, eq=False)
class Setting:
    """What is the same for all layouts: the model, the cluster, and how weights and the KV cache are stored."""

    shape: ModelShape
    cluster: Cluster
    weight_dtype: str = ""  # int8 (weights only), fp8 (weights and products), mxfp4 (experts' weights), or empty: the model's dtype
    kv_dtype: str = ""

    @property
    def device(self) -> Device:
        return self.cluster.device

    @property
    def compute(self) -> str:
        """The type in which matrices are multiplied."""
        return "fp8" if self.weight_dtype == "fp8" and "fp8" in self.device.flops else self.shape.dtype

    @property
    def stored(self) -> str:
        """The type in which matrices are read, experts apart."""
        return self.weight_dtype if self.weight_dtype in ("int8", "fp8") else self.shape.dtype

    @property
    def experts(self) -> str:
        """The type in which routed experts are read."""
        return self.weight_dtype or self.shape.dtype


class Work(NamedTuple):
    """What a step does: `tokens` new tokens; decode: one for each of as many requests, of `context` cached tokens on average;
    prefill: a chunk of one prompt after `context` tokens (the mean over its chunks, so that their sum is exact), or the whole
    prompts, all equal, of so many requests."""

    decode: bool
    tokens: int
    context: float
    prompts: int = 1


class Groups(NamedTuple):
    """Where the groups of a layout lie."""

    tp: Span
    cp: Span
    ep: Span

    @classmethod
    def of(cls, layout: Layout, devices_per_node: int) -> Groups:
        return cls(*(span(layout, devices_per_node) for span in (tp_span, cp_span, ep_span)))


def layer_terms(s: Setting, layout: Layout, groups: Groups, work: Work, routed: bool, window: int) -> list[Term]:
    """Every term of one layer."""
    return [*attention_terms(s, layout, groups, work, window), *mlp_terms(s, layout, groups, work, routed)]


def tokens_here(layout: Layout, work: Work) -> int:
    """Tokens that each rank computes: context ranks share a prompt's chunk."""
    return work.tokens if work.decode else -(-work.tokens // layout.cp)


def attention_terms(s: Setting, layout: Layout, groups: Groups, work: Work, window: int) -> list[Term]:
    """The half of a layer up to the sum after attention. The same whatever the expert group is: a search keeps its price."""
    here = tokens_here(layout, work)
    expanded = here if work.decode else work.tokens + work.prompts * round(work.context)  # of all context ranks: gathered as latents
    terms = [*_projections(s, layout, here, expanded), *_attention(s, layout, groups, work, here, window)]
    terms.append(all_reduce(s, groups.tp, here * s.shape.hidden_size * s.shape.itemsize, "all-reduce after attention"))
    return [t for t in terms if t.seconds > 0]


def mlp_terms(s: Setting, layout: Layout, groups: Groups, work: Work, routed: bool) -> list[Term]:
    """The other half, with the small kernels of both. Of `work` only how many tokens count, and whether they are prompts'."""
    here = tokens_here(layout, work)
    wide = here * s.shape.hidden_size * s.shape.itemsize
    terms = [*(_routed(s, layout, groups, work, here) if routed else _dense(s, layout, groups, here))]
    columns = s.shape.moe.columns * s.shape.moe.per_token if routed and s.shape.moe else s.shape.intermediate_size
    moved = 8.0 * wide + 3.0 * here * columns / layout.tp * s.shape.itemsize
    seconds = ops.elementwise_s(s.device, moved, LAUNCHES)
    terms.append(term(s, "norms, rope, activation", seconds, 0.0, moved, "4 t0 + bytes / (BW e_b)", MEMORY))
    return [t for t in terms if t.seconds > 0]


def term(s: Setting, name: str, seconds: float, flops: float, moved: float, formula: str, source: str) -> Term:
    """A term of an operation: what nobody tried has the device's own expected error."""
    if not isinstance(seconds, Price):
        return Term(name, seconds, flops, moved, formula, source, 0.0, seconds * s.device.band.operation)
    found = float(seconds)
    error_s = seconds.error_s + (found - seconds.known_s) * s.device.band.operation
    return Term(name, found, flops, moved, formula, source, seconds.table_s, error_s)


def product(s: Setting, name: str, m: int, n: int, k: int) -> Term:
    """[m, k] @ [k, n] with a weight."""
    flops, moved = ops.gemm_work(m, n, k, s.compute, s.stored)
    return term(
        s, name, ops.gemm_s(s.device, m, n, k, s.compute, s.stored), flops, moved, "t0 + max(2mnk / (F e_f), bytes / (BW e_b))", GEMM
    )


def all_reduce(s: Setting, span: Span, size: float, name: str) -> Term:
    """The sum over a group of `size` bytes."""
    seconds = collectives.all_reduce_s(s.cluster, *span, size) if span.size > 1 else 0.0
    across = "hierarchical: reduce-scatter and all-gather inside, ring or tree across" if span.nodes > 1 else "one node"
    sent = 2 * (span.size - 1) / span.size * size
    return term(s, name, seconds, 0.0, sent, f"{LINK} + 2(n-1)/n S / B, {across}", MESSAGES)


def _projections(s: Setting, layout: Layout, tokens: int, expanded: int) -> Iterator[Term]:
    """expanded: of a latent model, the tokens whose latents become whole heads; a chunk of a prompt does it for all before it,
    and each context rank for the tokens of all of them."""
    shape, tp = s.shape, layout.tp
    if shape.mla is None:
        q, kv = _heads(s, tp)
        yield product(s, "QKV projection", tokens, (q + 2 * kv) * shape.head_dim, shape.hidden_size)
    else:
        mla, (q, _) = shape.mla, _heads(s, tp)
        if mla.q_rank:
            yield product(s, "QKV projection", tokens, mla.q_rank, shape.hidden_size)
        yield product(s, "QKV projection", tokens, q * (mla.nope_dim + mla.rope_dim), mla.q_rank or shape.hidden_size)
        yield product(s, "QKV projection", tokens, mla.cached, shape.hidden_size)
        yield product(s, "latent projection", expanded, q * (mla.nope_dim + mla.v_dim), mla.kv_rank)
    yield product(s, "output projection", tokens, shape.hidden_size, q * shape.v_head_dim)


def _attention(s: Setting, layout: Layout, groups: Groups, work: Work, here: int, window: int) -> Iterator[Term]:
    if work.decode:
        yield from _decode_attention(s, layout, groups, work, window)
    else:
        yield from _prefill_attention(s, layout, groups, work, here, window)


def _heads(s: Setting, tp: int) -> tuple[int, int]:
    """(query, KV) heads of the rank that has most of them."""
    return most_heads(s.shape, tp)


def _prefill_attention(s: Setting, layout: Layout, groups: Groups, work: Work, here: int, window: int) -> Iterator[Term]:
    """A context group shares the chunk out evenly (each rank early and late tokens): its mean query sees half of the others."""
    prompts, here = work.prompts, -(-here // work.prompts)
    q, kv = _heads(s, layout.tp)
    q, kv = (q, q) if s.shape.mla is not None else (q, kv)  # a prompt's latent is expanded to whole heads
    width = (s.shape.q_head_dim + s.shape.v_head_dim) // 2
    context = round(work.context + (work.tokens / prompts - here) / 2)
    limit, dtype = window or None, s.shape.dtype
    flops, moved = ops.prefill_work(prompts, here, q, kv, width, context, dtype, limit)
    seconds = ops.prefill_attention_s(s.device, prompts, here, q, kv, width, context, dtype, limit)
    yield term(s, "attention", seconds, flops, moved, "t0 + max(4 pairs heads dim / (F e_f), bytes / (BW e_b))", ATTENTION)
    if layout.cp * layout.dcp > 1:
        yield from _gathered(s, layout, groups, work, 1.0 if s.shape.mla else kv / s.shape.num_kv_heads, window)


def _gathered(s: Setting, layout: Layout, groups: Groups, work: Work, share: float, window: int) -> Iterator[Term]:
    """Keys and values (or latents) that the other context ranks hold: of older tokens from the DCP ranks, then, with those of the
    chunk, from the CP ranks. share: of a layer's KV heads, those of this rank."""
    elements = share * s.shape.kv_elements_per_token
    older = work.prompts * min(work.context, window or work.context) * elements * DTYPE_BYTES[s.kv_dtype or s.shape.dtype]
    name, formula = "KV all-gather over the context group", f"{LINK} + (n-1)/n S / B"
    if layout.dcp > 1 and older:
        size = older / layout.cp
        seconds = collectives.all_gather_s(s.cluster, *_dcp_span(layout, groups), size)
        yield term(s, name, seconds, 0.0, size, formula, MESSAGES)
    if layout.cp > 1:
        size = work.tokens * elements * s.shape.itemsize + older
        yield term(s, name, collectives.all_gather_s(s.cluster, *groups.cp, size), 0.0, size, formula, MESSAGES)


def _dcp_span(layout: Layout, groups: Groups) -> Span:
    """The DCP group: neighbours in the TP group."""
    inside = min(layout.dcp, groups.tp.ranks_per_node)
    return Span(inside, layout.dcp // inside)


def _decode_attention(s: Setting, layout: Layout, groups: Groups, work: Work, window: int) -> Iterator[Term]:
    """Context ranks each read their part of the cache, with the query heads of all DCP ranks, and merge by log-sum-exp."""
    q, kv = _heads(s, layout.tp)
    share = layout.cp * layout.dcp
    seen = min(work.context, window) if window else work.context
    context, batch, kv_dtype = seen / share, work.tokens, s.kv_dtype or s.shape.dtype
    heads = q * layout.dcp
    if s.shape.mla is None:
        flops, moved = ops.decode_work(batch, context, heads, kv, s.shape.head_dim, kv_dtype)
        seconds = ops.decode_attention_s(s.device, batch, context, heads, kv, s.shape.head_dim, kv_dtype)
        formula = "t0 + bytes / (BW e_b) + per (sequence, KV head)"
    else:  # one vector per token, read once as key and value: half a width stands for each
        mla = s.shape.mla
        flops = 2.0 * batch * heads * context * (mla.cached + mla.kv_rank)
        _, moved = ops.decode_work(batch, context, heads, 1, mla.cached // 2, kv_dtype)
        reading = ops.decode_attention_s(s.device, batch, context, heads, 1, mla.cached // 2, kv_dtype)
        seconds = max(reading, flops / (s.device.peak(s.shape.dtype) * MLA_FLOP_SHARE))
        formula = "max(t0 + bytes / (BW e_b), flop / (0.6 F))"
    yield term(s, "attention", seconds, flops, moved, formula, ATTENTION)
    if share > 1:
        yield _merge(s, layout, groups, batch, heads)


def _merge(s: Setting, layout: Layout, groups: Groups, batch: int, heads: int) -> Term:
    """Queries gathered over the DCP group; partial results and their log-sum-exp reduced over both context groups."""
    result = batch * heads * (s.shape.v_head_dim * s.shape.itemsize + 4.0)
    query = batch * heads * s.shape.q_head_dim * s.shape.itemsize
    seconds = 0.0
    if layout.dcp > 1:
        span = _dcp_span(layout, groups)
        seconds += collectives.all_gather_s(s.cluster, *span, query) + collectives.reduce_scatter_s(s.cluster, *span, result)
    if layout.cp > 1:
        seconds += collectives.all_reduce_s(s.cluster, *groups.cp, result)
    return term(s, "context merge", seconds, 0.0, query + result, "all-gather(q) + reduce-scatter(out, lse)", MESSAGES)


def _dense(s: Setting, layout: Layout, groups: Groups, tokens: int) -> Iterator[Term]:
    columns = shard(s.shape.intermediate_size, layout.tp, 0).size
    yield product(s, "MLP", tokens, 2 * columns, s.shape.hidden_size)
    yield product(s, "MLP", tokens, s.shape.hidden_size, columns)
    yield all_reduce(s, groups.tp, tokens * s.shape.hidden_size * s.shape.itemsize, "all-reduce after the MLP")


def _routed(s: Setting, layout: Layout, groups: Groups, work: Work, tokens: int) -> Iterator[Term]:
    """Experts cut over TP (ep = 1), or whole ones on the ranks of the expert group, with tokens sent to them and back."""
    shape, moe = s.shape, s.shape.moe
    assert moe is not None
    yield product(s, "router", tokens, moe.experts, shape.hidden_size)
    if moe.shared_columns:
        columns = shard(moe.shared_columns, layout.tp, 0).size
        yield product(s, "shared expert", tokens, 2 * columns, shape.hidden_size)
        yield product(s, "shared expert", tokens, shape.hidden_size, columns)
    spread = layout.ep > 1
    # TP groups whose tokens meet in the expert group; the context ranks of a running request all have its token.
    senders = layout.ep // (layout.stage_size if work.decode else layout.tp) if spread else 1
    tp, together = (1 if spread else layout.tp), tokens * senders
    args = (together, shape.hidden_size, moe.columns, moe.experts, moe.per_token, tp, layout.ep, s.experts)
    flops, moved = ops.moe_work(*args)
    formula = "t0 + max(flop / (F e_f), E(1-(1-k/E)^T) expert bytes / (BW e_b))"
    yield term(s, "experts", ops.moe_s(s.device, *args, compute=s.compute, dispatched=senders > 1), flops, moved, formula, MOE)
    wide = tokens * shape.hidden_size * shape.itemsize
    if senders == 1:
        yield all_reduce(s, groups.ep if spread else groups.tp, wide, "all-reduce after the MLP")
        return
    mine = -(-tokens // layout.tp)  # each TP rank sends its part of the tokens
    mode: collectives.Mode = "low_latency" if work.decode else "normal"
    where = (*groups.ep, mine, shape.hidden_size, moe.per_token)
    sent = float(mine * shape.hidden_size * moe.per_token)
    out, back = collectives.dispatch_s(s.cluster, *where, mode), collectives.combine_s(s.cluster, *where, mode)
    yield term(s, "dispatch to experts", out, 0.0, sent * DTYPE_BYTES["fp8"], f"{LINK} + T k h / B (fp8)", MESSAGES)
    yield term(s, "combine from experts", back, 0.0, sent * shape.itemsize, f"{LINK} + T k h / B", MESSAGES)
    if layout.tp > 1:
        gather = collectives.all_gather_s(s.cluster, *groups.tp, wide)
        yield term(s, "all-gather after the experts", gather, 0.0, wide, f"{LINK} + (n-1)/n S / B", MESSAGES)
