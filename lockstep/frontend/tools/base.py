"""What every tool-call parser is: text in, in any pieces; content and calls out."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Protocol


@dataclass(frozen=True)
class CallDelta:
    """News of one call. `name` is set in its first delta, and only there; `arguments` is a piece of its JSON text."""

    index: int  # of the call in its message
    name: str | None
    arguments: str


@dataclass
class Parsed:
    """What a piece of text brought."""

    content: str = ""
    calls: list[CallDelta] = field(default_factory=list)

    def call(self, index: int, name: str | None, arguments: str) -> None:
        """Add to a call; what belongs to the last delta becomes part of it, so that one piece gives one delta for each call."""
        if self.calls and self.calls[-1].index == index and name is None:
            last = self.calls.pop()
            self.calls.append(CallDelta(index, last.name, last.arguments + arguments))
        elif name is not None or arguments:
            self.calls.append(CallDelta(index, name, arguments))


class ToolParser(Protocol):
    """One message as it grows. All deltas together do not depend on how the text was cut."""

    @property
    def special_tokens(self) -> bool:
        """Whether its markers are special tokens, so that the text must have them."""

    def feed(self, text: str) -> Parsed:
        """Add text; what became certain."""

    def finish(self) -> Parsed:
        """What was held back, when no text will follow."""


Accept = Callable[[str], bool]  # whether a function of this name may be called


def partial(text: str, marker: str) -> int:
    """Length of the longest end of `text` with which `marker` begins (and does not end)."""
    longest = min(len(text), len(marker) - 1)
    return next((k for k in range(longest, 0, -1) if marker.startswith(text[-k:])), 0)


def certain(text: str, marker: str) -> int:
    """How much of `text` is content whatever follows: not what may be the marker, nor the space before it."""
    return len(text[: len(text) - partial(text, marker)].rstrip())


def skip_space(text: str) -> str:
    return text.lstrip(" \t\r\n")
