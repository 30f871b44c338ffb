"""Measured samples beside a formula: how far off it was there, interpolated between them.

A table keeps log(measured / predicted) at the sampled arguments. Between samples that correction is linear in the logarithms
of the arguments. Beyond them it fades: at eight times the last sampled value (or an eighth of the first) nothing is left of it, so a
price goes over into the formula's without a step. Only below the smallest size of a step, a context or a message it stays: what is left
of these is a kernel's launch, and that the smallest sample tells.

    arguments (n, k, m): every (n, k) that was sampled has a curve over m, and the curves of the four (n, k) around the asked
    one make its own. That one is kept, since a search asks for many m of the same (n, k).
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from typing import NamedTuple, Union

# How far beyond the last sample a correction is felt, as a logarithm. Samples at the borders of the H100's tables, predicted by those
# within them, are 1 to 5 points less off at a factor of 8 than at one of 2, and no better at 16.
REACH = math.log(8)
KEPT = 4096  # curves of a table

Row = Sequence[float]  # the arguments, and the seconds
Correction = tuple[float, float]  # what to add to the logarithm of the formula's seconds; 1 among samples, 0 where none is near
Nested = Union["Leaf", "Axis"]
NOTHING: Correction = (0.0, 0.0)


class Curve(NamedTuple):
    """Corrections over the logarithm of a size: straight between `xs`, which ascend, the first one below them, and none above."""

    xs: Sequence[float]
    corrections: Sequence[Correction]

    def at(self, x: float) -> Correction:
        """The correction at the logarithm `x`."""
        xs, i = self.xs, bisect_left(self.xs, x)
        if i == len(xs):
            return NOTHING
        if i == 0 or xs[i] == x:
            return self.corrections[i]
        part = (x - xs[i - 1]) / (xs[i] - xs[i - 1])
        (low, low_share), (high, high_share) = self.corrections[i - 1], self.corrections[i]
        return low + part * (high - low), low_share + part * (high_share - low_share)


def mixed(parts: Sequence[tuple[float, Curve]]) -> Curve:
    """The sum of (weight, curve): straight between the points of all of them."""
    if len(parts) == 1 and parts[0][0] == 1:
        return parts[0][1]
    xs = sorted({x for _, curve in parts for x in curve.xs})
    found = []
    for x in xs:
        each = [(weight, *curve.at(x)) for weight, curve in parts]
        found.append((sum(w * log for w, log, _ in each), sum(w * share for w, _, share in each)))
    return Curve(xs, found)


def rising(values: Iterable[float]) -> list[float]:
    """The nearest values, in squares, that never fall: neighbours in the wrong order both become their mean (pool adjacent violators)."""
    pools: list[tuple[float, int]] = []  # (mean, how many)
    for value in values:
        mean, count = value, 1
        while pools and pools[-1][0] > mean:
            before, many = pools.pop()
            mean, count = (before * many + mean * count) / (many + count), many + count
        pools.append((mean, count))
    return [mean for mean, count in pools for _ in range(count)]


class Leaf:
    """Samples that differ in their last argument alone. The formula is asked when the curve is, so only where somebody looks.

    More work never takes less time: the search relies on it, and a kernel could always be given more. So a sample that takes
    longer than a larger one is noise, or a poor choice of kernel, and is taken with it. (Between two samples, where ratio and
    formula bend against each other, a price of an H100 may still fall by up to 3 %, which is less than its error.)
    """

    def __init__(self, rows: Sequence[Row], last: int, predict: Callable[[Row], float]) -> None:
        self._rows, self._last, self._predict = rows, last, predict

    @cached_property
    def curve(self) -> Curve:
        """The corrections at the samples, and nothing at `REACH` above them."""
        found: dict[float, list[Row]] = {}  # the same arguments may have been measured more than once
        for row in self._rows:
            found.setdefault(row[self._last], []).append(row)
        sizes = sorted(found)
        measured = rising([sum(math.log(row[-1]) for row in found[size]) / len(found[size]) for size in sizes])
        there = [(log - math.log(self._predict(found[size][0][:-1])), 1.0) for log, size in zip(measured, sizes, strict=True)]
        xs = [math.log(size) for size in sizes]
        return Curve([*xs, xs[-1] + REACH], [*there, NOTHING])


class Axis:
    """One argument's sampled values, in order, and what lies under each: the next argument."""

    def __init__(self, leaves: Iterable[tuple[Sequence[float], Leaf]], sizes: Sequence[bool]) -> None:
        """leaves: by the values of this argument and of those below. sizes: of each, whether its smallest sample says it of all smaller."""
        under: dict[float, list[tuple[Sequence[float], Leaf]]] = {}
        for (value, *rest), leaf in leaves:
            under.setdefault(value, []).append((rest, leaf))
        values = sorted(under)
        self.xs = [math.log(value) for value in values]
        self.under = [_nest(under[value], sizes[1:]) for value in values]
        self.size = sizes[0]

    def around(self, x: float) -> Iterator[tuple[float, Nested]]:
        """(weight, what lies under it) of the sampled values next to the logarithm `x`."""
        i = bisect_left(self.xs, x)
        if i < len(self.xs) and (self.xs[i] == x or (i == 0 and self.size)):
            yield 1.0, self.under[i]
        elif 0 < i < len(self.xs):
            part = (x - self.xs[i - 1]) / (self.xs[i] - self.xs[i - 1])
            yield 1 - part, self.under[i - 1]
            yield part, self.under[i]
        else:
            i = min(i, len(self.xs) - 1)
            if (left := 1 - abs(x - self.xs[i]) / REACH) > 0:
                yield left, self.under[i]


def _nest(leaves: Sequence[tuple[Sequence[float], Leaf]], sizes: Sequence[bool]) -> Nested:
    return Axis(leaves, sizes) if leaves[0][0] else leaves[0][1]


def _curves(under: Nested, outer: Sequence[float], weight: float = 1.0) -> Iterator[tuple[float, Curve]]:
    """The sampled curves around the logarithms `outer`, with their weights."""
    if isinstance(under, Leaf):
        yield weight, under.curve
        return
    for share, below in under.around(outer[0]):
        yield from _curves(below, outer[1:], weight * share)


class Table:
    """Corrections to a family's formula. Arguments are positive numbers."""

    def __init__(
        self, rows: Iterable[Row], predict: Callable[[Row], float], order: Sequence[int] = (0,), sizes: Sequence[int] = ()
    ) -> None:
        """rows: arguments and measured seconds. predict: the formula. order: of the arguments, the outermost first; it matters where not
        every combination was measured, and for speed. sizes: those of them, besides the last one, that are sizes and no shapes.
        Raises ValueError for no samples."""
        *self._outer, self._last = order
        groups: dict[tuple[float, ...], list[Row]] = {}
        for row in rows:
            groups.setdefault(self._key(row), []).append(row)
        if not groups:
            raise ValueError("a table needs at least one sample.")
        self._nested = _nest([(key, Leaf(found, self._last, predict)) for key, found in groups.items()], [i in sizes for i in self._outer])
        self._curves: dict[tuple[float, ...], Curve] = {}

    def _key(self, args: Row) -> tuple[float, ...]:
        return tuple([args[i] for i in self._outer])

    def correction(self, args: Row) -> Correction:
        """At `args`, as they come in the samples."""
        key = self._key(args)
        curve = self._curves.get(key)
        if curve is None:
            if len(self._curves) == KEPT:
                self._curves.clear()
            found = list(_curves(self._nested, [math.log(x) for x in key]))
            curve = self._curves[key] = mixed(found) if found else Curve((), ())
        return curve.at(math.log(args[self._last])) if curve.xs else NOTHING

    def price(self, args: Row, seconds: float) -> float:
        """The formula's seconds at `args`, corrected."""
        return seconds * math.exp(self.correction(args)[0])
