"""Measured samples beside a formula: how far off it was there, interpolated between them.

A table keeps log(measured / predicted) at the sampled arguments. Between samples that correction is linear in the logarithms
of the arguments; beyond them it stays what it was at the border, so the formula still says how a price grows.
"""

from __future__ import annotations

import math
from bisect import bisect_left
from collections.abc import Iterable, Sequence
from typing import Union

Nested = Union[float, "Axis"]


class Axis:
    """One argument's sampled values, in order, and what lies under each: the next argument, or a correction."""

    def __init__(self, points: Iterable[tuple[Sequence[float], float]]) -> None:
        """points: (arguments, log correction); all with as many arguments, at least one."""
        under: dict[float, list[tuple[Sequence[float], float]]] = {}
        for args, value in points:
            under.setdefault(float(args[0]), []).append((args[1:], value))
        self.values = sorted(under)
        self.under: list[Nested] = [_nest(under[v]) for v in self.values]

    def at(self, args: Sequence[float]) -> float:
        """The log correction at `args`."""
        i = bisect_left(self.values, args[0])
        if i == len(self.values) or (i == 0 and args[0] <= self.values[0]):
            return _read(self.under[min(i, len(self.values) - 1)], args[1:])
        if self.values[i] == args[0]:
            return _read(self.under[i], args[1:])
        low, high = self.values[i - 1], self.values[i]
        share = math.log(args[0] / low) / math.log(high / low)
        return (1 - share) * _read(self.under[i - 1], args[1:]) + share * _read(self.under[i], args[1:])


def _nest(points: list[tuple[Sequence[float], float]]) -> Nested:
    if points[0][0]:
        return Axis(points)
    return math.fsum(value for _, value in points) / len(points)  # the same arguments measured more than once


def _read(under: Nested, args: Sequence[float]) -> float:
    return under.at(args) if isinstance(under, Axis) else under


class Table:
    """Corrections to a family's formula. Arguments must be positive numbers."""

    def __init__(self, samples: Iterable[tuple[Sequence[float], float, float]]) -> None:
        """samples: (arguments, measured seconds, seconds by the formula). Raises ValueError for none."""
        points = [(args, math.log(measured / predicted)) for args, measured, predicted in samples]
        if not points:
            raise ValueError("a table needs at least one sample.")
        self._axis = Axis(points)

    def correction(self, *args: float) -> float:
        """What to multiply the formula's seconds with at `args`."""
        return math.exp(self._axis.at(args))
