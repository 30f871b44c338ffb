"""`{"name": ..., "parameters": {...}}; {...}`, with or without `<|python_tag|>` before it: Llama 3.1 to 3.3."""

from __future__ import annotations

from typing import Literal

from lockstep.frontend.tools.base import Parsed, skip_space
from lockstep.frontend.tools.scan import Call

TAG = "<|python_tag|>"


class Llama3Json:
    """A message is calls if it begins with one of a function that was offered; else it is content."""

    special_tokens = True

    def __init__(self, names: frozenset[str]) -> None:
        self._accept = names.__contains__
        self._state: Literal["start", "call", "between", "content"] = "start"
        self._held, self._call = "", Call(0, self._accept)
        self._count = 0
        self._between = ""  # what stood between the last call and this one

    def feed(self, text: str) -> Parsed:
        out = Parsed()
        self._held += text
        while self._held and self._step(out):
            pass
        return out

    def finish(self) -> Parsed:
        out = Parsed()
        if self._state == "call" and not self._call.told:
            out.content = self._between + self._call.text
        elif self._state != "between":
            out.content = self._held
        self._held = ""
        return out

    def _step(self, out: Parsed) -> bool:
        if self._state == "start":
            return self._begin()
        if self._state == "call":
            return self._in_call(out)
        if self._state == "between":
            return self._next_call()
        out.content, self._held = out.content + self._held, ""
        return False

    def _begin(self) -> bool:
        text = skip_space(self._held)
        if TAG.startswith(text) and text != TAG:
            return False
        tagged, text = text.startswith(TAG), skip_space(text.removeprefix(TAG))
        if not text:
            return False
        if tagged:
            self._held = text
        if text[0] == "{":
            self._between, self._held = self._held[: self._held.index("{")], text
        self._state = "call" if text[0] == "{" else "content"
        return True

    def _in_call(self, out: Parsed) -> bool:
        self._held = self._call.feed(self._held, out)
        if self._call.done:
            self._state, self._between, self._count = "between", "", self._count + 1
            self._call = Call(self._count, self._accept)
        elif self._call.broken:
            self._held = ("" if self._call.told else self._between + self._call.text) + self._held
            self._state = "content"
        return self._state != "call"

    def _next_call(self) -> bool:
        while self._held and self._held[0] in "; \t\r\n":
            self._between, self._held = self._between + self._held[0], self._held[1:]
        if self._held:
            self._state = "call" if self._held[0] == "{" else "content"
        return bool(self._held)
