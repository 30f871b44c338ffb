"""From hidden states to logits: the head's product, the gather over the vocabulary, and what the model does to logits."""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lockstep.kernels.rows import row_argmax, row_largest
from lockstep.layers.base import pad_last, trim_shards
from lockstep.layers.embedding import ParallelLMHead, VocabParallelEmbedding

if TYPE_CHECKING:
    from lockstep.distributed.group import GroupCoordinator


class LogitsProcessor(nn.Module):
    """Logits of the real vocabulary, float32, on TP rank 0 (None on the others).

    Order: product, gather, padding cut off, float32, soft cap `cap * tanh(x / cap)`, `scale`.
    """

    def __init__(self, vocab_size: int, *, tp: GroupCoordinator, scale: float = 1.0, soft_cap: float | None = None) -> None:
        super().__init__()
        if soft_cap is not None and soft_cap <= 0:
            raise ValueError(f"soft_cap={soft_cap} must be positive, or None for no cap.")
        self.vocab_size = vocab_size
        self.tp = tp
        self.scale = scale
        self.soft_cap = soft_cap

    def forward(self, lm_head: VocabParallelEmbedding, hidden: Tensor, bias: Tensor | None = None) -> Tensor | None:
        """`hidden [rows, hidden]` to logits `[rows, vocab_size]`. `bias` is the head's shard; default: the head's own.

        Every rank of the group must call it.
        """
        logits = self._local(lm_head, hidden, bias)
        if lm_head.tp_size > 1:
            cuts = lm_head.cuts
            gathered = self.tp.gather(pad_last(logits, cuts[0].size), dst=0, dim=-1)
            if gathered is None:
                return None
            logits = trim_shards(gathered, cuts)
        return self._finish(logits[..., : self.vocab_size])

    def top_tokens(self, lm_head: VocabParallelEmbedding, hidden: Tensor, bias: Tensor | None = None) -> Tensor:
        """The likeliest token of each row, `[rows]` int64, on every rank.

        Equal to the argmax of forward, the lowest id among equals, but ranks exchange one pair per row.
        """
        local = self._finish(self._local(lm_head, hidden, bias)[..., : lm_head.shard.filled.size])
        if lm_head.tp_size == 1:
            return row_argmax(local)
        if local.shape[-1]:
            values, ids = row_largest(local)
        else:  # this rank holds padding alone
            values = local.new_full((len(local),), -torch.inf)
            ids = torch.zeros_like(values, dtype=torch.int64)
        return self.tp.largest(values, ids.add_(lm_head.shard.start))  # ranks are in id order, so of equals the lowest id wins

    def _local(self, lm_head: VocabParallelEmbedding, hidden: Tensor, bias: Tensor | None) -> Tensor:
        if bias is None and isinstance(lm_head, ParallelLMHead):
            bias = lm_head.bias
        return lm_head.local_logits(hidden, bias)

    def _finish(self, logits: Tensor) -> Tensor:
        logits = logits.float()
        if self.soft_cap is not None:
            logits = torch.tanh(logits / self.soft_cap) * self.soft_cap
        return logits if self.scale == 1.0 else logits * self.scale
