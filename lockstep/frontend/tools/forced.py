"""Calls that a schema forced the model to write, so that no marker is needed."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lockstep.frontend.tools.base import Parsed
from lockstep.frontend.tools.scan import Calls

NO_PARAMETERS: Mapping[str, Any] = {"type": "object", "properties": {}}


class Required:
    """The whole text is a list of calls: `tool_choice: "required"`."""

    special_tokens = False

    def __init__(self, names: frozenset[str]) -> None:
        self._calls = Calls(names.__contains__)

    def feed(self, text: str) -> Parsed:
        out = Parsed()
        rest = self._calls.feed(text, out)
        if self._calls.broken and not self._calls.told:
            out.content = self._calls.text + rest
            self._calls.text = ""
        return out

    def finish(self) -> Parsed:
        return Parsed("" if self._calls.told or self._calls.broken else self._calls.text)


class Named:
    """The whole text is the arguments of one function: a `tool_choice` that names it."""

    special_tokens = False

    def __init__(self, name: str) -> None:
        self._name: str | None = name

    def feed(self, text: str) -> Parsed:
        out = Parsed()
        if text:
            out.call(0, self._name, text)
            self._name = None
        return out

    def finish(self) -> Parsed:
        return Parsed()


def list_schema(functions: Sequence[Mapping[str, Any]], *, several: bool) -> dict[str, Any]:
    """The schema of a list of calls. functions: `{"name", "parameters"}`. Raises ValueError when their $defs contradict each other."""
    definitions: dict[str, Any] = {}
    items = []
    for function in functions:
        parameters = dict(function.get("parameters") or NO_PARAMETERS)
        for name, meaning in (parameters.pop("$defs", None) or {}).items():  # a reference counts from the whole schema's root
            if definitions.setdefault(name, meaning) != meaning:
                raise ValueError(f"tools define $defs.{name} in two ways: give one of them another name.")
        properties = {"name": {"type": "string", "enum": [function["name"]]}, "parameters": parameters}
        items.append({"type": "object", "properties": properties, "required": ["name", "parameters"], "additionalProperties": False})
    schema: dict[str, Any] = {"type": "array", "minItems": 1, "items": {"anyOf": items} if len(items) > 1 else items[0]}
    if not several:
        schema["maxItems"] = 1
    if definitions:
        schema["$defs"] = definitions
    return schema
