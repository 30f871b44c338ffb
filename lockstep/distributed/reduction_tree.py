"""In which order the partial sums of a row-parallel product are added. Pure arithmetic, no torch.

The input dim is cut into atoms (`partition.atom_bounds`), each summed by itself. Atoms are added by one fixed binary tree:
the node [lo, hi) adds [lo, mid) and [mid, hi), mid - lo being the largest power of two below hi - lo. A rank owns a run
of atoms; it adds up the maximal subtrees that lie inside its run and sends one float32 partial sum for each. Whoever
holds all partial sums finishes the same tree, so the result does not depend on how many ranks there are.

    eight atoms       0 1 2 3 4 5 6 7        the tree: ((01)(23))((45)(67))
    TP 2 sends        [0-3]   [4-7]          one partial sum each
    TP 3 sends        [01][2] [3][45] [67]   ranks own 0-2, 3-5, 6-7
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

ADD = -1


def split(lo: int, hi: int) -> int:
    """Where the node [lo, hi) of at least two atoms is cut."""
    return lo + (1 << ((hi - lo - 1).bit_length() - 1))


def subtrees(total: int, first: int, stop: int) -> list[tuple[int, int]]:
    """The maximal nodes of the tree over `total` atoms inside [first, stop), in order."""

    def inside(lo: int, hi: int) -> list[tuple[int, int]]:
        if stop <= lo or hi <= first:
            return []
        if first <= lo and hi <= stop:
            return [(lo, hi)]
        mid = split(lo, hi)
        return inside(lo, mid) + inside(mid, hi)

    return inside(0, total)


@dataclass(frozen=True)
class ReductionTree:
    """The combination of every rank's partial sums. Leaves are numbered by rank, then in the order of its subtrees.

    counts: partial sums of each rank. code: a stack machine's program; i >= 0 pushes leaf i, ADD replaces the two on top
    by their sum (the lower one first).
    """

    counts: tuple[int, ...]
    code: tuple[int, ...]

    def evaluate(self, leaves: Sequence[Any]) -> Any:
        """The tree's sum of `leaves`, which may be anything that adds."""
        stack: list[Any] = []
        for leaf in self.code:
            if leaf == ADD:
                upper = stack.pop()
                stack[-1] = stack[-1] + upper
            else:
                stack.append(leaves[leaf])
        return stack[0]

    @classmethod
    def of(cls, total: int, runs: Sequence[tuple[int, int]]) -> ReductionTree:
        """Rank r owns atoms [runs[r][0], runs[r][1]); the runs cover 0..total in order."""
        bounds = [0, *(stop for _, stop in runs)]
        assert [start for start, _ in runs] == bounds[:-1] and bounds[-1] == total, f"runs {runs} do not cover {total} atoms in order"
        owned = [subtrees(total, *run) for run in runs]
        leaves = {node: leaf for leaf, node in enumerate(node for nodes in owned for node in nodes)}

        def evaluate(lo: int, hi: int) -> list[int]:
            if (lo, hi) in leaves:
                return [leaves[lo, hi]]
            mid = split(lo, hi)
            return [*evaluate(lo, mid), *evaluate(mid, hi), ADD]

        return cls(tuple(map(len, owned)), tuple(evaluate(0, total)))
