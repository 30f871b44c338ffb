"""Which samples of a calibration are kept beside the constants: those that predict each other better than the constants do.

On a quiet machine that is most of them, since no formula knows a cache's corners; on a noisy one the fit, which is a mean, is better.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import msgspec

from lockstep.planner.calibration import Mode
from lockstep.planner.cpu_tables import GATED, KINDS, ROW, table_of
from lockstep.planner.fit import Errors, errors, halves
from lockstep.planner.tables import Row
from lockstep.simulation import rates_fit
from lockstep.simulation.rates_fit import Product

LEAST = 12  # samples of which a half says anything


def _products(mode: Mode, rows: Sequence[Row]) -> Mode:
    found = [Product(int(r[0]), int(r[1]), int(r[2]), r[3], gated=r[4] == GATED, row=r[4] == ROW, seconds=r[5]) for r in rows]
    return msgspec.structs.replace(mode, products=rates_fit.products(found))


def _attention(name: str) -> Callable[[Mode, Sequence[Row]], Mode]:
    def fit(mode: Mode, rows: Sequence[Row]) -> Mode:
        features = [[r[0], r[1], r[2], r[0] * r[3], r[4]] for r in rows]
        return msgspec.structs.replace(mode, **{name: rates_fit.attention(features, [r[-1] for r in rows])})

    return fit


FITS: Mapping[str, Callable[[Mode, Sequence[Row]], Mode]] = {
    "product": _products,
    "decode attention": _attention("decode"),
    "prefill attention": _attention("prefill"),
}


def tried(kind: str, mode: Mode, rows: Sequence[Row]) -> tuple[float, float]:
    """Mean errors of the constants and of interpolated samples, each half of the sizes by the other one, both ways round together."""
    size, by_constants, by_samples = KINDS[kind].order[-1], 0.0, 0.0
    first, second = halves(rows, lambda row: row[size])
    for told, held in ((first, second), (second, first)):
        fitted = FITS[kind](mode, told)
        table = table_of(kind, fitted, told)
        plain = [KINDS[kind].predict(fitted, row[:-1]) for row in held]
        better = [table.price(row[:-1], seconds) for row, seconds in zip(held, plain, strict=True)]
        by_constants += _sum(errors(plain, [row[-1] for row in held])) / len(rows)
        by_samples += _sum(errors(better, [row[-1] for row in held])) / len(rows)
    return round(by_constants, 4), round(by_samples, 4)


def _sum(found: Errors) -> float:
    return found.n * found.mape


def with_samples(mode: Mode, measured: Mapping[str, Sequence[Row]]) -> Mode:
    """The mode with the samples that are better than its constants, and the errors of both. measured: rows by kind, as in `cpu_tables`."""
    found = {kind: tried(kind, mode, rows) for kind, rows in measured.items() if len(rows) >= LEAST}
    kept = {kind: [list(row) for row in measured[kind]] for kind, (constants, samples) in found.items() if samples < constants}
    return msgspec.structs.replace(mode, samples=kept, tried=found)
