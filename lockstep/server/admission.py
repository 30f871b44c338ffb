"""Who is let in, and who is told to come back later. Pure: no socket, no task, and the clock is handed in.

The engine queues what it cannot run yet, without end. Here that queue gets one: beyond what the engine runs at once, so many
sequences may wait, so many tokens may be owed, and so many requests may be one client's. Who is refused hears when to try again:
that follows from how fast requests have been ending.
"""

from __future__ import annotations

import math
import time
from collections import Counter, deque
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

REASONS = ("queue", "tokens", "client")  # which bound: sequences that wait, tokens that are owed, requests of one client
WINDOW_S = 30.0  # over which the rate is measured
LEAST_S, MOST_S, GUESS_S = 1, 60, 5  # of a Retry-After; the guess is for when nothing has ended yet


@dataclass(frozen=True)
class Bounds:
    """running: sequences that the engine runs at once. queued: those that may wait beyond. tokens, per_key: None is no bound."""

    running: int
    queued: int
    tokens: int | None = None
    per_key: int | None = None


@dataclass(frozen=True)
class Cost:
    """What a request asks for. sequences: prompts times n. tokens: of prompt and output, at most, of all sequences together."""

    sequences: int = 1
    tokens: int = 1


class Busy(Exception):
    """Not now: again in `retry_after_s` seconds."""

    def __init__(self, message: str, retry_after_s: int) -> None:
        super().__init__(message)
        self.retry_after_s = retry_after_s


class NeverFits(ValueError):
    """Not now and not later."""


class Ticket:
    """An admitted request; it counts until it is left. A context manager, sync or async."""

    def __init__(self, admission: Admission, cost: Cost, key: str) -> None:
        self.cost, self.key = cost, key
        self._admission: Admission | None = admission

    def leave(self) -> None:
        """It has ended. May be called twice."""
        admission, self._admission = self._admission, None
        if admission is not None:
            admission._left(self)

    def __enter__(self) -> Ticket:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.leave()

    async def __aenter__(self) -> Ticket:
        return self

    async def __aexit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.leave()


class Admission:
    """The books of one API process: what was let in and has not ended."""

    def __init__(self, bounds: Bounds, clock: Callable[[], float] = time.monotonic) -> None:
        self.bounds, self._clock = bounds, clock
        self.requests, self.sequences, self.tokens = 0, 0, 0
        self.refused = dict.fromkeys(REASONS, 0)  # so far, for want of room
        self._by_key: Counter[str] = Counter()
        self._ended: deque[tuple[float, Cost]] = deque()  # (when, what) of the last WINDOW_S

    def admit(self, cost: Cost, key: str = "") -> Ticket:
        """Let a request in. Raises Busy when there is no room, NeverFits when there never will be; then nothing is counted."""
        self._check(cost, key)
        self.requests, self.sequences, self.tokens = self.requests + 1, self.sequences + cost.sequences, self.tokens + cost.tokens
        self._by_key[key] += 1
        return Ticket(self, cost, key)

    def _check(self, cost: Cost, key: str) -> None:
        bounds = self.bounds
        room = bounds.running + bounds.queued
        if cost.sequences > room:
            raise NeverFits(
                f"a request of {cost.sequences} sequences (prompts times n) is more than the {room} that may run and wait: split it."
            )
        if bounds.tokens is not None and cost.tokens > bounds.tokens:
            raise NeverFits(f"a request of up to {cost.tokens} tokens (times n) is over max_queued_tokens={bounds.tokens}: ask for fewer.")
        if bounds.per_key is not None and self._by_key[key] >= bounds.per_key:
            self._refuse("client", f"this client has {bounds.per_key} requests running, as many as it may (max_concurrency_per_key)", 0, 0)
        over = self.sequences + cost.sequences - room
        if over > 0:
            self._refuse(
                "queue",
                f"the queue is full: {max(0, self.sequences - bounds.running)} sequences wait (max_num_queued_reqs={bounds.queued})",
                over,
                0,
            )
        owed = self.tokens + cost.tokens - (bounds.tokens or math.inf)
        if owed > 0:
            self._refuse("tokens", f"the queue is full: {self.tokens} tokens are owed (max_queued_tokens={bounds.tokens})", 0, int(owed))

    def _refuse(self, reason: str, why: str, sequences: int, tokens: int) -> None:
        self.refused[reason] += 1
        after_s = self.retry_after_s(sequences, tokens)
        raise Busy(f"{why}: try again in {after_s} s.", after_s)

    def retry_after_s(self, sequences: int, tokens: int) -> int:
        """Seconds until so many sequences, or tokens, will have ended at the rate of the last WINDOW_S."""
        now_s = self._clock()
        self._forget(now_s)
        if not self._ended:
            return GUESS_S
        span_s = max(now_s - self._ended[0][0], 1.0)
        done = sum(cost.tokens if tokens else cost.sequences for _, cost in self._ended)
        return min(MOST_S, max(LEAST_S, math.ceil((tokens or sequences or 1) * span_s / max(done, 1))))

    def _forget(self, now_s: float) -> None:
        """Drop what ended before the window: here and not only where the rate is asked for, or a server that refuses nobody would
        remember every request for as long as it runs."""
        while self._ended and self._ended[0][0] < now_s - WINDOW_S:
            self._ended.popleft()

    def _left(self, ticket: Ticket) -> None:
        cost, key = ticket.cost, ticket.key
        self.requests, self.sequences, self.tokens = self.requests - 1, self.sequences - cost.sequences, self.tokens - cost.tokens
        self._by_key[key] -= 1
        if not self._by_key[key]:
            del self._by_key[key]
        now_s = self._clock()
        self._ended.append((now_s, cost))
        self._forget(now_s)
        assert self.requests >= 0 and self.sequences >= 0 and self.tokens >= 0, "more requests left than came"
