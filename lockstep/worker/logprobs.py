"""Log-probabilities of chosen and prompt tokens, of the model's own distribution (before penalties and temperature)."""

from __future__ import annotations

import torch

from lockstep.kernels import rows
from lockstep.protocol import TokenLogprobs
from lockstep.worker.batch import I64

CHUNK_BYTES = 64 << 20  # of float32 logits held at once for prompt log-probabilities


def chunk_rows(vocab_size: int) -> int:
    """How many rows of logits fit CHUNK_BYTES; at least one. A function of the model only, so all ranks agree."""
    return max(1, CHUNK_BYTES // (4 * vocab_size))


def token_logprobs(logits: torch.Tensor, tokens: I64, counts: I64) -> list[TokenLogprobs]:
    """Each row's token, its log-probability and rank, and the `counts[row]` most likely tokens.

    logits: [rows, vocab] float32, unchanged. tokens: [rows], the chosen ones. Equally likely tokens come lower id first.
    """
    most = min(int(counts.max(initial=0)), logits.shape[1])
    own, ranks, ids, values = (a.tolist() for a in rows.logprobs(logits, tokens, most))
    return [
        TokenLogprobs([token, *ids[row][:count]], [own[row], *values[row][:count]], ranks[row])
        for row, (token, count) in enumerate(zip(tokens.tolist(), counts.tolist(), strict=True))
    ]
