"""Collectives through a torch ProcessGroup: what gloo and NCCL have in common."""

from __future__ import annotations

from abc import abstractmethod
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lockstep.distributed.communicators.base import Communicator
from lockstep.distributed.handles import Handle, WorkHandle
from lockstep.distributed.reduction_tree import split


def as_bytes(x: Tensor) -> Tensor:
    """A flat uint8 view of contiguous `x`: moving bytes works for every dtype, arithmetic backends know only some."""
    return x.reshape(-1).view(torch.uint8)


def tree_sum(parts: Tensor) -> Tensor:
    """[ranks, ...] -> [...]: the sum in the tree over ranks, half precision summed in float32 and rounded once."""
    wide = torch.float32 if parts.dtype in (torch.bfloat16, torch.float16) else parts.dtype

    def node(lo: int, hi: int) -> Tensor:
        if hi - lo == 1:
            return parts[lo].to(wide)
        mid = split(lo, hi)
        return node(lo, mid) + node(mid, hi)

    return node(0, len(parts)).to(parts.dtype, copy=len(parts) == 1)


class TorchCommunicator(Communicator):
    """Byte movement is shared here; the two sums belong to the backend."""

    works_know_their_state = True

    def __init__(self, group: Any, device: torch.device) -> None:
        super().__init__(group.rank(), group.size(), device)
        self.group = group

    @abstractmethod
    def _sum_slices(self, x: Tensor) -> Tensor:
        """x [ranks, ...], contiguous: this rank's row of the sum over ranks."""

    def all_reduce_(self, x: Tensor) -> None:
        if x.numel() == 0:
            return
        dense = x.contiguous()
        self.group.allreduce([dense]).wait()
        if dense is not x:
            x.copy_(dense)

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        x = x.contiguous()
        parts = x.new_empty((self.world_size, *x.shape))
        if x.numel():
            self.group._allgather_base(as_bytes(parts), as_bytes(x)).wait()
        return merge_front(parts, dim)

    def all_gatherv(self, x: Tensor, sizes: Sequence[int], dim: int) -> Tensor:
        if len(set(sizes)) == 1:
            return self.all_gather(x, dim)
        rows = x.movedim(dim, 0).contiguous()
        padded = rows.new_empty((max(sizes), *rows.shape[1:]))
        padded[: rows.shape[0]] = rows
        parts = self.all_gather(padded, 0).view(self.world_size, max(sizes), *rows.shape[1:])
        joined = torch.cat([part[:size] for part, size in zip(parts, sizes, strict=True)])
        return joined.movedim(0, dim).contiguous()

    def reduce_scatter(self, x: Tensor, dim: int) -> Tensor:
        rows = x.movedim(dim, 0)
        slices = rows.reshape(self.world_size, rows.shape[0] // self.world_size, *rows.shape[1:]).contiguous()
        out = self._sum_slices(slices) if x.numel() else slices[0]
        return out.movedim(0, dim).contiguous()

    def reduce_scatterv(self, x: Tensor, sizes: Sequence[int], dim: int) -> Tensor:
        if len(set(sizes)) == 1:
            return self.reduce_scatter(x, dim)
        mine = sizes[self.rank]
        rows = self.all_to_allv(x.movedim(dim, 0).contiguous(), sizes, [mine] * self.world_size)
        parts = rows.view(self.world_size, mine, *rows.shape[1:])
        return tree_sum(parts).movedim(0, dim).contiguous()

    def gather(self, x: Tensor, dst: int, dim: int) -> Tensor | None:
        x = x.contiguous()
        parts = x.new_empty((self.world_size, *x.shape)) if self.rank == dst else None
        if x.numel():
            options = dist.GatherOptions()
            options.rootRank = dst
            outputs = [[as_bytes(part) for part in parts]] if parts is not None else []
            self.group.gather(outputs, [as_bytes(x)], options).wait()
        return None if parts is None else merge_front(parts, dim)

    def broadcast_(self, x: Tensor, src: int) -> None:
        if x.numel() == 0:
            return
        dense = x.contiguous()
        options = dist.BroadcastOptions()
        options.rootRank, options.rootTensor = src, 0
        self.group.broadcast([as_bytes(dense)], options).wait()
        if dense is not x:
            x.copy_(dense)

    def all_to_all(self, x: Tensor) -> Tensor:
        rows = x.shape[0] // self.world_size
        return self.all_to_allv(x, [rows] * self.world_size, [rows] * self.world_size)

    def all_to_allv(self, x: Tensor, send_sizes: Sequence[int], recv_sizes: Sequence[int]) -> Tensor:
        x = x.contiguous()
        out = x.new_empty((sum(recv_sizes), *x.shape[1:]))
        row = x.element_size() * x[:1].numel() if x.shape[0] else x.new_empty((1, *x.shape[1:])).nbytes
        self.group.alltoall_base(as_bytes(out), as_bytes(x), [n * row for n in recv_sizes], [n * row for n in send_sizes]).wait()
        return out

    def isend(self, x: Tensor, dst: int) -> Handle:
        dense = as_bytes(x.contiguous())
        return WorkHandle(self.group.send([dense], dst, 0), keep=(x, dense), knows_its_state=self.works_know_their_state)

    def irecv_(self, x: Tensor, src: int) -> Handle:
        return WorkHandle(self.group.recv([as_bytes(x)], src, 0), keep=(x,), knows_its_state=self.works_know_their_state)

    def barrier(self) -> None:
        self.group.barrier().wait()


def merge_front(parts: Tensor, dim: int) -> Tensor:
    """[ranks, ...] -> [...] with dim `dim` ranks times as long, in rank order."""
    if dim == 0:
        return parts.flatten(0, 1)
    return parts.movedim(0, dim).flatten(dim, dim + 1).contiguous()
