"""The KV cache's tensors: one per attention layer, cut into blocks that the scheduler hands out by number."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

import torch


class KVShape(Protocol):
    """What one attention layer of this rank keeps per token (`attention.layer.KVLayerSpec`)."""

    @property
    def num_kv_heads(self) -> int: ...
    @property
    def head_dim(self) -> int: ...


def bytes_per_block(layers: Sequence[KVShape], block_size: int, dtype: torch.dtype) -> int:
    """Bytes that one block takes over all of this rank's layers, keys and values."""
    return sum(2 * block_size * layer.num_kv_heads * layer.head_dim * dtype.itemsize for layer in layers)


def allocate(
    layers: Sequence[KVShape], num_blocks: int, block_size: int, *, dtype: torch.dtype, device: torch.device
) -> list[torch.Tensor]:
    """One tensor `[2, num_blocks, block_size, num_kv_heads, head_dim]` per layer, keys first.

    Not zeroed: a row reads only what it wrote, and on CPU pages that no request has used cost no memory.
    """
    return [torch.empty((2, num_blocks, block_size, kv.num_kv_heads, kv.head_dim), dtype=dtype, device=device) for kv in layers]
