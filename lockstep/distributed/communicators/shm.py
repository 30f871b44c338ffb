"""Collectives through memory that the ranks of one host share (csrc/comm*.cpp). What it does not do itself, gloo does."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from lockstep.distributed.communicators.base import Communicator
from lockstep.distributed.communicators.torch_pg import TorchCommunicator, merge_front
from lockstep.distributed.handles import Handle
from lockstep.kernels.library import library

SLOT_BYTES = 4 << 20
# comm.cpp: sum_any
_SUM_CODES = {
    torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3, torch.float64: 4, torch.uint8: 5, torch.int16: 6,
    torch.int32: 7, torch.int64: 8,
}  # fmt: skip


class ShmCommunicator(Communicator):
    """All ranks on one host. `native_handle` is the library's group, for programs that combine inside a step."""

    def __init__(self, handle: int, fallback: TorchCommunicator) -> None:
        super().__init__(fallback.rank, fallback.world_size, torch.device("cpu"))
        self._lib: Any = library()
        self._reduce, self._fallback = self._lib.shm_all_reduce, fallback
        self.native_handle = handle

    def all_reduce_(self, x: Tensor) -> None:
        code = _SUM_CODES.get(x.dtype)
        if code is None:
            return self._fallback.all_reduce_(x)
        if x.is_contiguous():
            self._reduce(self.native_handle, x.data_ptr(), x.numel(), x.itemsize, code)
            return None
        dense = x.contiguous()
        self._reduce(self.native_handle, dense.data_ptr(), dense.numel(), dense.itemsize, code)
        x.copy_(dense)
        return None

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        x = x.contiguous()
        parts = x.new_empty((self.world_size, *x.shape))
        self._lib.shm_gather(self.native_handle, x.data_ptr(), x.nbytes, parts.data_ptr())
        return merge_front(parts, dim)

    def gather(self, x: Tensor, dst: int, dim: int) -> Tensor | None:
        x = x.contiguous()
        parts = x.new_empty((self.world_size, *x.shape)) if self.rank == dst else None
        self._lib.shm_gather(self.native_handle, x.data_ptr(), x.nbytes, None if parts is None else parts.data_ptr())
        return None if parts is None else merge_front(parts, dim)

    def broadcast_(self, x: Tensor, src: int) -> None:
        dense = x if x.is_contiguous() else x.contiguous()
        self._lib.shm_broadcast(self.native_handle, dense.data_ptr(), dense.nbytes, src)
        if dense is not x:
            x.copy_(dense)

    def barrier(self) -> None:
        self._lib.shm_barrier(self.native_handle)

    def all_gatherv(self, x: Tensor, sizes: Sequence[int], dim: int) -> Tensor:
        return self._fallback.all_gatherv(x, sizes, dim)

    def reduce_scatter(self, x: Tensor, dim: int) -> Tensor:
        return self._fallback.reduce_scatter(x, dim)

    def reduce_scatterv(self, x: Tensor, sizes: Sequence[int], dim: int) -> Tensor:
        return self._fallback.reduce_scatterv(x, sizes, dim)

    def all_to_all(self, x: Tensor) -> Tensor:
        return self._fallback.all_to_all(x)

    def all_to_allv(self, x: Tensor, send_sizes: Sequence[int], recv_sizes: Sequence[int]) -> Tensor:
        return self._fallback.all_to_allv(x, send_sizes, recv_sizes)

    def isend(self, x: Tensor, dst: int) -> Handle:
        return self._fallback.isend(x, dst)

    def irecv_(self, x: Tensor, src: int) -> Handle:
        return self._fallback.irecv_(x, src)

    def close(self) -> None:
        if self.native_handle:
            self._lib.shm_free(self.native_handle)
            self.native_handle = 0
        self._fallback.close()


def attach(gloo: TorchCommunicator, timeout_s: float, slot_bytes: int = SLOT_BYTES) -> tuple[int, str]:
    """The library's handle of a new segment that all ranks of `gloo`'s group share, or (0, why not). Collective.

    Rank 0 makes the segment; the others open it through rank 0's /proc entry, which only this user's processes on this
    host can. If one of them cannot, none uses it.
    """
    lib = library()
    fd, problem = -1, "" if lib is not None else "the kernel library is not available"
    if not problem and gloo.rank == 0:
        fd = lib.shm_create(gloo.world_size, slot_bytes)
    where = torch.tensor([os.getpid(), fd], dtype=torch.int64)
    gloo.broadcast_(where, 0)
    if not problem and gloo.rank != 0:
        try:
            fd = lib.shm_open_path(f"/proc/{int(where[0])}/fd/{int(where[1])}") if int(where[1]) >= 0 else -1
        except RuntimeError as error:
            problem = str(error)
    able = gloo.all_gather(torch.tensor([not problem and fd >= 0]), 0)
    if not bool(able.all()):
        if fd >= 0:
            os.close(fd)
        return 0, problem or f"ranks {torch.nonzero(~able).flatten().tolist()} of the group cannot open the shared memory"
    handle = int(lib.shm_attach(fd, gloo.rank, gloo.world_size, slot_bytes, timeout_s))
    gloo.barrier()  # everybody's process number is in the segment before anybody waits for it
    return handle, ""
