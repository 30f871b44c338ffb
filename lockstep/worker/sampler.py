"""Choosing the next token of every sampled row from its logits.

A row's token is a function of its own logits, parameters, history and (seed, choice, position): nothing else in the
batch, and no thread count, can change it. So reductions over the vocabulary run one row after the other in a fixed
order (`kernels.rows`).
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch

from lockstep.kernels.rows import draw, row_argmax
from lockstep.protocol import TokenLogprobs
from lockstep.worker.batch import I64, SampleRows
from lockstep.worker.grammars import Grammars
from lockstep.worker.logprobs import token_logprobs
from lockstep.worker.penalties import alter_logits
from lockstep.worker.rng import uniforms


@dataclass(frozen=True)
class Sampled:
    """tokens: [rows]; logprobs: one entry per row, None for those that did not ask; None when none did.

    ended: (row, why) of those whose grammar is complete (why is None) or cannot be obeyed.
    """

    tokens: I64
    logprobs: list[TokenLogprobs | None] | None
    ended: list[tuple[int, str | None]] = field(default_factory=list)


class Sampler:
    """Chooses tokens. The only state of requests is how far each one's grammar is."""

    def __init__(self, grammars: Grammars | None = None) -> None:
        self.grammars = grammars

    def sample(self, logits: torch.Tensor, rows: SampleRows) -> Sampled:
        """One token per row of `logits [rows, vocab]` (float32), which may be changed in place."""
        asked = np.flatnonzero(rows.logprobs >= 0)
        raw = logits[torch.from_numpy(asked).to(logits.device)] if len(asked) else None
        if rows.altered:
            alter_logits(logits, rows.altered, self.grammars)
        if rows.greedy.all():
            tokens = argmax(logits)
        else:
            tokens = self._draw(logits, rows)
        ended = self.grammars.advance(rows.altered, tokens) if self.grammars is not None else []
        if raw is None:
            return Sampled(tokens, None, ended)
        logprobs: list[TokenLogprobs | None] = [None] * len(rows)
        for row, entry in zip(asked.tolist(), token_logprobs(raw, tokens[asked], rows.logprobs[asked]), strict=True):
            logprobs[row] = entry
        return Sampled(tokens, logprobs, ended)

    def _draw(self, logits: torch.Tensor, rows: SampleRows) -> I64:
        """Greedy rows take the most likely token, the others draw one."""
        return draw(
            logits.cpu().numpy(),
            uniforms(rows.seeds, rows.choices, rows.positions),
            temperature=np.where(rows.greedy, 0.0, rows.temperature),
            min_p=rows.min_p,
            top_k=rows.top_k,
            top_p=rows.top_p,
        )


def argmax(logits: torch.Tensor) -> I64:
    """The most likely token of each row of `logits [rows, vocab]`; the lowest id where several are."""
    tokens: I64 = row_argmax(logits).cpu().numpy()
    return tokens
