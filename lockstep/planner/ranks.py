"""What each rank of a plan holds, ranks that hold the same put together."""

from __future__ import annotations

from collections.abc import Hashable, Iterable
from dataclasses import dataclass

from lockstep.planner.memory import RankMemory


@dataclass(frozen=True)
class RankGroup:
    """The ranks `ranks` of each of the stages `stages`: bytes of one of them. Ranks are of the TP group, or of the expert group where
    experts are spread; context ranks, and replicas that share no experts, are like these."""

    stages: list[int]
    ranks: list[int]
    memory: RankMemory

    def __str__(self) -> str:
        one, many = _runs(self.stages), _runs(self.ranks)
        return f"stage{'s' * (len(self.stages) > 1)} {one}, rank{'s' * (len(self.ranks) > 1)} {many}"


def alike(kinds: Iterable[Hashable]) -> list[list[int]]:
    """The indices of equal ones, by first appearance."""
    found: dict[Hashable, list[int]] = {}
    for i, kind in enumerate(kinds):
        found.setdefault(kind, []).append(i)
    return list(found.values())


def _runs(numbers: list[int]) -> str:
    """[0, 1, 2, 5] as "0-2, 5"."""
    found: list[list[int]] = []
    for n in numbers:
        if found and n == found[-1][-1] + 1:
            found[-1].append(n)
        else:
            found.append([n])
    return ", ".join(str(run[0]) if len(run) == 1 else f"{run[0]}-{run[-1]}" for run in found)
