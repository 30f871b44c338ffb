"""Calls of functions found in a model's text, for each way in which model families write them."""

from __future__ import annotations

from collections.abc import Callable

from lockstep.frontend.tools.base import CallDelta, Parsed, ToolParser
from lockstep.frontend.tools.forced import Named, Required, list_schema
from lockstep.frontend.tools.hermes import Hermes
from lockstep.frontend.tools.llama import Llama3Json
from lockstep.frontend.tools.mistral import Mistral
from lockstep.frontend.tools.pythonic import Pythonic

__all__ = ["PARSERS", "CallDelta", "Named", "Parsed", "Required", "ToolParser", "family_parser", "list_schema"]

# The name for --tool-call-parser -> its parser, made for one message with the names of the functions that were offered.
PARSERS: dict[str, Callable[[frozenset[str]], ToolParser]] = {
    "hermes": Hermes,
    "llama3_json": Llama3Json,
    "mistral": Mistral,
    "pythonic": Pythonic,
}
FAMILIES = {"Qwen": "hermes", "Llama": "llama3_json", "Mistral": "mistral", "Gemma": "pythonic"}


def family_parser(architecture: str) -> str:
    """The parser of a model's family, by its architecture, like Qwen2ForCausalLM."""
    return next((parser for family, parser in FAMILIES.items() if architecture.startswith(family)), "hermes")
