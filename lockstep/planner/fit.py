"""Constants from measurements: a derivative-free search for the parameters with the least mean error, in plain Python.

Everything here is deterministic: the same rows give the same constants.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import dataclass
from statistics import fmean, median
from typing import TypeVar

Row = TypeVar("Row")


def halves(rows: Iterable[Row], size: Callable[[Row], float]) -> tuple[list[Row], list[Row]]:
    """(fitted, held out): rows with every other distinct size, the smallest in the first half."""
    rows = list(rows)
    order = {value: i for i, value in enumerate(sorted({size(r) for r in rows}))}
    return [r for r in rows if order[size(r)] % 2 == 0], [r for r in rows if order[size(r)] % 2]


@dataclass(frozen=True)
class Errors:
    """How far predictions are from measurements, as fractions; n rows."""

    n: int
    mape: float
    median: float


def errors(predicted: Sequence[float], measured: Sequence[float]) -> Errors:
    """Mean and median of |predicted / measured - 1|. Raises ValueError for no rows."""
    if not measured or len(predicted) != len(measured):
        raise ValueError(f"{len(predicted)} predictions for {len(measured)} measurements: there must be as many, and some.")
    off = [abs(p / m - 1) for p, m in zip(predicted, measured, strict=True)]
    return Errors(len(off), fmean(off), median(off))


def mape(predict: Callable[[Row], float], rows: Sequence[Row], measured: Callable[[Row], float]) -> float:
    """The mean error of `predict` over `rows`."""
    return errors([predict(r) for r in rows], [measured(r) for r in rows]).mape


def minimise(loss: Callable[[Sequence[float]], float], start: Sequence[float], rounds: int = 400, step: float = 0.25) -> list[float]:
    """Positive parameters with the least `loss`: the simplex search of Nelder and Mead (1965) in their logarithms.

    Starts again once from what it found, with a smaller simplex, since a simplex can collapse before the bottom.
    """
    point = [math.log(max(value, 1e-30)) for value in start]
    for size in (step, step / 4):
        point = _simplex(lambda p: loss([math.exp(x) for x in p]), point, size, rounds // 2)
    return [math.exp(x) for x in point]


def _simplex(loss: Callable[[list[float]], float], start: list[float], size: float, rounds: int) -> list[float]:
    corners = [start] + [[x + (size if i == j else 0.0) for j, x in enumerate(start)] for i in range(len(start))]
    simplex = sorted((loss(c), c) for c in corners)
    for _ in range(rounds):
        (best, low), (worst, high) = simplex[0], simplex[-1]
        if worst - best < 1e-7 * abs(best):
            break
        centre = [fmean(c[j] for _, c in simplex[:-1]) for j in range(len(start))]

        def at(reach: float, centre: list[float] = centre, high: list[float] = high) -> tuple[float, list[float]]:
            point = [c + reach * (c - h) for c, h in zip(centre, high, strict=True)]
            return loss(point), point

        tried = at(1.0)
        if tried[0] < best:
            tried = min(tried, at(2.0))
        elif tried[0] >= simplex[-2][0]:
            tried = min(tried, at(-0.5))
        if tried[0] < worst:
            simplex[-1] = tried
        else:
            shrunk = [[(x + b) / 2 for x, b in zip(c, low, strict=True)] for _, c in simplex[1:]]
            simplex = [simplex[0], *((loss(c), c) for c in shrunk)]
        simplex.sort()
    return simplex[0][1]


def group_by(rows: Iterable[Row], key: Callable[[Row], Hashable]) -> dict[Hashable, list[Row]]:
    """Rows by key, in the order in which the keys appear."""
    groups: dict[Hashable, list[Row]] = {}
    for row in rows:
        groups.setdefault(key(row), []).append(row)
    return groups
