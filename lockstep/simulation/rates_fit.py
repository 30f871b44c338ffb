"""From measured operations to the constants of `planner.calibration`: least squares of relative errors, nothing below zero."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import msgspec
import numpy as np
import numpy.typing as npt

from lockstep.planner.calibration import AttentionRates, Line, ProductRates
from lockstep.planner.cpu_ops import far_share

F64 = npt.NDArray[np.float64]
FAR = 64  # times the last cache: steps that read so much find nothing in it
ROUNDS = 400  # of coordinate descent; the columns are few and scaled


def fit(features: Sequence[Sequence[float]], seconds: Sequence[float], of: Sequence[float] | None = None) -> list[float]:
    """w >= 0 that makes sum(((x w - t) / t) ** 2) small: coordinate descent on the normal equations (Lawson and Hanson's problem).

    Columns may differ by any scale; one that is all zero gets 0. of: what errors are relative to, where t is a part of that.
    """
    whole = np.asarray(seconds if of is None else of, np.float64)
    target = np.asarray(seconds, np.float64) / whole
    x: F64 = np.asarray(features, np.float64) / whole[:, None]
    scale = np.linalg.norm(x, axis=0)
    scale[scale == 0] = 1.0
    x = x / scale
    gram, right = x.T @ x, x.T @ target
    w = np.zeros(x.shape[1])
    for _ in range(ROUNDS):
        for j in range(len(w)):
            if gram[j, j] > 0:
                w[j] = max(0.0, w[j] + (right[j] - gram[j] @ w) / gram[j, j])
    return [float(v) for v in w / scale]


def line(points: Iterable[tuple[float, float]]) -> Line:
    """base + per * x through (x, seconds)."""
    found = [(x, max(t, 1e-9)) for x, t in points]
    return Line(*fit([(1.0, x) for x, _ in found], [t for _, t in found])) if found else Line()


def rest_line(points: Iterable[tuple[float, float, float]]) -> Line:
    """base + per * x through (x, seconds of a part, seconds of the whole that it was found as the rest of): errors are relative to the
    whole, for the part may be lost in its noise."""
    found = list(points)
    return Line(*fit([(1.0, x) for x, *_ in found], [t for _, t, _ in found], [whole for *_, whole in found])) if found else Line()


class Product:
    """One measured product: `rows`, `n`, `k`, which class of model (its weights in bytes), what follows in place, seconds."""

    __slots__ = ("gated", "k", "n", "row", "rows", "seconds", "work")

    def __init__(self, rows: int, n: int, k: int, work: float, *, gated: bool, row: bool, seconds: float) -> None:
        self.rows, self.n, self.k, self.work, self.gated, self.row, self.seconds = rows, n, k, work, gated, row, seconds


def products(found: Sequence[Product]) -> list[ProductRates]:
    """The constants for each number of rows that was measured, all fitted together.

    Launch, and what an element of an edge, a gate and a finished row costs, are the same for all rows; only the work is not.
    """
    cells = sorted({(p.rows, p.work) for p in found})
    at = {cell: 4 + i for i, cell in enumerate(cells)}
    features = np.zeros((len(found), 4 + len(cells)))
    for x, p in zip(features, found, strict=True):
        x[:4] = 1.0, p.rows * (p.n + p.k), p.rows * p.n / 2 if p.gated else 0.0, p.rows * p.n if p.row else 0.0
        x[at[p.rows, p.work]] = p.n * p.k
    launch, edge, gate, finish, *fitted = fit(features.tolist(), [p.seconds for p in found])
    work = _whole({cell: fitted[i - 4] for cell, i in at.items()})
    return [
        ProductRates(rows, launch, edge * rows, [(w, work[r, w]) for r, w in sorted(work) if r == rows], gate * rows, finish * rows)
        for rows in sorted({p.rows for p in found})
    ]


def with_far(table: Sequence[ProductRates], busy: int, cache_bytes: float) -> list[ProductRates]:
    """With one point more: models so large that the last cache keeps nothing of them from one step to the next. Of the largest that was
    measured it still keeps a part, `cpu_ops.far_share` says which. busy: ranks that share the cache."""
    found, largest = [], FAR * cache_bytes / busy
    for rates in table:
        (near, fast), (far, slow) = rates.work[0], rates.work[-1]
        if near < cache_bytes / busy < far < largest and slow > fast:
            more = far_share(largest * busy, cache_bytes) / far_share(far * busy, cache_bytes)
            rates = msgspec.structs.replace(rates, work=[*rates.work, (largest, fast + (slow - fast) * more)])
        found.append(rates)
    return found


def _whole(work: dict[tuple[int, float], float]) -> dict[tuple[int, float], float]:
    """Seconds per weight by (rows, bytes), also of larger models than so many rows were measured of: they take as many times what
    fewer rows take as the largest that was measured does."""
    found, classes = dict(work), sorted({w for _, w in work})
    for rows in sorted({r for r, _ in work}):
        here = max(w for r, w in work if r == rows)
        for larger in (w for w in classes if w > here):
            fewer = [r for r, w in found if w == larger and r < rows and found.get((r, here), 0.0) > 0]
            if fewer:
                found[rows, larger] = found[max(fewer), larger] * found[rows, here] / found[max(fewer), here]
    return found


def attention(features: Sequence[Sequence[float]], seconds: Sequence[float]) -> AttentionRates:
    """From rows of (bytes, pairs, query rows, bytes from memory, scores)."""
    if not seconds:
        return AttentionRates(0.0, 0.0, 0.0, 0.0)
    return AttentionRates(*fit([(1.0, *row) for row in features], seconds))
