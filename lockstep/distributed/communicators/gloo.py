"""Collectives over TCP by gloo: the reference on CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from lockstep.distributed.communicators.torch_pg import TorchCommunicator, as_bytes, tree_sum


class GlooCommunicator(TorchCommunicator):
    """Host memory only; `StagedCommunicator` brings other devices' tensors here."""

    works_know_their_state = False

    def _sum_slices(self, x: Tensor) -> Tensor:
        received = torch.empty_like(x)
        self.group.alltoall_base(as_bytes(received), as_bytes(x), [], []).wait()
        return tree_sum(received)

    def barrier(self) -> None:
        # A sum, not the group's own barrier: where the group also has a NCCL backend, that would take the GPU's.
        self.group.allreduce([torch.zeros(1)]).wait()
