"""Qwen-3 (Yang et al. 2025), dense: Llama with a norm on each query and key head."""

from __future__ import annotations

from lockstep.models.llama import LlamaModel


class Qwen3Model(LlamaModel):
    """The head norms come with the spec: `qk_norm`."""
