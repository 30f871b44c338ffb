"""How long a step will take, learned from the steps before: seconds = a + b tokens + c requests + d context.

A straight line fitted by least squares (normal equations, with old steps slowly forgotten) while the engine runs. It knows
nothing of the model or the machine; it is there to notice steps that are not like the others, not to plan with.

1. Each step adds its outer product to the sums S = sum(x x^T) and y = sum(x t), after both were shrunk by `keep`.
2. Every `REFIT` steps, S w = y is solved by elimination, with a little of S's diagonal added, so that a number that never changes
   (every step one request, say) takes no part instead of ruining the rest.
3. A step's prediction is w x, with the w from before that step; before the first fit there is none.
"""

from __future__ import annotations

REFIT = 16  # steps between two fits
KEEP = 0.999  # of a step's weight after the next one
RIDGE = 1e-6
Features = tuple[float, float, float, float]


class StepPredictor:
    """One engine's."""

    def __init__(self) -> None:
        self.weights: list[float] | None = None
        self._sums = [0.0] * 10  # the upper triangle of S, row by row
        self._y = [0.0] * 4
        self._steps = 0

    def predict(self, tokens: int, rows: int, context: int) -> float | None:
        """Seconds that a step of so many tokens, of so many requests that hold `context` tokens will take; None when not known yet."""
        w = self.weights
        return None if w is None else max(0.0, w[0] + w[1] * tokens + w[2] * rows + w[3] * context)

    def learn(self, tokens: int, rows: int, context: int, seconds: float) -> None:
        """A step took so long."""
        x: Features = (1.0, float(tokens), float(rows), float(context))
        s, y, at = self._sums, self._y, 0
        for i in range(4):
            xi = x[i]
            y[i] = KEEP * y[i] + xi * seconds
            for j in range(i, 4):
                s[at] = KEEP * s[at] + xi * x[j]
                at += 1
        self._steps += 1
        if self._steps % REFIT == 0:
            self.weights = solve(_matrix(s), y)


def _matrix(s: list[float]) -> list[list[float]]:
    at, m = 0, [[0.0] * 4 for _ in range(4)]
    for i in range(4):
        for j in range(i, 4):
            m[i][j] = m[j][i] = s[at]
            at += 1
        m[i][i] += RIDGE * m[i][i] + 1e-12
    return m


def solve(matrix: list[list[float]], right: list[float]) -> list[float]:
    """w with `matrix` w = `right`, by elimination with row exchange. `matrix` must be invertible."""
    n = len(right)
    rows = [[*row, b] for row, b in zip(matrix, right, strict=True)]
    for i in range(n):
        pivot = max(range(i, n), key=lambda r: abs(rows[r][i]))
        rows[i], rows[pivot] = rows[pivot], rows[i]
        for r in range(i + 1, n):
            factor = rows[r][i] / rows[i][i]
            rows[r] = [a - factor * b for a, b in zip(rows[r], rows[i], strict=True)]
    found = [0.0] * n
    for i in reversed(range(n)):
        found[i] = (rows[i][n] - sum(rows[i][j] * found[j] for j in range(i + 1, n))) / rows[i][i]
    return found
