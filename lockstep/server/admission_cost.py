"""What a request asks for, from its JSON and before anything is tokenized: an estimate, for admission only.

What is of the wrong type costs nothing here: the route refuses it by name.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import compress
from typing import Any

from lockstep.server.admission import Cost
from lockstep.server.schemas.chat import MAX_MESSAGES

CHARS_PER_TOKEN = 4  # of ordinary text, roughly
APART = ("prompt", "text", "input")  # a list of texts is as many prompts
TOGETHER = ("messages", "instructions", "tools", "documents", "chat_template_kwargs")  # are written into one prompt
ENVELOPE = {*TOGETHER, "role", "content", "type", "text", "name", "function", "tool_calls", "tool_call_id", "arguments", "id"}
TEXTUAL = frozenset({str, list, dict})
MAX_ELEMENTS = MAX_MESSAGES  # of a list of prompts or messages: all others have lower bounds
SHORT = 16  # tokens of a completion whose request names no limit, as OpenAI has it


def cost_of(body: Any, max_model_len: int) -> Cost:
    """The cost of a request to any of the routes that generate."""
    if not isinstance(body, dict):
        return Cost()
    lengths = [length for name in ("prompt", "messages", "input") for length in _lengths(body.get(name), name)] or [1]
    n = max(_count(body.get("n"), 1), _count(body.get("best_of"), 1))
    limits = [_count(body.get(name), 0) for name in ("max_tokens", "max_completion_tokens", "max_output_tokens")]
    asked = max(limits) or (SHORT if "prompt" in body else max_model_len)
    each = [min(length + min(asked, max_model_len), max(length, max_model_len)) for length in lengths]
    return Cost(sequences=n * len(lengths), tokens=n * sum(each))


def characters_of(body: Any) -> int:
    """Characters of the longest prompt, where prompts are text: with all that a chat template may write into it."""
    if not isinstance(body, dict):
        return 0
    longest, together = 0, written({name: _few(body[name]) for name in TOGETHER if name in body})
    for name in APART:
        value = _few(body.get(name))
        if isinstance(value, list) and value and isinstance(value[0], int | list):
            continue  # token ids
        texts = value if isinstance(value, list) and value and isinstance(value[0], str) else [value]
        longest = max([longest, *(written(text) for text in _textual(texts) if not isinstance(text, dict))])
    return longest + together


def written(value: Any) -> int:
    """Characters of all text in a JSON value, the names of its own fields left out where they are a message's.

    A number in a list is a character, at least: templates write tools and documents as JSON.
    """
    if isinstance(value, str):
        return len(value)
    if isinstance(value, dict):
        return sum(written(one) + (0 if name in ENVELOPE else len(name)) for name, one in value.items())
    if not isinstance(value, list):
        return 0
    textual = list(_textual(value))
    return len(value) - len(textual) + sum(map(written, textual))


def ids_of(body: Any) -> tuple[str, int]:
    """(the field, how many) of the longest prompt that is token ids; none of them: 0."""
    found = ("prompt", 0)
    for name in ("prompt", "input", "input_ids"):
        value = body.get(name) if isinstance(body, dict) else None
        if isinstance(value, list) and value:
            prompts = [value] if isinstance(value[0], int) else _few(value)
            longest = max(len(one) if isinstance(one, list) and one and isinstance(one[0], int) else 0 for one in prompts)
            found = max(found, (name, longest), key=lambda one: one[1])
    return found


def _textual(values: list[Any]) -> Iterator[Any]:
    """Those that may have text: no step of Python's is made for a million others."""
    return compress(values, map(TEXTUAL.__contains__, map(type, values)))


def _few(value: Any) -> Any:
    """The same, and no more of a list than any route takes."""
    return value[:MAX_ELEMENTS] if isinstance(value, list) else value


def _lengths(value: Any, name: str) -> list[int]:
    """Tokens of each prompt, about."""
    if isinstance(value, str):
        return [_tokens(len(value))]
    if name == "messages":
        return [_tokens(_characters(_few(value)))] if isinstance(value, list) else []
    if not isinstance(value, list) or not value:
        return []
    if isinstance(value[0], int):
        return [len(value)]
    if isinstance(value[0], str | list):
        return [_tokens(len(v)) if isinstance(v, str) else len(v) if isinstance(v, list) else 1 for v in _few(value)]
    return [_tokens(_characters(_few(value)))]


def _characters(messages: Any) -> int:
    if isinstance(messages, str):
        return len(messages)
    if isinstance(messages, dict):
        return sum(_characters(messages.get(name)) for name in ("content", "text", "parts"))
    return sum(map(_characters, _textual(messages))) if isinstance(messages, list) else 0


def _tokens(characters: int) -> int:
    return max(1, characters // CHARS_PER_TOKEN)


def _count(value: Any, default: int) -> int:
    """A whole number above 0, as it is or the default; a giant one is bounded, for the route refuses it."""
    return min(value, 1 << 20) if isinstance(value, int) and not isinstance(value, bool) and value > 0 else default
