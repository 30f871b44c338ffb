"""Attention written out token by token, and a paged cache to compare a backend with it."""

from __future__ import annotations

import random
from collections.abc import Sequence

import torch
from torch import Tensor

from lockstep.attention.batch import AttentionBatch
from lockstep.attention.layer import Attention


def reference_attention(layer: Attention, q: Tensor, keys: Tensor, values: Tensor, position: int) -> Tensor:
    """One query `[num_q, D]` at `position` of its row, over all `keys, values [length, num_kv, D]`, in float64: `[num_q, D]`."""
    first = 0 if layer.window is None else max(0, position + 1 - layer.window)
    out = []
    for head in range(layer.num_q):
        kv = layer.kv_of_q[head]
        scores = keys[first : position + 1, kv].double() @ q[head].double() * layer.scale
        if layer.softcap is not None:
            scores = layer.softcap * torch.tanh(scores / layer.softcap)
        out.append(scores.softmax(0) @ values[first : position + 1, kv].double())
    return torch.stack(out)


class Rows:
    """Rows of random queries, keys and values over a cache whose blocks are dealt in random order and begin as `fill`."""

    def __init__(
        self,
        layer: Attention,
        lengths: Sequence[int],
        *,
        block_size: int,
        seed: int = 0,
        dtype: torch.dtype = torch.float32,
        device: torch.device | str = "cpu",
        fill: float = torch.nan,
    ) -> None:
        generator = torch.Generator().manual_seed(seed)
        self.layer, self.block_size, self.device, self.done = layer, block_size, torch.device(device), [0] * len(lengths)
        needs = [-(-n // block_size) for n in lengths]
        blocks = random.Random(seed).sample(range(sum(needs) + 2), sum(needs) + 2)
        self.tables = [[blocks.pop() for _ in range(need)] for need in needs]
        shape = (2, sum(needs) + 2, block_size, layer.num_kv, layer.head_dim)
        layer.bind_kv(torch.full(shape, fill, dtype=dtype, device=device))

        def draw(heads: int) -> list[Tensor]:
            return [torch.randn(n, heads, layer.head_dim, generator=generator).to(dtype) for n in lengths]

        self.q, self.k, self.v = draw(layer.num_q), draw(layer.num_kv), draw(layer.num_kv)

    def step(self, counts: Sequence[int], order: Sequence[int] | None = None, advance: bool = True) -> tuple[Tensor, Tensor]:
        """Compute the next `counts[i]` tokens of row i, rows in `order`: the backend's result and the oracle's (float64)."""
        rows = [i for i in (order or range(len(counts))) if counts[i]]
        spans = [(i, self.done[i], self.done[i] + counts[i]) for i in rows]
        batch = AttentionBatch.build(
            [counts[i] for i in rows], [end for _, _, end in spans], [self.tables[i] for i in rows], self.block_size, self.device
        )

        def take(source: list[Tensor]) -> Tensor:
            return torch.cat([source[i][start:end] for i, start, end in spans]).to(self.device)

        with torch.inference_mode():
            found = self.layer(take(self.q), take(self.k), take(self.v), batch)
        wanted = [
            reference_attention(self.layer, self.q[i][at], self.k[i], self.v[i], at).flatten()
            for i, start, end in spans
            for at in range(start, end)
        ]
        if advance:
            for i, _, end in spans:
                self.done[i] = end
        return found, torch.stack(wanted)
