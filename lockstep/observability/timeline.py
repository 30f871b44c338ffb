"""What happened when, in one process: named spans of time, recorded while somebody asks for them.

The clock is CLOCK_MONOTONIC, which all processes of a host share: the timelines of the engine and of its ranks lie on
one axis as they are. While off, everything here costs one look at an attribute.
"""

from __future__ import annotations

import contextlib
import time
from array import array
from collections.abc import Sequence
from typing import Any

CAPACITY = 1 << 18  # spans; some 300 steps of 100 layers with 8 operations each
NO_STEP = -1

now_s = time.monotonic

# name, category, began_s, ended_s, step (NO_STEP: none), what else is known of it
Row = tuple[str, str, float, float, int, dict[str, Any]]
_UNNAMED: dict[str, Any] = {}


class Timeline:
    """Spans of one process. For one thread; `take` gives them away.

    A step is divided without gaps: `enter(step)`, then `lap(name)` after each part of it, then `leave()`, which also
    makes a span of the whole. What happens inside a part is a `span`, or an `add_span` when its times are known.
    """

    def __init__(self) -> None:
        self.on = False
        self.left_out = 0  # spans for which there was no room
        self._count = 0
        self._step = NO_STEP
        self._entered_s = self._lap_s = 0.0

    def start(self, capacity: int = CAPACITY) -> None:
        """Forget everything and record from now on, the first `capacity` spans."""
        # Columns of plain numbers, made at once: recording allocates nothing and gives the garbage collector no work.
        self._names, self._categories = [""] * capacity, [""] * capacity
        self._began, self._ended = array("d", bytes(8 * capacity)), array("d", bytes(8 * capacity))
        self._steps, self._args = array("q", bytes(8 * capacity)), [_UNNAMED] * capacity
        self.left_out, self._count, self._step = 0, 0, NO_STEP
        self._entered_s = self._lap_s = now_s()
        self.on = True

    def take(self) -> list[Row]:
        """Stop, and the spans recorded since `start`, in the order in which they ended."""
        if not self.on:
            return []
        columns = (self._names, self._categories, self._began, self._ended, self._steps, self._args)
        rows: list[Row] = list(zip(*(column[: self._count] for column in columns), strict=True))
        left_out = self.left_out
        self.start(0)  # lets the columns go
        self.on, self.left_out = False, left_out
        return rows

    def add_span(self, name: str, began_s: float, ended_s: float, category: str = "", step: int | None = None, **args: Any) -> None:
        """Record a span whose times (of this clock) are known. `step`: the one that was entered, unless given."""
        if not self.on:
            return
        at = self._count
        if at == len(self._names):
            self.left_out += 1
            return
        self._names[at], self._categories[at], self._began[at], self._ended[at] = name, category, began_s, ended_s
        self._steps[at] = self._step if step is None else step
        if args:
            self._args[at] = args
        self._count = at + 1

    def add_spans(self, names: Sequence[str], began_s: Sequence[float], ended_s: Sequence[float], category: str = "") -> None:
        """Record many spans of the current step at once, in the order in which they ended."""
        if not self.on:
            return
        at = self._count
        found = min(len(names), len(self._names) - at)
        end = at + found
        self._names[at:end], self._categories[at:end] = names[:found], [category] * found
        self._began[at:end], self._ended[at:end] = array("d", began_s[:found]), array("d", ended_s[:found])
        self._steps[at:end] = array("q", [self._step]) * found
        self._count = end
        self.left_out += len(names) - found

    def span(self, name: str, category: str = "", step: int | None = None, **args: Any) -> contextlib.AbstractContextManager[None]:
        """`with timeline.span(...)`: record how long the block takes."""
        return _Span(self, name, category, step, args) if self.on else _NOTHING

    def enter(self, step: int, began_s: float | None = None) -> None:
        """A step begins, now or at `began_s`."""
        if self.on:
            self._step = step
            self._entered_s = self._lap_s = now_s() if began_s is None else began_s

    def lap(self, name: str, category: str = "step") -> None:
        """The part of the step since `enter` or the last lap was `name`."""
        if self.on:
            ended_s = now_s()
            self.add_span(name, self._lap_s, ended_s, category)
            self._lap_s = ended_s

    def leave(self, **args: Any) -> None:
        """The step ended with its last lap."""
        if self.on:
            self.add_span(f"step {self._step}", self._entered_s, self._lap_s, "step", **args)
            self._step = NO_STEP


class Recorded:
    """What makes a worker recordable: its timeline, and the methods that the executor calls on every rank."""

    def __init__(self) -> None:
        self.timeline = Timeline()

    def start_timeline(self) -> None:
        """Record this rank's steps from now on."""
        self.timeline.start()

    def take_timeline(self) -> tuple[list[Row], int]:
        """Stop; the spans since the start, and how many more there was no room for."""
        return self.timeline.take(), self.timeline.left_out


class _Span:
    def __init__(self, timeline: Timeline, name: str, category: str, step: int | None, args: dict[str, Any]) -> None:
        self._timeline, self._name, self._category, self._step, self._args = timeline, name, category, step, args

    def __enter__(self) -> None:
        self._began_s = now_s()

    def __exit__(self, *_: object) -> None:
        self._timeline.add_span(self._name, self._began_s, now_s(), self._category, self._step, **self._args)


_NOTHING = contextlib.nullcontext()
