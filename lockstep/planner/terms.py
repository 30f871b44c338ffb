"""What a predicted time is made of: terms that add up to it exactly, each with its formula and where that comes from."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace


@dataclass(frozen=True, slots=True)
class Term:
    """One part of a step. flops and bytes are what one rank computes and moves (or sends); zero where that means nothing.

    `formula` names the arithmetic, `source` the section of docs/planner.md that has its constants.
    """

    name: str
    seconds: float
    flops: float = 0.0
    bytes: float = 0.0
    formula: str = ""
    source: str = ""

    def times(self, count: float) -> Term:
        """The term `count` times over."""
        return replace(self, seconds=self.seconds * count, flops=self.flops * count, bytes=self.bytes * count)


def total_s(terms: Iterable[Term]) -> float:
    """The exact sum of the terms' seconds."""
    return math.fsum(term.seconds for term in terms)


def merge(terms: Iterable[Term]) -> list[Term]:
    """Terms of one name as one, in the order of first appearance."""
    found: dict[str, list[Term]] = {}
    for term in terms:
        found.setdefault(term.name, []).append(term)
    return [
        replace(same[0], seconds=total_s(same), flops=math.fsum(t.flops for t in same), bytes=math.fsum(t.bytes for t in same))
        for same in found.values()
    ]
