"""Log-probabilities of chosen and prompt tokens, of the model's own distribution (before penalties and temperature)."""

from __future__ import annotations

import numpy as np
import torch

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
    logprobs = torch.log_softmax(logits, dim=-1)
    chosen = torch.from_numpy(tokens).to(logits.device).unsqueeze(1)
    own = logprobs.gather(1, chosen)
    ranks = ((logprobs > own).sum(dim=1) + 1).tolist()
    most = min(int(counts.max(initial=0)), logits.shape[1])
    values, ids = (t.cpu().numpy() for t in torch.topk(logprobs, most, dim=1))
    order = np.lexsort((ids, -values), axis=1)
    values, ids = np.take_along_axis(values, order, 1), np.take_along_axis(ids, order, 1)
    mine = own.squeeze(1).tolist()
    return [
        TokenLogprobs([int(token), *ids[row, :count].tolist()], [mine[row], *values[row, :count].tolist()], ranks[row])
        for row, (token, count) in enumerate(zip(tokens.tolist(), counts.tolist(), strict=True))
    ]
