"""Seconds of the engine's operations on a CPU by the constants of `lockstep calibrate`: products and attention."""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import pairwise

from lockstep.planner.calibration import AttentionRates, ProductRates


def pairs_of(queries: int, context: int, window: int = 0) -> int:
    """(query, key) pairs of causal attention: the last `queries` of `context` tokens, each seeing at most `window` (0: all)."""
    ends = range(context - queries + 1, context + 1)
    return sum(min(end, window) for end in ends) if window else (ends[0] + ends[-1]) * queries // 2


def attention_s(rates: AttentionRates, read_bytes: float, pairs: float, rows: float, far: float = 0.0, scores: float = 0.0) -> float:
    """Seconds of one layer's attention. pairs, rows: times head width and query heads. far: share of the bytes from memory. scores:
    pairs times query heads."""
    read_s = (rates.byte_s + rates.far_s * far) * read_bytes
    return rates.base_s + read_s + rates.pair_s * pairs + rates.row_s * rows + rates.score_s * scores


def far_share(step_bytes: float, cache_bytes: float) -> float:
    """Which share of what a step reads comes from memory: all of it where it is much more than the last cache holds."""
    return step_bytes / (step_bytes + cache_bytes)


def product_s(
    table: Sequence[ProductRates], rows: int, n: int, k: int, work_bytes: float, *, gated: bool = False, row: bool = False
) -> float:
    """Seconds of a packed product `[rows, k] x [k, n]` in a step that reads `work_bytes` of weights.

    Between two measured numbers of rows it takes what it would with its weights in caches, or what fewer rows take where that is
    longer (reading does not depend on rows), times how far that is off at both.
    """

    def at(rates: ProductRates, work_bytes: float) -> float:
        extra = (rates.gate_s * n / 2 if gated else 0.0) + (rates.finish_s * n if row else 0.0)
        return rates.launch_s + rates.edge_s * (n + k) + per_weight_s(rates, work_bytes) * n * k + extra

    if rows <= table[0].rows:
        return at(table[0], work_bytes)
    for below, above in pairwise(table):
        if rows <= above.rows:
            share = math.log(rows / below.rows) / math.log(above.rows / below.rows)
            low, high, fewer, more = at(below, 0), at(above, 0), at(below, work_bytes), at(above, work_bytes)
            cached = _between(low, high, share)
            return max(fewer, cached) * _between(fewer / max(fewer, low), more / max(fewer, high), share)
    return at(table[-1], work_bytes) * rows / table[-1].rows


def _between(low: float, high: float, share: float) -> float:
    """On the line between two logarithms."""
    return math.exp(math.log(low) * (1 - share) + math.log(high) * share)


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
