"""Another device's tensors over a host communicator: several ranks on one GPU, or a device without a library of its own."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from lockstep.distributed.communicators.base import Communicator
from lockstep.distributed.handles import Handle


class _ArriveHandle:
    """Copies to the device once the host buffer has arrived."""

    def __init__(self, inner: Handle, arrive: Callable[[], object]) -> None:
        self._inner, self._arrive = inner, arrive

    def is_completed(self) -> bool:
        return self._inner.is_completed()

    def wait(self) -> None:
        self._inner.wait()
        self._arrive()
        self._arrive = lambda: None


class StagedCommunicator(Communicator):
    """Copies to the host, lets `inner` do the work, copies back."""

    def __init__(self, inner: Communicator, device: torch.device) -> None:
        super().__init__(inner.rank, inner.world_size, device)
        self.inner = inner

    def all_reduce_(self, x: Tensor) -> None:
        host = x.cpu()
        self.inner.all_reduce_(host)
        x.copy_(host)

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        return self.inner.all_gather(x.cpu(), dim).to(x.device)

    def all_gatherv(self, x: Tensor, sizes: Sequence[int], dim: int) -> Tensor:
        return self.inner.all_gatherv(x.cpu(), sizes, dim).to(x.device)

    def reduce_scatter(self, x: Tensor, dim: int) -> Tensor:
        return self.inner.reduce_scatter(x.cpu(), dim).to(x.device)

    def reduce_scatterv(self, x: Tensor, sizes: Sequence[int], dim: int) -> Tensor:
        return self.inner.reduce_scatterv(x.cpu(), sizes, dim).to(x.device)

    def gather(self, x: Tensor, dst: int, dim: int) -> Tensor | None:
        out = self.inner.gather(x.cpu(), dst, dim)
        return None if out is None else out.to(x.device)

    def broadcast_(self, x: Tensor, src: int) -> None:
        host = x.cpu()
        self.inner.broadcast_(host, src)
        x.copy_(host)

    def all_to_all(self, x: Tensor) -> Tensor:
        return self.inner.all_to_all(x.cpu()).to(x.device)

    def all_to_allv(self, x: Tensor, send_sizes: Sequence[int], recv_sizes: Sequence[int]) -> Tensor:
        return self.inner.all_to_allv(x.cpu(), send_sizes, recv_sizes).to(x.device)

    def isend(self, x: Tensor, dst: int) -> Handle:
        return self.inner.isend(x.cpu(), dst)

    def irecv_(self, x: Tensor, src: int) -> Handle:
        host = torch.empty_like(x, device="cpu")
        return _ArriveHandle(self.inner.irecv_(host, src), lambda: x.copy_(host))

    def barrier(self) -> None:
        self.inner.barrier()

    def close(self) -> None:
        self.inner.close()
