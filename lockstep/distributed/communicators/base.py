"""The contract that every communicator keeps: the collectives of one group on one device.

`GroupCoordinator` is the only caller. It has already handled world size 1, checked arguments and told the ledger. The
contract tests in tests/contract run against every implementation.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor

from lockstep.distributed.handles import Handle
from lockstep.distributed.reduction_tree import ReductionTree


class Communicator(ABC):
    """Collectives over ranks 0..world_size-1 of one group.

    Rules for all methods:
    - every rank of the group calls the same methods in the same order with the same shapes (except where sizes are given);
    - inputs may be non-contiguous and empty; an input is never changed unless the method's name ends in `_`;
    - results are new, contiguous tensors on the input's device, in rank order along `dim` (0 <= dim < x.dim());
    - sums of bfloat16 and float16 in `reduce_scatter*` are taken in float32, in the tree of `reduction_tree` over ranks, and rounded once;
    - every method works at world size 1, where sending to oneself is optional; a peer's death or the group's timeout raises RuntimeError.
    """

    # Why this communicator and no other: see select.py.
    explanation = ""

    def __init__(self, rank: int, world_size: int, device: torch.device) -> None:
        self.rank, self.world_size, self.device = rank, world_size, device

    @abstractmethod
    def all_reduce_(self, x: Tensor) -> None:
        """Sum over ranks, into `x`. Every rank ends with the same bits."""

    def combine(self, partials: Tensor, tree: ReductionTree) -> Tensor:
        """The sum over ranks in the order of `tree`: `partials [tree.counts[rank], rows, n]` float32 -> `[rows, n]` float32.

        Unlike all_reduce_, the result does not depend on how the atoms were dealt out to ranks.
        """
        return tree.evaluate(self.all_gatherv(partials, tree.counts, 0))

    @abstractmethod
    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        """Every rank's `x` (equal shapes) joined along `dim`."""

    @abstractmethod
    def all_gatherv(self, x: Tensor, sizes: Sequence[int], dim: int) -> Tensor:
        """Every rank's `x` joined along `dim`, rank r bringing `sizes[r]` of it (0 is fine)."""

    @abstractmethod
    def reduce_scatter(self, x: Tensor, dim: int) -> Tensor:
        """This rank's equal slice, along `dim`, of the sum over ranks. The size of `dim` divides by world_size."""

    @abstractmethod
    def reduce_scatterv(self, x: Tensor, sizes: Sequence[int], dim: int) -> Tensor:
        """This rank's slice of `sizes[rank]` along `dim` of the sum over ranks; sum(sizes) == x.size(dim)."""

    @abstractmethod
    def gather(self, x: Tensor, dst: int, dim: int) -> Tensor | None:
        """Every rank's `x` joined along `dim` on rank `dst`; None on the others."""

    def largest(self, values: Tensor, ids: Tensor) -> Tensor:
        """Of each row the id that comes with the largest value over ranks: `values [rows]` float32, `ids [rows]` int64 -> `[rows]` int64.

        Of equal values that of the lowest rank; a NaN is larger than any number. Ids are below 2**53: one message has both.
        """
        pairs = self.all_gather(torch.stack((values.double(), ids.double())).unsqueeze(0), 0)
        return pairs[:, 1].gather(0, pairs[:, 0].argmax(dim=0, keepdim=True))[0].long()

    @abstractmethod
    def broadcast_(self, x: Tensor, src: int) -> None:
        """Rank `src`'s values, into `x`."""

    @abstractmethod
    def all_to_all(self, x: Tensor) -> Tensor:
        """Slice r of dim 0 (equal slices) goes to rank r; the result holds rank r's slice for this rank at place r."""

    @abstractmethod
    def all_to_allv(self, x: Tensor, send_sizes: Sequence[int], recv_sizes: Sequence[int]) -> Tensor:
        """As all_to_all, with `send_sizes[r]` rows of dim 0 going to rank r and `recv_sizes[r]` coming from it."""

    @abstractmethod
    def isend(self, x: Tensor, dst: int) -> Handle:
        """Start sending `x` to rank `dst`. The handle keeps `x` alive."""

    @abstractmethod
    def irecv_(self, x: Tensor, src: int) -> Handle:
        """Start receiving from rank `src` into contiguous `x`."""

    def send(self, x: Tensor, dst: int) -> None:
        """Send `x` to rank `dst`; returns when `x` may be reused."""
        self.isend(x, dst).wait()

    def recv_(self, x: Tensor, src: int) -> None:
        """Receive into contiguous `x` from rank `src`."""
        self.irecv_(x, src).wait()

    @abstractmethod
    def barrier(self) -> None:
        """Return when every rank has called it."""

    def close(self) -> None:
        """Release what the communicator holds beyond the process group. May be called twice."""
        return None
