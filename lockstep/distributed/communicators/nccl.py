"""Collectives between GPUs by NCCL."""

from __future__ import annotations

import torch
from torch import Tensor

from lockstep.distributed.communicators.torch_pg import TorchCommunicator, as_bytes, tree_sum


class NcclCommunicator(TorchCommunicator):
    """Waiting for a NCCL work only orders the current stream after it: nothing here blocks the host."""

    def _sum_slices(self, x: Tensor) -> Tensor:
        if x.dtype in (torch.bfloat16, torch.float16):
            # NCCL rounds after every hop; the contract rounds once.
            received = torch.empty_like(x)
            self.group.alltoall_base(as_bytes(received), as_bytes(x), [], []).wait()
            return tree_sum(received)
        out = torch.empty_like(x[0])
        self.group._reduce_scatter_base(out, x).wait()
        return out

    def barrier(self) -> None:
        one = torch.zeros(1, device=self.device)
        self.group.allreduce([one]).wait()
        torch.cuda.current_stream(self.device).synchronize()
