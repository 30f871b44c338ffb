"""Seconds that remember how they were found: by measured samples or by a formula, and how far off that was elsewhere."""

from __future__ import annotations


class Price(float):
    """A float, so that prices add up, compare and scale as seconds do; what is added to one without a memory has none.

    table_s: the seconds of it that interpolated samples gave. known_s: those whose method was tried on measurements that it had
    not seen; error_s: their expected error.
    """

    __slots__ = ("error_s", "known_s", "table_s")
    table_s: float
    known_s: float
    error_s: float

    def __new__(cls, seconds: float, table_s: float = 0.0, known_s: float = 0.0, error_s: float = 0.0) -> Price:
        found = super().__new__(cls, seconds)
        found.table_s, found.known_s, found.error_s = table_s, known_s, error_s
        return found

    def __add__(self, other: float) -> Price:
        more = of(other)
        seconds = float.__add__(self, other)
        return Price(seconds, self.table_s + more.table_s, self.known_s + more.known_s, self.error_s + more.error_s)

    __radd__ = __add__

    def __mul__(self, count: float) -> Price:
        return Price(float.__mul__(self, count), self.table_s * count, self.known_s * count, self.error_s * count)

    __rmul__ = __mul__


def of(seconds: float) -> Price:
    """The seconds as a price; without a memory where they had none."""
    return seconds if isinstance(seconds, Price) else Price(seconds)
