"""`[TOOL_CALLS][{"name": ..., "arguments": {...}}, ...]`, and the later `[TOOL_CALLS]name{...}` or `[TOOL_CALLS]name[ARGS]{...}`."""

from __future__ import annotations

from typing import Literal

from lockstep.frontend.tools.base import Parsed, certain, skip_space
from lockstep.frontend.tools.scan import Calls, Value

MARK = "[TOOL_CALLS]"
LONGEST_NAME = 256  # characters between the mark and the arguments, call id included


class Mistral:
    """Content, then calls. What follows the mark and is no call is content."""

    special_tokens = True

    def __init__(self, names: frozenset[str]) -> None:
        self._state: Literal["content", "kind", "list", "name", "arguments"] = "content"
        self._held, self._count = "", 0
        self._calls, self._value = Calls(lambda name: True), Value()

    def feed(self, text: str) -> Parsed:
        out = Parsed()
        self._held += text
        while self._held and self._step(out):
            pass
        return out

    def finish(self) -> Parsed:
        out = Parsed()
        if self._state == "list" and not self._calls.told:
            self._held = MARK + self._calls.text + self._held
        elif self._state in ("kind", "name"):
            self._held = MARK + self._held
        if self._held.strip() or not self._count:
            out.content = self._held
        self._held = ""
        return out

    def _step(self, out: Parsed) -> bool:
        if self._state == "content":
            return self._content(out)
        if self._state == "kind":
            return self._choose()
        if self._state == "list":
            return self._list(out)
        return self._named(out) if self._state == "name" else self._arguments(out)

    def _content(self, out: Parsed) -> bool:
        at = self._held.find(MARK)
        end = at if at >= 0 else certain(self._held, MARK)
        out.content += self._held[:end].rstrip() if at >= 0 else self._held[:end]
        self._held = self._held[end + len(MARK) :] if at >= 0 else self._held[end:]
        if at >= 0:
            self._state = "kind"
        return at >= 0

    def _choose(self) -> bool:
        self._held = skip_space(self._held)
        if self._held:
            self._state = "list" if self._held[0] == "[" else "name"
            self._calls = Calls(lambda name: True, self._count)
        return bool(self._held)

    def _list(self, out: Parsed) -> bool:
        self._held = self._calls.feed(self._held, out)
        if self._calls.broken and not self._calls.told:
            out.content += MARK + self._calls.text
        if self._calls.done or self._calls.broken:
            self._state, self._count = "content", self._calls.count
        return self._state == "content"

    def _named(self, out: Parsed) -> bool:
        head, brace, _ = self._held.partition("{")
        name = head.partition("[")[0].strip()
        if len(head) > LONGEST_NAME or MARK in head or (brace and not name):
            out.content, self._state = out.content + MARK, "content"
        elif brace:
            self._state, self._held, self._value = "arguments", self._held[len(head) :], Value()
            out.call(self._count, name, "")
        return self._state != "name"

    def _arguments(self, out: Parsed) -> bool:
        for at, char in enumerate(self._held):
            if self._value.take(char) == "last":
                out.call(self._count, None, self._held[: at + 1])
                self._held, self._state, self._count = self._held[at + 1 :], "content", self._count + 1
                return True
        out.call(self._count, None, self._held)
        self._held = ""
        return False
