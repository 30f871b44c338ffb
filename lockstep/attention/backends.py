"""The attention backends by name."""

from __future__ import annotations

from collections.abc import Callable

from lockstep.attention.layer import AttentionBackend
from lockstep.attention.torch_backend import TorchAttention

BACKENDS: dict[str, Callable[[], AttentionBackend]] = {"torch": TorchAttention}


def make_backend(name: str = "torch") -> AttentionBackend:
    """A new backend for one model. Raises ValueError for an unknown name."""
    if name not in BACKENDS:
        raise ValueError(f"attention backend {name!r} is not known: use one of {', '.join(sorted(BACKENDS))}.")
    return BACKENDS[name]()
