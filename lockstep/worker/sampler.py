"""Choosing the next token of every sampled row from its logits.

A row's token is a function of its own logits, parameters, history and (seed, choice, position): nothing else in the
batch, and no thread count, can change it. So reductions over the vocabulary run one row after the other in a fixed
order, in float64, and exponentials are numpy's, which give an element the same value wherever it stands in an array.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
import torch

from lockstep.protocol import TokenLogprobs
from lockstep.worker.batch import F64, I64, SampleRows
from lockstep.worker.logprobs import token_logprobs
from lockstep.worker.penalties import alter_logits
from lockstep.worker.rng import uniforms

F32 = npt.NDArray[np.float32]
CHUNK_ELEMENTS = 1 << 20  # of float64 probabilities held at once


@dataclass(frozen=True)
class Sampled:
    """tokens: [rows]; logprobs: one entry per row, None for those that did not ask; None when none did."""

    tokens: I64
    logprobs: list[TokenLogprobs | None] | None


class Sampler:
    """Chooses tokens; holds no state of requests."""

    def sample(self, logits: torch.Tensor, rows: SampleRows) -> Sampled:
        """One token per row of `logits [rows, vocab]` (float32), which may be changed in place."""
        asked = np.flatnonzero(rows.logprobs >= 0)
        raw = logits[torch.from_numpy(asked).to(logits.device)] if len(asked) else None
        if rows.altered:
            alter_logits(logits, rows.altered)
        if rows.greedy.all():
            tokens = argmax(logits)
        else:
            tokens = self._draw(logits, rows)
        if raw is None:
            return Sampled(tokens, None)
        logprobs: list[TokenLogprobs | None] = [None] * len(rows)
        for row, entry in zip(asked.tolist(), token_logprobs(raw, tokens[asked], rows.logprobs[asked]), strict=True):
            logprobs[row] = entry
        return Sampled(tokens, logprobs)

    def _draw(self, logits: torch.Tensor, rows: SampleRows) -> I64:
        """Greedy rows take the most likely token, the others draw one."""
        tokens = np.empty(len(rows), np.int64)
        random = np.flatnonzero(~rows.greedy)
        greedy = np.flatnonzero(rows.greedy)
        if len(greedy):
            tokens[greedy] = argmax(logits[torch.from_numpy(greedy).to(logits.device)])
        u = uniforms(rows.seeds[random], rows.choices[random], rows.positions[random])
        step = max(1, CHUNK_ELEMENTS // logits.shape[1])
        for at in range(0, len(random), step):
            part = random[at : at + step]
            lines = logits[torch.from_numpy(part).to(logits.device)].cpu().numpy()
            tokens[part] = draw(
                lines,
                u[at : at + step],
                temperature=rows.temperature[part],
                min_p=rows.min_p[part],
                top_k=rows.top_k[part],
                top_p=rows.top_p[part],
            )
        return tokens


def argmax(logits: torch.Tensor) -> I64:
    """The most likely token of each row of `logits [rows, vocab]`; the lowest id where several are."""
    on_cpu = logits.device.type == "cpu"  # where numpy's is vectorised, and torch's is not
    tokens: I64 = logits.numpy().argmax(axis=1) if on_cpu else logits.argmax(dim=1).cpu().numpy()
    return tokens


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
