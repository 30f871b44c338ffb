"""How large a constraint may be, checked before a library sees it: so that none costs a server its memory or its time.

The library counts its own work as well (`compiled.limits`); what is refused here is what it would not survive or notice.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator
from typing import Any

import msgspec

from lockstep.protocol import StructuredOutputs

MAX_BYTES = 64 << 10  # of a schema, a grammar, or all choices together
MAX_REGEX_BYTES = 8 << 10
MAX_DEPTH = 64  # schemas in schemas
MAX_MULTIPLE = 5000  # an automaton that divides has so many states
_EMBEDDED = re.compile(r"%\s*(json|llguidance)\b")


class GrammarError(ValueError):
    """A constraint that cannot be used. The message says why, and what to do."""


def checked_schema(wanted: StructuredOutputs) -> str:
    """The JSON schema of `json` or `json_object` as compact text, within bounds. Raises GrammarError."""
    if wanted.json_object:
        return '{"type":"object"}'
    given = wanted.json
    if isinstance(given, str):
        _check_size("json", given, MAX_BYTES)
    try:
        schema = msgspec.json.decode(given) if isinstance(given, str) else given
        depth, multiples = _measure(schema)
        if depth > 2 * MAX_DEPTH:
            raise GrammarError(f"structured_outputs.json is nested {depth} deep, over {2 * MAX_DEPTH}: use $defs, or a flatter schema.")
        schema = {} if schema is True else schema
        if not isinstance(schema, dict):
            raise GrammarError(f"structured_outputs.json is a {type(schema).__name__}: a JSON schema is an object.")
        text = json.dumps(schema, separators=(",", ":"), allow_nan=False)
    except (msgspec.DecodeError, RecursionError, TypeError, ValueError, OverflowError) as e:
        if isinstance(e, GrammarError):
            raise
        raise GrammarError(f"structured_outputs.json is no JSON: {e}.") from None
    _check_size("json", text, MAX_BYTES)
    if multiples > MAX_MULTIPLE:
        raise GrammarError(
            f"structured_outputs.json has multipleOf with the common multiple {multiples}, over {MAX_MULTIPLE}: leave it out, or round it."
        )
    return text


def check_text(wanted: StructuredOutputs) -> None:
    """Raise GrammarError when a regex, a grammar, choices or a whitespace pattern are too large."""
    if wanted.regex is not None:
        _check_size("regex", wanted.regex, MAX_REGEX_BYTES)
    if wanted.whitespace_pattern is not None:
        _check_size("whitespace_pattern", wanted.whitespace_pattern, MAX_REGEX_BYTES)
    if wanted.choice is not None:
        _check_size("choice", "".join(wanted.choice), MAX_BYTES)
    if wanted.grammar is not None:
        _check_size("grammar", wanted.grammar, MAX_BYTES)
        found = _EMBEDDED.search(wanted.grammar)
        if found:
            raise GrammarError(f"structured_outputs.grammar has {found.group()}: give a schema as json instead.")


def _check_size(name: str, text: str, most: int) -> None:
    try:
        size = len(text.encode())
    except UnicodeEncodeError:
        raise GrammarError(f"structured_outputs.{name} has half of a surrogate pair in it, which is no character.") from None
    if size > most:
        raise GrammarError(f"structured_outputs.{name} has {size} bytes, over {most}: make it smaller.")


def _measure(schema: Any) -> tuple[int, int]:
    """(how deep containers are nested, the least common multiple of all `multipleOf`)."""
    deepest, multiple = 0, 1
    for depth, container in _containers(schema):
        deepest = max(deepest, depth)
        if depth > 2 * MAX_DEPTH:
            break
        if isinstance(container, dict):
            multiple = min(math.lcm(multiple, _significand(container.get("multipleOf"))), 1 << 62)
    return deepest, multiple


def _containers(schema: Any) -> Iterator[tuple[int, Any]]:
    """Every dict and list in `schema`, with its depth; without recursion, since nothing is known of it yet."""
    stack = [(1, schema)]
    while stack:
        depth, value = stack.pop()
        if isinstance(value, dict | list):
            yield depth, value
            stack += [(depth + 1, v) for v in (value.values() if isinstance(value, dict) else value)]


def _significand(value: Any) -> int:
    """The digits of a number without its point: what a divisor costs. 1 for what is no number."""
    if isinstance(value, bool) or not isinstance(value, int | float) or not value or not math.isfinite(value):
        return 1
    digits = f"{abs(value):.15g}".partition("e")[0].replace(".", "").strip("0") if isinstance(value, float) else str(abs(value))
    return int(digits[:18] or "1")
