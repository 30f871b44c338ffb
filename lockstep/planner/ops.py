"""Seconds of one kernel on one device: launch + max(flop, bytes), with the few corrections that the measurements asked for.

Every price has a `*_work` beside it that gives its (flops, bytes), so that a term can show what it was made of.
"""

from __future__ import annotations

import math

from lockstep.planner.hardware import DTYPE_BYTES, Device
from lockstep.planner.tables import REACH


def gemm_work(m: int, n: int, k: int, dtype: str = "bfloat16", weight_dtype: str | None = None) -> tuple[float, float]:
    """(flops, bytes) of [m, k] @ [k, n]: every operand moved once. `weight_dtype`: how the [k, n] side is stored."""
    wide = DTYPE_BYTES[dtype]
    narrow = DTYPE_BYTES[weight_dtype] if weight_dtype else wide
    out = max(wide, 2.0)  # results of narrow GEMMs are written in bf16
    return 2.0 * m * n * k, m * k * wide + n * k * narrow + m * n * out


def gemm_s(device: Device, m: int, n: int, k: int, dtype: str = "bfloat16", weight_dtype: str | None = None) -> float:
    """Seconds of [m, k] @ [k, n]."""
    if min(m, n, k) <= 0:
        return 0.0
    flops, moved = gemm_work(m, n, k, dtype, weight_dtype)
    fit = device.roofline(dtype)
    seconds = fit.seconds(flops / device.peak(dtype), moved / device.memory_bandwidth)
    return device.corrected(f"gemm {dtype}", seconds, m, n, k) if weight_dtype in (None, dtype) else seconds


def prefill_work(
    batch: int, tokens: int, heads: int, kv_heads: int, head_dim: int, context: int = 0, dtype: str = "bfloat16", window: int | None = None
) -> tuple[float, float]:
    """(flops, bytes) of causal attention of `tokens` new tokens in each of `batch` sequences after `context` older ones."""
    pairs = attended_pairs(tokens, context, window)
    width = DTYPE_BYTES[dtype]
    seen = context + tokens if window is None else min(context + tokens, window + tokens)
    moved = batch * head_dim * width * (2 * tokens * heads + 2 * seen * kv_heads)
    return 4.0 * batch * heads * head_dim * pairs, moved


def attended_pairs(tokens: int, context: int = 0, window: int | None = None) -> float:
    """(query, key) pairs of a causal mask in which each query sees itself and all older tokens, `window` at most."""
    if window is None or context + tokens <= window:
        return tokens * context + tokens * (tokens + 1) / 2
    growing = max(0, min(tokens, window - context))  # queries that still see everything before them
    return growing * context + growing * (growing + 1) / 2 + (tokens - growing) * window


def prefill_attention_s(
    device: Device,
    batch: int,
    tokens: int,
    heads: int,
    kv_heads: int,
    head_dim: int,
    context: int = 0,
    dtype: str = "bfloat16",
    window: int | None = None,
) -> float:
    """Seconds of causal attention over [batch, tokens] new tokens; heads as this rank holds them."""
    if min(batch, tokens, heads) <= 0:
        return 0.0
    flops, moved = prefill_work(batch, tokens, heads, kv_heads, head_dim, context, dtype, window)
    fit = device.prefill
    blocks = batch * heads * math.ceil(tokens / fit.tile)
    filled = blocks / (blocks + fit.wave * device.cores)
    seconds = fit.seconds(flops / (device.peak(dtype) * filled), moved / device.memory_bandwidth)
    if dtype != "bfloat16":
        return seconds
    measured = attended_pairs(tokens)  # without older tokens, and without a window
    near = 1 - abs(math.log(attended_pairs(tokens, context, window) / measured)) / REACH
    return device.corrected("prefill attention", seconds, batch, tokens, heads, kv_heads, head_dim, near=near)


def decode_work(
    batch: int, context: float, heads: int, kv_heads: int, head_dim: int, kv_dtype: str = "bfloat16", window: int | None = None
) -> tuple[float, float]:
    """(flops, bytes) of one query token per sequence over `context` cached tokens."""
    seen = context if window is None else min(context, window)
    return 4.0 * batch * heads * head_dim * seen, batch * head_dim * (2 * seen * kv_heads * DTYPE_BYTES[kv_dtype] + 4.0 * heads)


def decode_attention_s(
    device: Device,
    batch: int,
    context: float,
    heads: int,
    kv_heads: int,
    head_dim: int,
    kv_dtype: str = "bfloat16",
    window: int | None = None,
) -> float:
    """Seconds of decode attention: reading the KV cache, and a cost for every (sequence, KV head)."""
    if min(batch, heads) <= 0:
        return 0.0
    _, moved = decode_work(batch, context, heads, kv_heads, head_dim, kv_dtype, window)
    fit = device.decode
    seconds = fit.launch_s + moved / (device.memory_bandwidth * fit.byte_efficiency) + fit.per_head_s * batch * kv_heads
    if kv_dtype != "bfloat16":
        return seconds
    seen = max(1.0, context if window is None else min(context, window))
    return device.corrected("decode attention", seconds, batch, seen, heads, kv_heads, head_dim)


def active_experts(experts: float, topk: float, tokens: float) -> float:
    """Experts of `experts` expected to be hit when each of `tokens` tokens picks `topk` of them: E(1 - (1 - k/E)^T)."""
    return experts * -math.expm1(tokens * math.log1p(-topk / experts)) if topk < experts else float(experts)


def moe_work(
    tokens: int,
    hidden: int,
    inter: int,
    experts: int,
    topk: int,
    tp: int = 1,
    ep: int = 1,
    dtype: str = "bfloat16",
    routing: str = "uniform",
    skew: float = 0.0,
) -> tuple[float, float]:
    """(flops, weight bytes) on the fullest rank of a gated MoE layer, experts cut `tp` ways in width and shared by `ep` ranks.

    routing: "balanced" (tokens in turn over all experts, as micro-benchmarks do) or anything else for independent choices.
    """
    hit = min(experts, tokens * topk) if routing == "balanced" else active_experts(experts, topk, tokens)
    local = min(experts / ep, max(1.0, hit / ep))
    rows, columns = tokens * topk / ep ** (1 - skew), inter / tp
    return 6.0 * rows * hidden * columns, local * 3 * hidden * columns * DTYPE_BYTES[dtype]


def moe_shape(hidden: int, inter: int, experts: int) -> str:
    """What measured constants of a MoE layer are kept under."""
    return f"{int(experts)} experts of {int(hidden)}x{int(inter)}"


def moe_s(
    device: Device,
    tokens: int,
    hidden: int,
    inter: int,
    experts: int,
    topk: int,
    tp: int = 1,
    ep: int = 1,
    dtype: str = "bfloat16",
    routing: str = "uniform",
    compute: str = "",
    dispatched: bool = False,
) -> float:
    """Seconds of one MoE layer's routed experts on one rank; `tokens` are all tokens that the `ep` ranks route together.

    dispatched: each rank is sent the rows of its own experts; else it has all tokens, and passes over the rows of others too.

    dtype: in which weights are read; compute: in which they are multiplied, where that is another.
    routing: "balanced", "uniform" (independent even choices) or "skewed" (a power law, as real gates tend to).
    """
    if tokens <= 0:
        return 0.0
    fit = device.experts(routing, moe_shape(hidden, inter, experts))
    flops, weights = moe_work(tokens, hidden, inter, experts, topk, tp, ep, dtype, routing, fit.skew if routing == "skewed" else 0.0)
    rows = tokens * topk / (ep if dispatched else 1)
    unrouted = rows * (3 * inter / tp + 2 * hidden) * 2.0  # activations are 16 bits wide whatever the weights are
    passed = unrouted / (device.memory_bandwidth * fit.pass_efficiency)
    seconds = fit.seconds(flops / device.peak(compute or dtype), weights / device.memory_bandwidth) + passed
    if dispatched or dtype != "bfloat16" or compute not in ("", dtype):  # not what was measured
        return seconds
    measured = f"MoE {'skewed' if routing == 'skewed' else 'balanced'} {moe_shape(hidden, inter, experts)}"
    return device.corrected(measured, seconds, tokens, hidden, inter, experts, topk, tp, ep)


def elementwise_s(device: Device, moved_bytes: float, launches: int = 1) -> float:
    """Seconds of `launches` memory-bound kernels (norm, rope, activation, embedding) that move `moved_bytes` in all."""
    fit = device.elementwise
    return launches * fit.launch_s + moved_bytes / (device.memory_bandwidth * fit.byte_efficiency)
