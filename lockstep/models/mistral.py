"""Mistral (Jiang et al. 2023): Llama where every layer sees a sliding window."""

from __future__ import annotations

from lockstep.models.llama import LlamaModel


class MistralModel(LlamaModel):
    """The window comes with the spec: all layers are of kind "sliding"."""
