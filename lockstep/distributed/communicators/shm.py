"""Collectives through memory that the ranks of one host share. The work is done in kernels/csrc/comm*.cpp."""

from __future__ import annotations

import weakref
from array import array
from collections.abc import Sequence
from math import prod
from typing import Any

import torch
from torch import Tensor

from lockstep.distributed import ledger
from lockstep.distributed.communicators.base import Communicator
from lockstep.distributed.communicators.segment import RING_BYTES, SLOT_BYTES
from lockstep.distributed.handles import DoneHandle, Handle
from lockstep.distributed.reduction_tree import ReductionTree

# The numbers of dtypes that can be added: with_type in comm_reduce.h. The first four are also the kernels'.
SUMMED = {
    torch.float32: 0, torch.bfloat16: 1, torch.float16: 2, torch.int8: 3, torch.uint8: 4, torch.bool: 5,
    torch.int16: 6, torch.int32: 7, torch.int64: 8, torch.float64: 9,
}  # fmt: skip
_OTHER = 255


class ShmCommunicator(Communicator):
    """All ranks on one host. Waits spin, then hand the core on, then sleep; a dead or late rank is a RuntimeError that names it.

    After such an error the group stays failed. native_handle: a `Group*` for the kernels, so that an operation can meet
    the other ranks itself; valid until `close`. Sums of dtypes that it does not know are left to `inner`.
    """

    def __init__(self, lib: Any, group: int, rank: int, world_size: int, inner: Communicator | None) -> None:
        """`group`: from `segment.open_groups`; this takes it over. `inner`: of the same ranks; None where nobody needs it."""
        super().__init__(rank, world_size, torch.device("cpu"))
        self._lib, self.native_handle, self.inner = lib, group, inner
        self._reduce = lib.shm_all_reduce
        self._unfinished: set[_Transfer] = set()
        # Dropped without close(), it frees itself; not before its transfers are done, which hold it.
        self._free = weakref.finalize(self, lib.shm_free, group)
        self._free.atexit = False

    def all_reduce_(self, x: Tensor) -> None:
        dtype = SUMMED.get(x.dtype)
        if dtype is None:
            self._other(x).all_reduce_(x)
        elif x.is_contiguous():
            self._reduce(self.native_handle, x.data_ptr(), x.numel(), dtype)
        else:
            dense = x.contiguous()
            self._reduce(self.native_handle, dense.data_ptr(), dense.numel(), dtype)
            x.copy_(dense)

    def combine(self, partials: Tensor, tree: ReductionTree) -> Tensor:
        partials = partials.contiguous()
        out = partials.new_empty(partials.shape[1:])
        counts, code = array("q", tree.counts), array("q", tree.code)
        self._lib.shm_combine(self._group, partials.data_ptr(), out.data_ptr(), _at(counts), _at(code), len(code), out.numel())
        return out

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        return self.all_gatherv(x, [x.shape[dim]] * self.world_size, dim)

    def all_gatherv(self, x: Tensor, sizes: Sequence[int], dim: int) -> Tensor:
        out = x.new_empty(_resized(x, dim, sum(sizes)))
        self._join(self._lib.shm_all_gather, x, out, sizes, dim)
        return out

    def gather(self, x: Tensor, dst: int, dim: int) -> Tensor | None:
        sizes = [x.shape[dim]] * self.world_size
        out = x.new_empty(_resized(x, dim, sum(sizes))) if self.rank == dst else None
        self._join(self._lib.shm_gather, x, out, sizes, dim, dst)
        return out

    def largest(self, values: Tensor, ids: Tensor) -> Tensor:
        values, ids = values.contiguous(), ids.contiguous()
        out = torch.empty_like(ids)
        self._lib.shm_largest(self._group, values.data_ptr(), ids.data_ptr(), len(ids), out.data_ptr())
        return out

    def _join(self, function: Any, x: Tensor, out: Tensor | None, sizes: Sequence[int], dim: int, *more: int) -> None:
        x = x.contiguous()
        outer, unit = prod(x.shape[:dim]), prod(x.shape[dim + 1 :]) * x.element_size()
        inner = array("q", [size * unit for size in sizes])
        function(self._group, x.data_ptr(), 0 if out is None else out.data_ptr(), outer, _at(inner), *more, SUMMED.get(x.dtype, _OTHER))

    def reduce_scatter(self, x: Tensor, dim: int) -> Tensor:
        return self.reduce_scatterv(x, [x.shape[dim] // self.world_size] * self.world_size, dim)

    def reduce_scatterv(self, x: Tensor, sizes: Sequence[int], dim: int) -> Tensor:
        dtype = SUMMED.get(x.dtype)
        if dtype is None:
            return self._other(x).reduce_scatterv(x, sizes, dim)
        rows = x.movedim(dim, 0).contiguous()
        out = rows.new_empty((sizes[self.rank], *rows.shape[1:]))
        unit = prod(rows.shape[1:])
        counts = array("q", [size * unit for size in sizes])
        self._lib.shm_reduce_scatter(self._group, rows.data_ptr(), out.data_ptr(), _at(counts), dtype)
        return out.movedim(0, dim).contiguous()

    def broadcast_(self, x: Tensor, src: int) -> None:
        dense = x.contiguous()
        self._lib.shm_broadcast(self._group, dense.data_ptr(), dense.nbytes, src, SUMMED.get(x.dtype, _OTHER))
        if dense is not x:
            x.copy_(dense)

    def all_to_all(self, x: Tensor) -> Tensor:
        rows = [x.shape[0] // self.world_size] * self.world_size
        return self.all_to_allv(x, rows, rows)

    def all_to_allv(self, x: Tensor, send_sizes: Sequence[int], recv_sizes: Sequence[int]) -> Tensor:
        x = x.contiguous()
        out = x.new_empty((sum(recv_sizes), *x.shape[1:]))
        row = prod(x.shape[1:]) * x.element_size()
        send, recv = array("q", [n * row for n in send_sizes]), array("q", [n * row for n in recv_sizes])
        self._lib.shm_all_to_all(self._group, x.data_ptr(), out.data_ptr(), _at(send), _at(recv), SUMMED.get(x.dtype, _OTHER))
        return out

    def isend(self, x: Tensor, dst: int) -> Handle:
        return self._start(self._lib.shm_send, x.contiguous(), dst)

    def irecv_(self, x: Tensor, src: int) -> Handle:
        return self._start(self._lib.shm_receive, x, src)

    def _start(self, function: Any, x: Tensor, peer: int) -> Handle:
        number = function(self._group, peer, x.data_ptr(), x.nbytes, SUMMED.get(x.dtype, _OTHER))
        if not number:
            return DoneHandle()
        # A handle that nobody waits for must not take the tensor with it while bytes move.
        for transfer in tuple(self._unfinished):
            transfer.is_completed()
        handle = _Transfer(self, number, x)
        self._unfinished.add(handle)
        return handle

    def barrier(self) -> None:
        self._lib.shm_barrier(self._group)

    @property
    def nbytes(self) -> int:
        """This rank's part of the memory that the group shares."""
        return int(self._lib.shm_bytes(self.world_size, SLOT_BYTES, RING_BYTES)) // self.world_size

    def waited_s(self) -> float:
        """Seconds that this rank has waited here for ranks that came later, in whatever language it met them."""
        return float(self._lib.shm_waited_s(self.native_handle)) if self.native_handle else 0.0

    def fail(self, reason: str) -> None:
        """Keep the group failed and tell the other ranks why. Raises RuntimeError."""
        self._lib.shm_fail(self._group, reason)

    def close(self) -> None:
        if self.native_handle:
            self._free()
            self.native_handle, self._reduce = 0, _closed
            self._unfinished.clear()
        if self.inner is not None:
            self.inner.close()

    def _other(self, x: Tensor) -> Communicator:
        """Who adds what this cannot."""
        if self.inner is None:
            raise TypeError(f"shared memory has no sums of {x.dtype}.")
        return self.inner

    @property
    def _group(self) -> int:
        assert self.native_handle, "the communicator is closed"
        return self.native_handle


class _Transfer:
    """A send or receive under way."""

    def __init__(self, owner: ShmCommunicator, number: int, x: Tensor) -> None:
        self._owner, self._number, self._keep = owner, number, x

    def is_completed(self) -> bool:
        if self._number and self._owner._lib.shm_test(self._owner._group, self._number):
            self._end()
        return not self._number

    def wait(self) -> None:
        if self._number and ledger.active:
            ledger.active[0].wait_for(self.is_completed)
        if self._number:
            self._owner._lib.shm_wait(self._owner._group, self._number)
            self._end()

    def _end(self) -> None:
        self._owner._lib.shm_drop(self._owner._group, self._number)
        self._owner._unfinished.discard(self)
        self._number = 0
        del self._keep


def _closed(*_: Any) -> None:
    raise AssertionError("the communicator is closed")


def _at(numbers: array[int]) -> int:
    return numbers.buffer_info()[0]


def _resized(x: Tensor, dim: int, size: int) -> tuple[int, ...]:
    return (*x.shape[:dim], size, *x.shape[dim + 1 :])
