"""lockstep: one model, many devices, the same answer: bit for bit on CPU by default."""

from __future__ import annotations

from lockstep.version import __version__

TYPE_CHECKING = False  # that of `typing`, without the time: the command sees to Ctrl-C after this
if TYPE_CHECKING:
    from typing import Any

    from lockstep.llm import LLM
    from lockstep.protocol import SamplingParams, StructuredOutputs

__all__ = ["LLM", "SamplingParams", "StructuredOutputs", "__version__"]


def __getattr__(name: str) -> Any:
    """Load the heavy names on first use, so that `import lockstep` stays instant."""
    if name == "LLM":
        from lockstep.llm import LLM

        return LLM
    if name == "SamplingParams":
        from lockstep.protocol import SamplingParams

        return SamplingParams
    if name == "StructuredOutputs":
        from lockstep.protocol import StructuredOutputs

        return StructuredOutputs
    raise AttributeError(f"module 'lockstep' has no attribute {name!r}")
