"""The error of a prompt that cannot be read."""

from __future__ import annotations


class PromptError(ValueError):
    """A prompt, a conversation or what was given with it cannot be used. The message says which, and what to give."""
