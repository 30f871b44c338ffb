"""Counts of numbers by size, as Prometheus wants them: some 0.3 us for each, no lock (one thread), and sums of any two make sense."""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Sequence

import msgspec


class Histogram(msgspec.Struct, array_like=True):
    """counts[i] numbers are at most bounds[i] (and above the bound before); the last count is of those above all bounds."""

    bounds: list[float]
    counts: list[int]
    total: float = 0.0

    @classmethod
    def of(cls, bounds: Sequence[float]) -> Histogram:
        """An empty one. `bounds` must grow."""
        return cls(list(bounds), [0] * (len(bounds) + 1))

    def observe(self, value: float) -> None:
        """Count a number."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    @property
    def count(self) -> int:
        """Numbers counted."""
        return sum(self.counts)

    def add(self, other: Histogram) -> None:
        """Count all that `other`, of the same bounds, has counted."""
        assert self.bounds == other.bounds, "histograms of different bounds"
        self.counts = [a + b for a, b in zip(self.counts, other.counts, strict=True)]
        self.total += other.total

    def copy(self) -> Histogram:
        """One that goes its own way from here."""
        return Histogram(self.bounds, list(self.counts), self.total)

    def cumulative(self) -> list[tuple[str, float]]:
        """(upper bound, how many numbers are at most that), as the text format has them, "+Inf" last."""
        rows, so_far = [], 0
        for bound, count in zip([*map(_text, self.bounds), "+Inf"], self.counts, strict=True):
            so_far += count
            rows.append((bound, float(so_far)))
        return rows


def _text(bound: float) -> str:
    return repr(float(bound))


def percentile(values: Sequence[float], share: float) -> float | None:
    """The smallest value that `share` (0 to 1) of `values` do not exceed; None of nothing. `values` must be sorted."""
    return values[max(0, math.ceil(share * len(values)) - 1)] if values else None
