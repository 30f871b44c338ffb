"""Tokens to text as they come: never a partial character, never a taken-back one, stop strings found across borders."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

Decode = Callable[[Sequence[int]], str]

UNKNOWN = "\ufffd"  # what a decoder writes for bytes that are not (or not yet) a character
CONTEXT = 8  # tokens kept before the newest text: a character has at most 4 bytes, and merges look back no further
WINDOW = 24  # decoded at once before the oldest are let go
PATIENCE = 8  # tokens that an unfinished character may take before its bytes are taken for garbage


class Detokenizer:
    """The text of one growing list of tokens.

    Only a window of the last tokens is decoded at each call; `_done` of its characters were given out before. The text
    of the calls, joined, equals the decoding of all tokens at once. (Vocabularies that spell unknown characters byte by
    byte decode half a character as if all bytes before it were broken too; here what was whole stays whole.)
    """

    def __init__(self, decode: Decode, *, context: Iterable[int] = (), skip: frozenset[int] = frozenset()) -> None:
        """`context`: the prompt's tokens, so that the first word keeps its space. `skip`: ids that have no text."""
        self._decode, self._skip = decode, skip
        self._waiting = 0  # tokens since text was last given out
        self._window, self._done = self._tail([t for t in context if t not in skip][-2 * CONTEXT :])

    def extend(self, token_ids: Sequence[int]) -> str:
        """Add tokens; the text that became certain."""
        new = [t for t in token_ids if t not in self._skip]
        if not new:
            return ""
        self._window += new
        self._waiting += len(new)
        text = self._decode(self._window)
        if not text.endswith(UNKNOWN):
            out = self._give(text, len(text))
            if len(self._window) > WINDOW:
                self._window, self._done = self._tail(self._window)
            return out
        if self._waiting <= PATIENCE:
            return self._give(text, len(text.rstrip(UNKNOWN)))
        out = self._give(text, len(text) - 1)
        if len(self._window) > 4 * WINDOW:  # garbage without end: let go of the oldest of it
            held = len(text) - self._done
            self._window = self._window[-CONTEXT - self._waiting :]
            self._done = max(0, len(self._decode(self._window)) - held)
        return out

    def finish(self) -> str:
        """What was held back, when no token will follow."""
        text = self._decode(self._window) if self._window else ""
        return self._give(text, len(text))

    def _give(self, text: str, certain: int) -> str:
        out = text[self._done : certain]
        if out:
            self._done, self._waiting = certain, 0
        return out

    def _tail(self, tokens: list[int]) -> tuple[list[int], int]:
        """The last tokens, beginning with a whole character, and how many characters they are."""
        text = ""
        for back in range(CONTEXT, CONTEXT + 4):
            text = self._decode(tokens[-back:]) if tokens else ""
            if not text.startswith(UNKNOWN) or back >= len(tokens):
                return tokens[-back:], len(text)
        return tokens[-CONTEXT - 3 :], len(text)


class StopChecker:
    """Holds text back while it could still become a stop string, and cuts it where one is complete."""

    def __init__(self, stops: Sequence[str], *, include: bool = False) -> None:
        self._stops, self._include = tuple(stops), include
        self._held = ""
        self.matched: str | None = None

    def feed(self, text: str, *, may_stop: bool = True) -> str:
        """Add text; what of it may be shown. After a match `matched` is set and nothing more is shown."""
        if not self._stops:  # most requests, and every token of them
            return text
        if self.matched is not None:
            return ""
        text, self._held = self._held + text, ""
        if not may_stop:
            return text
        found = min(((at, i) for i, s in enumerate(self._stops) if (at := text.find(s)) >= 0), default=None)
        if found is not None:
            at, i = found
            self.matched = self._stops[i]
            return text[: at + (len(self.matched) if self._include else 0)]
        keep = self._prefix_at_end(text)
        self._held = text[len(text) - keep :]
        return text[: len(text) - keep]

    def finish(self) -> str:
        """What was held back, when no text will follow."""
        held, self._held = self._held, ""
        return "" if self.matched is not None else held

    def _prefix_at_end(self, text: str) -> int:
        """Length of the longest end of `text` with which a stop string begins."""
        longest = min(len(text), max((len(s) for s in self._stops), default=1) - 1)
        return next((k for k in range(longest, 0, -1) if any(s.startswith(text[-k:]) for s in self._stops)), 0)
