"""Gemma-2 (Gemma Team 2024): norms after attention and MLP too, soft caps, every second layer with a window."""

from __future__ import annotations

from lockstep.models.blocks import SandwichLayer
from lockstep.models.llama import LlamaModel


class Gemma2Model(LlamaModel):
    """Soft caps, scaled embeddings and norm weights less one come with the spec."""

    layer_class = SandwichLayer
    norms = ("input_layernorm", "post_attention_layernorm", "pre_feedforward_layernorm", "post_feedforward_layernorm")
