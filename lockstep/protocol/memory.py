"""What a rank reports of its memory."""

from __future__ import annotations

import msgspec


class RankMemory(msgspec.Struct, kw_only=True):
    """What one rank knows of its memory after loading. All in bytes."""

    rank: int
    weight_bytes: int
    free_bytes: int  # what the KV cache may take: the rank's share less weights, activations and buffers
    kv_bytes_per_block: int  # over all its layers; 0 only for a rank without attention layers
    kv_bytes: int = 0  # allocated, after initialize_kv_cache
    peak_bytes: int = 0  # peak resident (CPU) or allocated (CUDA) memory of the rank so far
    replica: int = 0  # that the rank is of; written by the router
