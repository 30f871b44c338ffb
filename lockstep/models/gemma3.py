"""Gemma-3 text (Gemma Team 2025): Gemma-2 with head norms instead of soft caps, and a rope of their own for sliding layers."""

from __future__ import annotations

from lockstep.models.gemma2 import Gemma2Model


class Gemma3Model(Gemma2Model):
    """The head norms and the second rope come with the spec: `qk_norm`, `rope_local`."""
