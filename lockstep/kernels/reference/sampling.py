"""Drawing tokens in numpy: what csrc/sampling.cpp computes, and what runs without it."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

I64 = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]


def draw(logits: F32, u: F64, *, temperature: F64, min_p: F64, top_k: I64, top_p: F64) -> I64:
    """Draw one token per row: temperature, then min_p, top_k and top_p cut the tail, then the inverse of the CDF at u.

    logits: [rows, vocab] float32; the others [rows]. The CDF runs over token ids in order, in float64. A row without a
    proper distribution (all banned, or not finite) takes its argmax.
    """
    x = logits.astype(np.float64)
    most = x.max(axis=1)
    improper = np.flatnonzero(~np.isfinite(most))
    x[improper], most[improper] = 0.0, 0.0
    weights = np.exp((x - most[:, None]) / temperature[:, None])  # the most likely token has weight 1
    weights[improper] = 0.0
    weights[improper, logits[improper].argmax(axis=1)] = 1.0
    if min_p.any():
        weights[weights < min_p[:, None]] = 0.0
    for row in np.flatnonzero((top_k > 0) & (top_k < logits.shape[1])):
        keep_top_k(weights[row], int(top_k[row]))
    for row in np.flatnonzero(top_p < 1.0):
        keep_top_p(weights[row], float(top_p[row]))
    cdf = np.cumsum(weights, axis=1)
    total = cdf[:, -1]
    target = np.minimum(u * total, np.nextafter(total, 0.0))  # a product that rounds up to the total names no token
    return np.array([np.searchsorted(line, at, side="right") for line, at in zip(cdf, target, strict=True)], np.int64)


def keep_top_k(weights: F64, k: int) -> None:
    """Zero all but the k largest of `weights [vocab]`, in place. Those equal to the k-th stay."""
    kth = np.partition(weights, len(weights) - k)[len(weights) - k]
    weights[weights < kth] = 0.0


def keep_top_p(weights: F64, p: float) -> None:
    """Keep the smallest set of largest `weights [vocab]` that holds the share p of the total, in place.

    1. What lies under (1 - p) total / vocab adds up to less than (1 - p) total, so the set lies above: only that is sorted.
    2. From the largest down, a token stays while the mass before it is under p total.
    3. Of those equal to the last that stays, the lower ids stay.
    """
    total = np.cumsum(weights)[-1]
    most = np.sort(weights[weights >= min((1.0 - p) * total / len(weights), weights.max())])[::-1]
    before = np.concatenate(([0.0], np.cumsum(most[:-1])))
    count = int(np.count_nonzero(before < p * total))
    last = most[count - 1]
    surplus = np.flatnonzero(weights == last)[count - int(np.count_nonzero(most > last)) :]
    weights[weights < last] = 0.0
    weights[surplus] = 0.0
