"""The samples of a calibrated machine beside the constants that were fitted to them, as the tables of `tables.py`.

Arguments of each kind, before the seconds:

    product             rows, n, k, bytes of the step's weights, PLAIN, GATED or ROW
    decode attention    bytes of keys and values, pairs, query rows, share from memory, scores, pairs / bytes (`cpu_ops.attention_s`)
    prefill attention   the same
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from functools import lru_cache
from typing import NamedTuple

from lockstep.planner.calibration import Mode
from lockstep.planner.cpu_ops import attention_s, product_s
from lockstep.planner.price import Price
from lockstep.planner.tables import Row, Table

PLAIN, GATED, ROW = 1, 100, 10000  # what follows a product in place; so far apart that none corrects another


class Kind(NamedTuple):
    """The formula of a kind of operation, and the order of its arguments in a table."""

    predict: Callable[[Mode, Row], float]
    order: tuple[int, ...]


def _product(mode: Mode, args: Row) -> float:
    rows, n, k, work, kind = args
    return product_s(mode.products, int(rows), int(n), int(k), work, gated=kind == GATED, row=kind == ROW)


KINDS: Mapping[str, Kind] = {
    "product": Kind(_product, (4, 3, 1, 2, 0)),
    "decode attention": Kind(lambda mode, args: attention_s(mode.decode, *args[:5]), (5, 2, 0)),
    "prefill attention": Kind(lambda mode, args: attention_s(mode.prefill, *args[:5]), (5, 2, 0)),
}


def table_of(kind: str, mode: Mode, rows: Sequence[Row]) -> Table:
    """How far the mode's constants are off at each row of arguments and seconds."""
    found = KINDS[kind]
    return Table(rows, lambda args: found.predict(mode, args), found.order)


@lru_cache(64)
def tables_of(mode: Mode) -> dict[str, Table]:
    """The tables of all samples of a mode."""
    return {kind: table_of(kind, mode, rows) for kind, rows in mode.samples.items() if kind in KINDS}


def corrected(mode: Mode, kind: str, seconds: float, *args: float) -> Price:
    """The constants' seconds at `args`, moved to the samples around, with the error of what was used."""
    table, (formula, interpolated), share = tables_of(mode).get(kind), mode.tried.get(kind, (0.0, 0.0)), 0.0
    if table:
        log, share = table.correction(args)
        seconds *= math.exp(log)
    error = formula if table is None else (1 - share) * formula + share * interpolated
    return Price(seconds, share * seconds, seconds, error * seconds)
