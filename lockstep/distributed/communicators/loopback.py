"""The communicator of a group of one: nothing to say, nobody to say it to."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from lockstep.distributed.communicators.base import Communicator
from lockstep.distributed.handles import DoneHandle, Handle


class LoopbackCommunicator(Communicator):
    """World size 1. Results are copies where the contract says new, so that it can stand in for any other."""

    def __init__(self, device: torch.device | None = None) -> None:
        super().__init__(0, 1, device or torch.device("cpu"))
        self._sent: list[Tensor] = []

    def all_reduce_(self, x: Tensor) -> None:
        return None

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        return x.clone(memory_format=torch.contiguous_format)

    def all_gatherv(self, x: Tensor, sizes: Sequence[int], dim: int) -> Tensor:
        return self.all_gather(x, dim)

    def reduce_scatter(self, x: Tensor, dim: int) -> Tensor:
        return self.all_gather(x, dim)

    def reduce_scatterv(self, x: Tensor, sizes: Sequence[int], dim: int) -> Tensor:
        return self.all_gather(x, dim)

    def gather(self, x: Tensor, dst: int, dim: int) -> Tensor | None:
        return self.all_gather(x, dim)

    def broadcast_(self, x: Tensor, src: int) -> None:
        return None

    def all_to_all(self, x: Tensor) -> Tensor:
        return self.all_gather(x, 0)

    def all_to_allv(self, x: Tensor, send_sizes: Sequence[int], recv_sizes: Sequence[int]) -> Tensor:
        return self.all_gather(x, 0)

    def isend(self, x: Tensor, dst: int) -> Handle:
        self._sent.append(x.clone())
        return DoneHandle()

    def irecv_(self, x: Tensor, src: int) -> Handle:
        if not self._sent:
            raise RuntimeError("recv in a group of one rank before anything was sent: it would wait for ever.")
        x.copy_(self._sent.pop(0))
        return DoneHandle()

    def barrier(self) -> None:
        return None
