"""What a predicted time is made of: terms that add up to it exactly, each with its formula and where that comes from."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Term:
    """One part of a step. flops and bytes are what one rank computes and moves (or sends); zero where that means nothing.

    `formula` names the arithmetic, `source` the section of docs/planner.md that has its constants. table_s: the seconds of it that
    were corrected by measured samples; error_s: the expected mean error, in seconds, of the methods used; 0 where nobody tried.
    """

    name: str
    seconds: float
    flops: float = 0.0
    bytes: float = 0.0
    formula: str = ""
    source: str = ""
    table_s: float = 0.0
    error_s: float = 0.0

    @property
    def method(self) -> str:
        """What gave the seconds: `table`, `formula`, or both, with how much of them is the table's."""
        share = self.table_s / self.seconds if self.seconds else 0.0
        return "formula" if share < 0.005 else "table" if share > 0.995 else f"table {share:.0%}"

    def times(self, count: float) -> Term:
        """The term `count` times over."""
        return Term(
            self.name, self.seconds * count, self.flops * count, self.bytes * count, self.formula, self.source,
            self.table_s * count, self.error_s * count,
        )  # fmt: skip


def operation_error(terms: Iterable[Term]) -> float:
    """The expected mean error, as a fraction, of the operations among the terms: of each by the method that priced it."""
    known = [term for term in terms if term.error_s]
    return math.fsum(term.error_s for term in known) / total_s(known) if known else 0.0


def total_s(terms: Iterable[Term]) -> float:
    """The exact sum of the terms' seconds."""
    return math.fsum(term.seconds for term in terms)


def merge(terms: Iterable[Term]) -> list[Term]:
    """Terms of one name as one, in the order of first appearance."""
    found: dict[str, list[Term]] = {}
    for term in terms:
        found.setdefault(term.name, []).append(term)
    return [
        Term(
            same[0].name, total_s(same), math.fsum(t.flops for t in same), math.fsum(t.bytes for t in same), same[0].formula,
            same[0].source, math.fsum(t.table_s for t in same), math.fsum(t.error_s for t in same),
        )
        for same in found.values()
    ]  # fmt: skip
