"""`<tool_call>{"name": ..., "arguments": {...}}</tool_call>`: Qwen 2.5 and 3, Hermes."""

from __future__ import annotations

from lockstep.frontend.tools.base import Parsed, certain, partial, skip_space
from lockstep.frontend.tools.scan import Call

OPEN, CLOSE = "<tool_call>", "</tool_call>"


class Hermes:
    """Content, calls in tags, content. A tag without a call in it is content."""

    special_tokens = False

    def __init__(self, names: frozenset[str]) -> None:
        self._held, self._count = "", 0
        self._call: Call | None = None  # between the tags
        self._closing = False  # after a call, before its closing tag

    def feed(self, text: str) -> Parsed:
        out = Parsed()
        self._held += text
        while self._step(out):
            pass
        return out

    def finish(self) -> Parsed:
        out = Parsed()
        if self._call is not None and not self._call.told:
            self._held = OPEN + self._call.text + self._held
        if not (self._count and not self._held.strip()) and not (self._closing and CLOSE.startswith(self._held.strip())):
            out.content = self._held
        self._held = ""
        return out

    def _step(self, out: Parsed) -> bool:
        """Read what can be read; whether there may be more."""
        if self._call is not None:
            return self._in_call(self._call, out)
        if self._closing:
            return self._after_call()
        at = self._held.find(OPEN)
        if at >= 0:
            out.content += self._held[:at].rstrip()
            self._held, self._call = self._held[at + len(OPEN) :], Call(self._count, lambda name: True)
            return True
        sure = certain(self._held, OPEN)
        out.content, self._held = out.content + self._held[:sure], self._held[sure:]
        return False

    def _in_call(self, call: Call, out: Parsed) -> bool:
        self._held = call.feed(self._held, out)
        if call.done:
            self._call, self._closing, self._count = None, True, self._count + 1
        elif call.broken:
            self._call = None
            if call.told:
                self._closing, self._count = True, self._count + 1
            else:
                out.content += OPEN + call.text
        return self._call is None

    def _after_call(self) -> bool:
        text = skip_space(self._held)
        if text.startswith(CLOSE):
            self._held, self._closing = text[len(CLOSE) :], False
            return True
        if len(text) == partial(text, CLOSE):
            return False
        self._closing = False
        return True
