"""Qwen-2 (Yang et al. 2024): Llama with biases on q, k and v, and optionally sliding windows in the upper layers."""

from __future__ import annotations

from lockstep.models.llama import LlamaModel


class Qwen2Model(LlamaModel):
    """The biases come with the spec: `attention_bias` without `attention_out_bias`."""
