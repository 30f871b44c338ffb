"""Groups outside torch's default group: for processes that must talk before, beside or without a world.

`StatelessProcessGroup` moves msgpack objects and raw tensors through a TCP store; slow, and enough for control messages.
`stateless_init_torch_distributed_process_group` makes a real torch ProcessGroup that no other group knows of.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lockstep.distributed import codec, rendezvous

ReduceOp = dist.ReduceOp
_REDUCE: dict[Any, Callable[[Tensor, Tensor], Tensor]] = {
    ReduceOp.SUM: torch.add,
    ReduceOp.PRODUCT: torch.mul,
    ReduceOp.MAX: torch.maximum,
    ReduceOp.MIN: torch.minimum,
}


class StatelessProcessGroup:
    """rank, world_size: in this group. Every wait ends after `store_timeout` seconds with TimeoutError naming who is missing."""

    def __init__(self, rank: int, world_size: int, store: Any, data_expiration_seconds: float = 3600, store_timeout: float = 300) -> None:
        self.rank, self.world_size, self.store = rank, world_size, store
        self.data_expiration_seconds, self.store_timeout = data_expiration_seconds, store_timeout
        self._sent = dict.fromkeys(range(world_size), 0)
        self._received = dict.fromkeys(range(world_size), 0)
        self._broadcasts = dict.fromkeys(range(world_size), 0)
        self._barriers = 0
        self._written: deque[tuple[str, float]] = deque()

    @classmethod
    def create(
        cls,
        host: str,
        port: int,
        rank: int,
        world_size: int,
        data_expiration_seconds: float = 3600,
        store_timeout: float = 300,
        listen_socket: Any = None,
    ) -> StatelessProcessGroup:
        """Meet at host:port. listen_socket: rank 0's bound socket or `Listener`; it is taken over."""
        fd = listen_socket.detach() if listen_socket is not None and rank == 0 else None
        store = rendezvous.connect(rank, world_size, host, port, fd, store_timeout)
        return cls(rank, world_size, store, data_expiration_seconds, store_timeout)

    def _peer(self, rank: int) -> int:
        if not 0 <= rank < self.world_size:
            raise ValueError(f"rank {rank} is outside 0..{self.world_size - 1}.")
        return rank

    def _put(self, key: str, obj: Any) -> None:
        data = codec.encode(obj)
        self.expire_data()
        self.store.set(key, data)
        self._written.append((key, time.monotonic()))

    def _take(self, key: str, src: int, timeout_s: float | None = None) -> Any:
        limit = self.store_timeout if timeout_s is None else timeout_s
        try:
            self.store.wait([key], timedelta(seconds=max(limit, 0.001)))
        except Exception as error:
            raise TimeoutError(f"rank {self.rank} waited {limit:.1f} s for rank {src} to write {key!r}: {_first_line(error)}") from error
        return codec.decode(self.store.get(key))

    def expire_data(self) -> None:
        """Delete what this rank wrote longer than `data_expiration_seconds` ago and nobody took."""
        while self._written and time.monotonic() - self._written[0][1] > self.data_expiration_seconds:
            self.store.delete_key(self._written.popleft()[0])

    def send_obj(self, obj: Any, dst: int) -> None:
        """Send to rank `dst`. Objects of one sender arrive in order; senders never mix."""
        self._put(f"send/{self.rank}/{self._peer(dst)}/{self._sent[dst]}", obj)
        self._sent[dst] += 1

    def recv_obj(self, src: int) -> Any:
        """The next object from rank `src`."""
        key = f"send/{self._peer(src)}/{self.rank}/{self._received[src]}"
        obj = self._take(key, src)
        self.store.delete_key(key)
        self._received[src] += 1
        return obj

    def broadcast_obj(self, obj: Any, src: int) -> Any:
        """Rank `src`'s object on every rank."""
        key = f"broadcast/{self._peer(src)}/{self._broadcasts[src]}"
        self._broadcasts[src] += 1
        if self.rank == src:
            self._put(key, obj)
            return obj
        return self._take(key, src)

    def all_gather_obj(self, obj: Any) -> list[Any]:
        """Every rank's object, by rank."""
        return [self.broadcast_obj(obj, src) for src in range(self.world_size)]

    def broadcast(self, tensor: Tensor, src: int) -> Tensor:
        """Rank `src`'s values. `src` gets its own tensor back, the others a new one on their tensor's device."""
        if self.rank == src:
            self.broadcast_obj(tensor.detach().cpu(), src)
            return tensor
        received: Tensor = self.broadcast_obj(None, src).to(tensor.device)
        return received

    def send(self, tensor: Tensor, dst: int) -> None:
        """Send a tensor to rank `dst`."""
        self.send_obj(tensor.detach().cpu(), dst)

    def recv(self, tensor: Tensor, src: int) -> Tensor:
        """The next tensor from rank `src`, as a new tensor on `tensor`'s device. Raises ValueError when shape or dtype differ."""
        received: Tensor = self.recv_obj(src).to(tensor.device)
        if received.shape != tensor.shape or received.dtype != tensor.dtype:
            raise ValueError(
                f"rank {src} sent {received.dtype} {tuple(received.shape)}, rank {self.rank} expects {tensor.dtype} {tuple(tensor.shape)}."
            )
        return received

    def all_reduce(self, tensor: Tensor, op: Any = ReduceOp.SUM) -> Tensor:
        """SUM, PRODUCT, MAX or MIN over ranks, taken in rank order, as a new tensor. Raises ValueError for another op."""
        combine = next((function for known, function in _REDUCE.items() if known == op), None)
        if combine is None:
            raise ValueError(f"all_reduce op {op} is not supported: choose SUM, PRODUCT, MAX or MIN.")
        parts = self.all_gather_obj(tensor.detach().cpu())
        total: Tensor = parts[0].clone()
        for part in parts[1:]:
            total = combine(total, part)
        return total.to(tensor.device)

    def barrier(self, timeout: float = 30.0) -> None:
        """Return when every rank has called it. Raises TimeoutError naming the missing ranks after `timeout` seconds.

        Two rounds: nobody leaves before all have arrived, and rank 0, which may serve the store, leaves last.
        """
        deadline = time.monotonic() + timeout
        number, self._barriers = self._barriers, self._barriers + 1
        for step in ("arrive", "depart"):
            base = f"barrier/{number}/{step}"
            self.store.set(f"{base}/{self.rank}", b"1")
            if step == "depart" and self.rank != 0:
                break
            self._wait_all([f"{base}/{rank}" for rank in range(self.world_size)], deadline, timeout, step)
        if self.rank == 0:
            for rank in range(self.world_size):
                self.store.delete_key(f"barrier/{number}/arrive/{rank}")
                self.store.delete_key(f"barrier/{number}/depart/{rank}")

    def _wait_all(self, keys: list[str], deadline: float, timeout: float, step: str) -> None:
        left = max(deadline - time.monotonic(), 0.001)
        try:
            self.store.wait(keys, timedelta(seconds=left))
        except Exception as error:
            missing = [rank for rank, key in enumerate(keys) if not self.store.check([key])]
            raise TimeoutError(f"barrier: rank {self.rank} waited {timeout:.1f} s; ranks {missing} did not {step}.") from error


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def stateless_init_torch_distributed_process_group(
    host: str,
    port: int,
    rank: int,
    world_size: int,
    backend: str,
    group_name: str | None = None,
    return_store: bool = False,
    listen_socket: Any = None,
    timeout_s: float = 300.0,
) -> Any:
    """A torch ProcessGroup ("gloo" or "nccl") that is in no world; with `return_store` (group, store).

    Release it with `stateless_destroy_torch_distributed_process_group`. listen_socket: as for `StatelessProcessGroup.create`.
    """
    if backend not in ("gloo", "nccl"):
        raise ValueError(f"backend {backend!r} is unknown: choose gloo or nccl.")
    if backend == "nccl" and not dist.is_nccl_available():
        raise ValueError('backend "nccl" needs a torch built with NCCL; use "gloo".')
    fd = listen_socket.detach() if listen_socket is not None and rank == 0 else None
    base = rendezvous.connect(rank, world_size, host, port, fd, timeout_s)
    store = dist.PrefixStore(f"stateless/{group_name or 'group'}", base)
    group = dist.ProcessGroup(store, rank, world_size)
    limit = timedelta(seconds=timeout_s)
    if backend == "gloo":
        options = dist.ProcessGroupGloo._Options()
        options._devices = [dist.ProcessGroupGloo.create_device(interface=rendezvous.choose_interface(host))]
        options._timeout = limit
        inner: Any = dist.ProcessGroupGloo(store, rank, world_size, options)
        device, kind = torch.device("cpu"), dist.ProcessGroup.BackendType.GLOO
    else:
        options = dist.ProcessGroupNCCL.Options()
        options._timeout = limit
        inner = dist.ProcessGroupNCCL(store, rank, world_size, options)
        device, kind = torch.device("cuda"), dist.ProcessGroup.BackendType.NCCL
    inner._set_sequence_number_for_group()
    group._set_default_backend(kind)
    group._register_backend(device, kind, inner)
    if group_name is not None:
        group._set_group_name(group_name)
    return (group, base) if return_store else group


def stateless_destroy_torch_distributed_process_group(group: Any) -> None:
    """Shut a stateless group down; its connections close."""
    group.shutdown()
