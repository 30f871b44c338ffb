"""Collectives over TCP by gloo: the reference on CPU."""

from __future__ import annotations

import torch
from torch import Tensor

from lockstep.distributed.communicators.torch_pg import TorchCommunicator, as_bytes, tree_sum

_ADDS = (torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.int32, torch.int64)  # by itself


class GlooCommunicator(TorchCommunicator):
    """Host memory only; `StagedCommunicator` brings other devices' tensors here."""

    works_know_their_state = False

    def all_reduce_(self, x: Tensor) -> None:
        if x.dtype in _ADDS:
            return super().all_reduce_(x)
        x.copy_(tree_sum(self.all_gather(x.unsqueeze(0), 0)))

    def _sum_slices(self, x: Tensor) -> Tensor:
        received = torch.empty_like(x)
        self.group.alltoall_base(as_bytes(received), as_bytes(x), [], []).wait()
        return tree_sum(received)

    def barrier(self) -> None:
        # A sum, not the group's own barrier: where the group also has a NCCL backend, that would take the GPU's.
        self.group.allreduce([torch.zeros(1)]).wait()
