"""A stream's outputs gathered to chunks of several tokens, where the client asked for it."""

from __future__ import annotations

from dataclasses import replace

from lockstep.frontend.outputs import CompletionOutput


class Pace:
    """The first token at once, then so many at a time. For one request's choices."""

    def __init__(self, interval: int) -> None:
        self._interval = interval
        self._held: dict[int, CompletionOutput] = {}
        self._begun: set[int] = set()

    def take(self, choice: int, new: CompletionOutput) -> CompletionOutput | None:
        """What is to be written now."""
        if self._interval <= 1:
            return new
        held = self._held.pop(choice, None)
        if held is not None:
            logprobs = None if new.logprobs is None else [*(held.logprobs or ()), *new.logprobs]
            new = replace(new, text=held.text + new.text, token_ids=held.token_ids + new.token_ids, logprobs=logprobs)
        if choice in self._begun and not new.finished and len(new.token_ids) < self._interval:
            self._held[choice] = new
            return None
        self._begun.add(choice)
        return new
