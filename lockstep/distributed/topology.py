"""Which rank sits where: pure arithmetic, no torch, no processes.

The world is one grid, external-DP x DP x PP x PCP x TP, TP fastest. Every group is a slice of that grid, named by the
axes that vary inside it. DCP reuses TP ranks: runs of `dcp` consecutive ones. EP spans DP x PCP x TP of one pipeline
stage; EPLB has the same ranks as EP. External DP is what is left of the world: whole deployments side by side.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product

GRID = ("external_dp", "dp", "pp", "pcp", "tp")
# Which grid axes vary inside a group. DCP cuts the TP axis itself and is handled apart.
GROUP_AXES: dict[str, tuple[str, ...]] = {
    "tp": ("tp",),
    "pcp": ("pcp",),
    "pp": ("pp",),
    "dp": ("dp",),
    "ep": ("dp", "pcp", "tp"),
    "eplb": ("dp", "pcp", "tp"),
    "inner_dp_world": ("pp", "pcp", "tp"),
    "world": GRID,
}
GROUPS = (*GROUP_AXES, "dcp")


@dataclass(frozen=True)
class Coordinates:
    """One rank's place on the grid; `dcp` and `ep` are derived from it."""

    external_dp: int
    dp: int
    pp: int
    pcp: int
    tp: int
    dcp: int
    ep: int


@dataclass(frozen=True)
class Topology:
    """The sizes of the axes. Raises ValueError, naming the rule, when they do not fit the world."""

    world_size: int
    tp: int = 1
    pp: int = 1
    pcp: int = 1
    dcp: int = 1
    dp: int = 1

    def __post_init__(self) -> None:
        for axis in ("world_size", "tp", "pp", "pcp", "dcp", "dp"):
            value = getattr(self, axis)
            if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                raise ValueError(f"{_FULL_NAME[axis]} is {value!r}: it must be a whole number of at least 1.")
        if self.world_size % (self.replica_size * self.dp):
            needed = self.replica_size * self.dp
            raise ValueError(
                f"world size {self.world_size} is not a multiple of tensor {self.tp} x pipeline {self.pp} x prefill context {self.pcp} "
                f"x data {self.dp} parallel size = {needed}: start {math.ceil(self.world_size / needed) * needed} ranks, "
                "or make one of the sizes smaller."
            )
        if self.tp % self.dcp:
            divisors = [d for d in range(1, self.tp + 1) if self.tp % d == 0]
            raise ValueError(
                f"decode context parallel size {self.dcp} does not divide tensor parallel size {self.tp}: "
                f"it reuses the tensor parallel ranks, so choose one of {divisors}."
            )

    @property
    def replica_size(self) -> int:
        """Ranks that hold one copy of the model: PP x PCP x TP."""
        return self.pp * self.pcp * self.tp

    @property
    def external_dp(self) -> int:
        return self.world_size // (self.replica_size * self.dp)

    @property
    def shape(self) -> tuple[int, int, int, int, int]:
        """Sizes in the order of `GRID`."""
        return (self.external_dp, self.dp, self.pp, self.pcp, self.tp)

    def rank_at(self, *, external_dp: int = 0, dp: int = 0, pp: int = 0, pcp: int = 0, tp: int = 0) -> int:
        """The global rank at a place on the grid."""
        place = (external_dp, dp, pp, pcp, tp)
        rank = 0
        for axis, index, size in zip(GRID, place, self.shape, strict=True):
            if not 0 <= index < size:
                raise ValueError(f"{axis} index {index} is outside 0..{size - 1}.")
            rank = rank * size + index
        return rank

    def coordinates(self, rank: int) -> Coordinates:
        """Where `rank` sits."""
        rest = self._checked(rank)
        place = []
        for size in reversed(self.shape):
            rest, index = divmod(rest, size)
            place.append(index)
        tp, pcp, pp, dp, external_dp = place
        return Coordinates(external_dp, dp, pp, pcp, tp, tp % self.dcp, (dp * self.pcp + pcp) * self.tp + tp)

    def group_size(self, group: str) -> int:
        """How many ranks each `group` ("tp", "pp", "ep", ...) has."""
        if group == "dcp":
            return self.dcp
        sizes = dict(zip(GRID, self.shape, strict=True))
        return math.prod(sizes[axis] for axis in self._axes(group))

    def groups(self, group: str) -> list[list[int]]:
        """Every group of that name over the world, each in rank order, sorted by first rank. They partition the world."""
        if group == "dcp":
            return [list(range(start, start + self.dcp)) for start in range(0, self.world_size, self.dcp)]
        offsets = list(self._offsets(self._axes(group)))
        fixed = tuple(axis for axis in GRID if axis not in self._axes(group))
        return [[start + offset for offset in offsets] for start in self._offsets(fixed)]

    def group_of(self, group: str, rank: int) -> list[int]:
        """The one `group` that `rank` belongs to, without listing the others."""
        self._checked(rank)
        if group == "dcp":
            start = rank - rank % self.dcp
            return list(range(start, start + self.dcp))
        axes, start = self._axes(group), rank
        place = self.coordinates(rank)
        for axis, stride in self._strides().items():
            if axis in axes:
                start -= getattr(place, axis) * stride
        return [start + offset for offset in self._offsets(axes)]

    def rank_in_group(self, group: str, rank: int) -> int:
        return self.group_of(group, rank).index(rank)

    def worker_rank(self, rank: int) -> int:
        """Rank within its replica: pp * (PCP * TP) + pcp * TP + tp."""
        return self._checked(rank) % self.replica_size

    def context_rank(self, rank: int) -> int:
        """Rank among all that share a sequence: pcp * DCP + dcp."""
        place = self.coordinates(rank)
        return place.pcp * self.dcp + place.dcp

    def _axes(self, group: str) -> tuple[str, ...]:
        if group not in GROUP_AXES:
            raise ValueError(f"unknown group {group!r}: choose one of {', '.join(sorted(GROUPS))}.")
        return GROUP_AXES[group]

    def _checked(self, rank: int) -> int:
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is outside 0..{self.world_size - 1}.")
        return rank

    def _strides(self) -> dict[str, int]:
        strides, stride = {}, 1
        for axis, size in zip(reversed(GRID), reversed(self.shape), strict=True):
            strides[axis] = stride
            stride *= size
        return strides

    def _offsets(self, axes: Sequence[str]) -> Iterator[int]:
        """Rank offsets of all places when only `axes` vary, ascending."""
        strides, sizes = self._strides(), dict(zip(GRID, self.shape, strict=True))
        runs = [range(0, sizes[axis] * strides[axis], strides[axis]) for axis in GRID if axis in axes]
        return (sum(place) for place in product(*runs))


_FULL_NAME = {
    "world_size": "world size",
    "tp": "tensor parallel size",
    "pp": "pipeline parallel size",
    "pcp": "prefill context parallel size",
    "dcp": "decode context parallel size",
    "dp": "data parallel size",
}
