"""`[name(city="Rome", days=3), other()]`, calls as Python writes them: Gemma, Llama 3.2 and 4."""

from __future__ import annotations

import ast
import json
from typing import Literal

from lockstep.frontend.tools.base import Parsed, skip_space

STARTS = ("<|python_start|>", "<|python_tag|>")
END = "<|python_end|>"
LONGEST = 20_000  # characters of one call: it is parsed in one piece


class Pythonic:
    """A message is calls if it begins with a list of them, of functions that were offered; else it is content.

    Each call is told whole, when its closing parenthesis has come.
    """

    special_tokens = True

    def __init__(self, names: frozenset[str]) -> None:
        self._names, self._count = names, 0
        self._state: Literal["start", "calls", "after", "content"] = "start"
        self._held = ""
        self._scanned, self._depth, self._quote, self._escaped = 0, 0, "", False  # of the call in `_held`

    def feed(self, text: str) -> Parsed:
        out = Parsed()
        self._held += text
        while self._held and self._step(out):
            pass
        return out

    def finish(self) -> Parsed:
        out = Parsed()
        rest = self._held if self._state != "calls" or self._count else "[" + self._held
        if rest.strip() or not self._count:
            out.content = rest
        self._held = ""
        return out

    def _step(self, out: Parsed) -> bool:
        if self._state == "start":
            return self._begin()
        if self._state == "calls":
            return self._call(out)
        if self._state == "after":
            self._held = skip_space(self._held)
            if END.startswith(self._held) and self._held != END:
                return False
            self._held, self._state = self._held.removeprefix(END), "content"
            return True
        out.content, self._held = out.content + self._held, ""
        return False

    def _begin(self) -> bool:
        text = skip_space(self._held)
        if not text or any(s.startswith(text) for s in STARTS):
            return False
        start = next((s for s in STARTS if text.startswith(s)), "")
        text = skip_space(text.removeprefix(start))
        if not text:
            return False
        self._state = "calls" if text[0] == "[" else "content"
        if self._state == "calls":
            self._held = text[1:]
        elif start:
            self._held = text
        return True

    def _call(self, out: Parsed) -> bool:
        """Find the end of a call, and tell it."""
        while self._scanned < len(self._held):
            char, self._scanned = self._held[self._scanned], self._scanned + 1
            if self._scanned > LONGEST:
                self._give_up()
                return True
            if self._quote:
                self._in_string(char)
            elif char in "'\"":
                self._quote = char
            elif char in "([{":
                self._depth += 1
            elif char in ")]}":
                self._depth -= 1
                if self._depth <= 0:
                    return self._complete(char, out)
        return False

    def _in_string(self, char: str) -> None:
        if self._escaped:
            self._escaped = False
        elif char == "\\":
            self._escaped = True
        elif char == self._quote:
            self._quote = ""

    def _complete(self, char: str, out: Parsed) -> bool:
        text, rest = self._held[: self._scanned], self._held[self._scanned :]
        if self._depth < 0 and self._count and not text[:-1].strip(", \n\t") and char == "]":
            self._held, self._state = rest, "after"
            return True
        found = call_of(text.lstrip(", \n\t")) if self._depth == 0 else None
        if found is None or found[0] not in self._names:
            self._give_up()
            return True
        out.call(self._count, *found)
        self._held, self._scanned, self._depth, self._count = rest, 0, 0, self._count + 1
        return True

    def _give_up(self) -> None:
        self._held, self._state = ("" if self._count else "[") + self._held, "content"


def call_of(text: str) -> tuple[str, str] | None:
    """(function, arguments as JSON) of `name(key=literal, ...)`; None for anything else. Nothing is evaluated but literals."""
    try:
        node = ast.parse(text, mode="eval").body
        if not isinstance(node, ast.Call) or node.args or any(k.arg is None for k in node.keywords):
            return None
        arguments = {str(k.arg): _literal(k.value) for k in node.keywords}
        return ast.unparse(node.func), json.dumps(arguments, ensure_ascii=False)
    except (SyntaxError, ValueError, TypeError, RecursionError, MemoryError):
        return None


def _literal(node: ast.expr) -> object:
    """A literal, with JSON's words for true, false and null allowed."""
    words = {"true": True, "false": False, "null": None}
    if isinstance(node, ast.Name) and node.id in words:
        return words[node.id]
    return ast.literal_eval(node)
