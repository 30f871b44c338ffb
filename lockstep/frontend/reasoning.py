"""What a model thinks before it answers, `<think>...</think>`, told apart from its answer."""

from __future__ import annotations

from typing import Literal, NamedTuple

from lockstep.frontend.tools.base import certain, partial, skip_space

OPEN, CLOSE = "<think>", "</think>"


class Thought(NamedTuple):
    """What a piece of text brought."""

    reasoning: str
    content: str


class Thinking:
    """One message as it grows. The space around the thoughts is of neither part."""

    def __init__(self, *, inside: bool) -> None:
        """inside: thoughts come first even without an opening tag, which the prompt has already."""
        self._state: Literal["start", "lead", "thoughts", "gap", "content"] = "start"
        self._inside, self._held = inside, ""

    def feed(self, text: str) -> Thought:
        """Add text; what became certain."""
        self._held += text
        reasoning, content = "", ""
        while self._held:
            before = (self._state, self._held)
            found = self._step()
            reasoning, content = reasoning + found.reasoning, content + found.content
            if before == (self._state, self._held):
                break
        return Thought(reasoning, content)

    def finish(self) -> Thought:
        """What was held back, when no text will follow."""
        held, self._held = self._held, ""
        inside = self._state in ("thoughts", "lead") or (self._state == "start" and self._inside)
        return Thought(held, "") if inside else Thought("", "" if self._state == "gap" else held)

    def _step(self) -> Thought:
        text = skip_space(self._held)
        if self._state == "start":
            if text.startswith(OPEN):
                self._state, self._held = "lead", text[len(OPEN) :]
            elif not text or len(text) == partial(text, OPEN):
                pass
            else:
                self._state = "lead" if self._inside else "content"
        elif self._state in ("lead", "gap"):
            self._held = text
            if text:
                self._state = "thoughts" if self._state == "lead" else "content"
        elif self._state == "thoughts":
            return self._think()
        else:
            self._held, text = "", self._held
            return Thought("", text)
        return Thought("", "")

    def _think(self) -> Thought:
        at = self._held.find(CLOSE)
        if at >= 0:
            thought, self._held, self._state = self._held[:at].rstrip(), self._held[at + len(CLOSE) :], "gap"
            return Thought(thought, "")
        sure = certain(self._held, CLOSE)
        thought, self._held = self._held[:sure], self._held[sure:]
        return Thought(thought, "")


# The name for --reasoning-parser -> whether thoughts come first without an opening tag.
REASONING = {"deepseek_r1": True, "qwen3": False}
