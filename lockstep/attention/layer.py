"""The attention of one decoder layer over the paged KV cache, and the interface of what computes it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from lockstep.attention.batch import AttentionBatch


@dataclass(frozen=True)
class KVLayerSpec:
    """What one layer keeps per token on this rank: a key and a value of `head_dim` for each of `num_kv_heads`."""

    num_kv_heads: int
    head_dim: int

    def bytes_per_block(self, block_size: int, itemsize: int) -> int:
        """Bytes of one KV block of this layer, keys and values."""
        return 2 * block_size * self.num_kv_heads * self.head_dim * itemsize


class AttentionBackend(Protocol):
    """Computes attention for all layers of one model; may keep workspaces between calls."""

    def forward(self, layer: Attention, q: Tensor, k: Tensor, v: Tensor, batch: AttentionBatch) -> Tensor:
        """Store k and v in `layer.kv` at the batch's slots, then attend. Shapes as Attention.forward.

        A query at position p of its row sees keys at positions [p - window + 1, p] of that row, all up to p without a
        window. Nothing that another row wrote, or that was never written, may reach the result.
        """
        ...


class HeadGroups:
    """Query heads grouped by the KV head they read: `[.., num_q, D] <-> [.., num_kv, width, D]`.

    An uneven cut gives groups of different sizes; those are filled up with repeats of a query head, which costs less than
    repeating keys and values, and the surplus results are dropped.
    """

    def __init__(self, kv_of_q: Sequence[int], num_kv: int, device: torch.device | str | None = None) -> None:
        members = [[q for q, kv in enumerate(kv_of_q) if kv == head] for head in range(num_kv)]
        assert all(members), f"kv_of_q={tuple(kv_of_q)} leaves one of {num_kv} KV heads unread"
        self.num_kv = num_kv
        self.width = max(map(len, members))
        padded = [q for group in members for q in (group + group[-1:] * self.width)[: self.width]]
        self.even = padded == list(range(len(kv_of_q)))
        self._padded = torch.tensor(padded, device=device)
        self._places = torch.tensor([padded.index(q) for q in range(len(kv_of_q))], device=device)

    def split(self, q: Tensor) -> Tensor:
        """`[tokens, num_q, D] -> [tokens, num_kv, width, D]`."""
        if not self.even:
            q = q.index_select(1, self._padded)
        return q.view(q.shape[0], self.num_kv, self.width, q.shape[2])

    def join(self, grouped: Tensor) -> Tensor:
        """`[tokens, num_kv, width, D] -> [tokens, num_q, D]`."""
        flat = grouped.flatten(1, 2)
        if self.even:
            return flat
        return flat.index_select(1, self._places)


class Attention(nn.Module):
    """Scaled dot-product attention of this rank's heads. `kv_of_q[i]` is the local KV head that query head i reads.

    scale multiplies q.k; window is the number of tokens a query sees, itself included (None: all); softcap bounds scores
    to `softcap * tanh(score / softcap)`.
    """

    kv: Tensor  # [2, num_blocks, block_size, num_kv, head_dim], keys then values
    k_slots: Tensor  # [slots, num_kv, head_dim], views of kv
    v_slots: Tensor

    def __init__(
        self,
        num_q: int,
        kv_of_q: Sequence[int],
        num_kv: int,
        head_dim: int,
        *,
        scale: float,
        window: int | None = None,
        softcap: float | None = None,
        backend: AttentionBackend,
        device: torch.device | str | None = None,
    ) -> None:
        super().__init__()
        assert len(kv_of_q) == num_q
        self.num_q, self.num_kv, self.head_dim = num_q, num_kv, head_dim
        self.kv_of_q = tuple(kv_of_q)
        self.scale, self.window, self.softcap = scale, window, softcap
        self.groups = HeadGroups(kv_of_q, num_kv, device)
        self.backend = backend

    def bind_kv(self, kv: Tensor) -> None:
        """Use `kv [2, num_blocks, block_size, num_kv, head_dim]` as the cache. Its contents need not be initialised."""
        assert kv.dim() == 5 and kv.shape[0] == 2 and kv.shape[3:] == (self.num_kv, self.head_dim), f"KV cache of shape {tuple(kv.shape)}"
        assert kv.is_contiguous(), "the KV cache must be contiguous"
        self.kv = kv
        self.k_slots, self.v_slots = kv[0].flatten(0, 1), kv[1].flatten(0, 1)

    def forward(self, q: Tensor, k: Tensor, v: Tensor, batch: AttentionBatch) -> Tensor:
        """`q [tokens, num_q, head_dim]`, `k, v [tokens, num_kv, head_dim]` -> `[tokens, num_q * head_dim]`."""
        return self.backend.forward(self, q, k, v, batch).flatten(1)

    def extra_repr(self) -> str:
        return f"q={self.num_q}, kv={self.num_kv}, head_dim={self.head_dim}, window={self.window}, softcap={self.softcap}"
