"""Drawing tokens in numpy, log-probabilities in torch: what csrc/sampling.cpp computes, and what runs without it.

Reductions over the vocabulary run one row after the other in a fixed order, in float64, and exponentials are numpy's,
which give an element the same value wherever it stands in an array: a row's token depends on nothing else in the batch.
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

I64 = npt.NDArray[np.int64]
F32 = npt.NDArray[np.float32]
F64 = npt.NDArray[np.float64]
CHUNK_ELEMENTS = 1 << 20  # of float64 probabilities held at once


def draw(logits: F32, u: F64, *, temperature: F64, min_p: F64, top_k: I64, top_p: F64) -> I64:
    """Draw one token per row: temperature, then min_p, top_k and top_p cut the tail, then the inverse of the CDF at u.

    logits: [rows, vocab] float32; the others [rows]. The CDF runs over token ids in order, in float64. A row takes its
    argmax if its temperature is 0, or if it has no proper distribution (all banned, or not finite).
    """
    tokens = np.empty(len(logits), np.int64)
    step = max(1, CHUNK_ELEMENTS // logits.shape[1])
    for at in range(0, len(logits), step):
        part = slice(at, at + step)
        cdf = running_sums(logits[part], temperature[part], min_p[part], top_k[part], top_p[part])
        total = cdf[:, -1]
        target = np.minimum(u[part] * total, np.nextafter(total, 0.0))  # a product that rounds up to the total names no token
        tokens[part] = [np.searchsorted(line, goal, side="right") for line, goal in zip(cdf, target, strict=True)]
    return tokens


def running_sums(logits: F32, temperature: F64, min_p: F64, top_k: I64, top_p: F64) -> F64:
    """What `draw` inverts: the sum of the weights of the ids up to each, `[rows, vocab]`. The largest weight is 1."""
    x = logits.astype(np.float64)
    most = x.max(axis=1)
    certain = np.flatnonzero(~np.isfinite(most) | (temperature <= 0))
    x[certain], most[certain] = 0.0, 0.0
    weights = np.exp((x - most[:, None]) / np.where(temperature > 0, temperature, 1.0)[:, None])
    weights[certain] = 0.0
    weights[certain, logits[certain].argmax(axis=1)] = 1.0
    if min_p.any():
        weights[weights < min_p[:, None]] = 0.0
    for row in np.flatnonzero((top_k > 0) & (top_k < logits.shape[1])):
        keep_top_k(weights[row], int(top_k[row]))
    for row in np.flatnonzero(top_p < 1.0):
        keep_top_p(weights[row], float(top_p[row]))
    return np.cumsum(weights, axis=1)


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


def logprobs(logits: Tensor, tokens: I64, count: int) -> tuple[F32, I64, I64, F32]:
    """Each row's log-probability and rank (from 1) of its token `[rows]`, ids and values of the likeliest `[rows, count]`.

    logits: [rows, vocab] float32, unchanged. Of the likeliest, equals come lower id first.
    """
    found = torch.log_softmax(logits, dim=-1)
    own = found.gather(1, torch.from_numpy(tokens).to(logits.device).unsqueeze(1))
    ranks = (found > own).sum(dim=1) + 1
    values, ids = (t.cpu().numpy() for t in torch.topk(found, count, dim=1))
    order = np.lexsort((ids, -values), axis=1)
    return own.squeeze(1).cpu().numpy(), ranks.cpu().numpy(), np.take_along_axis(ids, order, 1), np.take_along_axis(values, order, 1)
