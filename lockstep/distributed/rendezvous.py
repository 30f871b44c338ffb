"""How ranks find each other.

One rank serves a key-value store on a socket that somebody bound beforehand; all others connect to it with back-off.
Every rank writes its phase into the store, so that a timeout can say who is missing and what each was last doing.
Importing this module loads no torch: a launcher needs only `Listener`.
"""

from __future__ import annotations

import logging
import os
import socket
import time
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from lockstep.utils import env, net
from lockstep.utils.net import Listener

if TYPE_CHECKING:
    import torch

__all__ = ["Listener", "Rendezvous", "RendezvousError", "connect", "join"]

logger = logging.getLogger(__name__)
_PREFIX = "lockstep/rendezvous"


class RendezvousError(TimeoutError):
    """Ranks did not meet in time. `missing` are the ranks that did not get to `phase`."""

    def __init__(self, message: str, *, phase: str, missing: list[int]) -> None:
        super().__init__(message)
        self.phase, self.missing = phase, missing


class Rendezvous:
    """This rank's seat at the store: says what it does, waits for the others, knows who is late."""

    def __init__(self, store: Any, rank: int, world_size: int, timeout_s: float, where: str) -> None:
        self.store, self.rank, self.world_size, self.timeout_s, self.where = store, rank, world_size, timeout_s, where

    def note(self, phase: str) -> None:
        """Say what this rank does now."""
        self.store.set(f"{_PREFIX}/phase/{self.rank}", f"{time.time():.3f} {socket.gethostname()} {os.getpid()} {phase}")

    def meet(self, phase: str, timeout_s: float | None = None) -> None:
        """Return when every rank has reached `phase`. Raises RendezvousError naming the missing ranks after the timeout."""
        limit = self.timeout_s if timeout_s is None else timeout_s
        self.note(phase)
        self.store.set(f"{_PREFIX}/at/{phase}/{self.rank}", "1")
        keys = [f"{_PREFIX}/at/{phase}/{rank}" for rank in range(self.world_size)]
        started = time.monotonic()
        try:
            self.store.wait(keys, timedelta(seconds=limit))
        except Exception as error:  # the store raises DistStoreError or RuntimeError, depending on torch's version
            raise self._late(phase, keys, time.monotonic() - started, error) from error

    def _late(self, phase: str, keys: list[str], waited_s: float, error: Exception) -> RendezvousError:
        try:
            missing = [rank for rank, key in enumerate(keys) if not self.store.check([key])]
            said = [f"rank {rank} ({self._last_words(rank)})" for rank in missing]
        except Exception:
            return RendezvousError(
                f"rank {self.rank} lost the rendezvous at {self.where} after {waited_s:.1f} s in phase {phase!r}: "
                f"the rank that serves it is gone ({error}).",
                phase=phase,
                missing=[],
            )
        return RendezvousError(
            f"rank {self.rank} waited {waited_s:.1f} s at {self.where} for {len(missing)} of {self.world_size} ranks "
            f"to reach {phase!r}; missing: {', '.join(said)}.",
            phase=phase,
            missing=missing,
        )

    def _last_words(self, rank: int) -> str:
        key = f"{_PREFIX}/phase/{rank}"
        if not self.store.check([key]):
            return "never connected"
        when, host, pid, phase = self.store.get(key).decode().split(" ", 3)
        return f"last in {phase!r}, {max(0.0, time.time() - float(when)):.1f} s ago, pid {pid} on {host}"


def connect(rank: int, world_size: int, host: str, port: int, listen_fd: int | None = None, timeout_s: float = 300.0) -> Any:
    """The torch store that all ranks share. Rank 0 serves it, on `listen_fd` or on a socket it binds itself at host:port.

    The others try again, with back-off, until it is there. Raises RendezvousError after `timeout_s`.
    """
    from torch.distributed import TCPStore

    deadline = time.monotonic() + timeout_s
    if rank == 0:
        fd = listen_fd if listen_fd is not None else _bound(host, port)
        assert net.is_open(fd), f"listening socket {fd} is not open in this process: pass it on with pass_fds"
        # The store owns the descriptor from here on and closes it.
        return TCPStore(host, port, world_size, True, timedelta(seconds=timeout_s), wait_for_workers=False, master_listen_fd=fd)
    pause, last = 0.01, ""
    while True:
        left = deadline - time.monotonic()
        if left <= 0:
            raise RendezvousError(
                f"rank {rank} could not reach the rendezvous at {host}:{port} in {timeout_s:.1f} s; "
                f"missing: rank 0 (which serves it). Last error: {last or 'none'}.",
                phase="connect",
                missing=[0],
            )
        last = _refused(host, port, min(left, 5.0))
        if not last:
            try:
                return TCPStore(host, port, world_size, False, timedelta(seconds=max(left, 0.1)), wait_for_workers=False)
            except Exception as error:  # the server went away between the two connections
                last = str(error).splitlines()[0]
        time.sleep(min(pause, max(0.0, deadline - time.monotonic())))
        pause = min(pause * 1.6, 1.0)


def _bound(host: str, port: int) -> int:
    try:
        return Listener(net.resolve(host), port).detach()
    except OSError as error:
        raise OSError(
            error.errno,
            f"rank 0 cannot serve the rendezvous at {host}:{port} ({error.strerror}); choose another port, or hand it a bound socket.",
        ) from error


def _refused(host: str, port: int, timeout_s: float) -> str:
    """Why a connection to host:port fails now; empty when it does not. Cheap to ask again, unlike a store client."""
    try:
        socket.create_connection((host, port), timeout=timeout_s).close()
    except OSError as error:
        return str(error)
    return ""


def choose_interface(host: str) -> str:
    """The network interface on which ranks should talk when the rendezvous is at `host`: loopback on one machine."""
    if env.network_interface():
        return env.network_interface()
    if not host or net.is_loopback(host):
        return net.loopback_interface()
    source = net.source_address(host)
    interface = net.interface_of(source)
    if interface is None or net.is_loopback(source):
        # The peer is this machine itself under another of its addresses.
        interface = net.interface_of(net.resolve(host)) or interface
    return interface or net.loopback_interface()


def open_store(init_method: str, rank: int, world_size: int, timeout_s: float, listen_fd: int | None = None) -> tuple[Any, str]:
    """-> (store, host) for env://, tcp://host:port or file:///path. Raises ValueError for anything else."""
    if init_method.startswith("env://"):
        return _env_store(rank, world_size, timeout_s, listen_fd)
    if init_method.startswith("tcp://"):
        host, _, port = init_method.removeprefix("tcp://").split("?")[0].rstrip("/").rpartition(":")
        host = host.strip("[]")
        if not host or not port.isdigit():
            raise ValueError(f"init method {init_method!r} must be tcp://host:port.")
        return connect(rank, world_size, host, int(port), listen_fd, timeout_s), host
    if init_method.startswith("file://"):
        from torch.distributed import FileStore

        path = init_method.removeprefix("file://")
        if not path:
            raise ValueError(f"init method {init_method!r} must be file:///path, a new file that all ranks can write.")
        store = FileStore(path, world_size)
        store.set_timeout(timedelta(seconds=timeout_s))
        return store, ""
    raise ValueError(f"init method {init_method!r} is unknown: use env://, tcp://host:port or file:///path.")


# The stores at master addresses, kept for the life of the process: (store, how often ranks met there). A rank that comes back for
# another life must not meet a server that is about to close, nor find the former life's keys.
_env_stores: dict[tuple[Any, ...], tuple[Any, int]] = {}


def _env_store(rank: int, world_size: int, timeout_s: float, listen_fd: int | None) -> tuple[Any, str]:
    from torch.distributed import PrefixStore

    address = env.master_address()
    if address is None:
        raise ValueError("init method env:// needs MASTER_ADDR and MASTER_PORT; torchrun sets them, or use tcp://host:port.")
    host, port = address
    seat = (host, port, rank, world_size, os.getpid())
    store, lives = _env_stores.get(seat, (None, 0))
    if store is None:
        store = _agent_store(host, port, world_size, timeout_s) or connect(rank, world_size, host, port, listen_fd, timeout_s)
    _env_stores[seat] = store, lives + 1
    return PrefixStore(f"lockstep/life_{lives}", store), host


def _agent_store(host: str, port: int, world_size: int, timeout_s: float) -> Any:
    """The store that torchrun's agent serves at the master address; None where it does not."""
    if not env.has_agent_store():
        return None
    from torch.distributed import PrefixStore, TCPStore

    store = TCPStore(host, port, world_size, False, timedelta(seconds=timeout_s), wait_for_workers=False)
    return PrefixStore(f"lockstep/attempt_{env.restart_count()}", store)  # apart from what an attempt before this one left


def join(
    rank: int,
    world_size: int,
    local_rank: int,
    host: str,
    port: int,
    listen_fd: int | None = None,
    backend: str | None = None,
    timeout_s: float = 300.0,
) -> None:
    """Meet the other ranks and make the default and the world group: `init_distributed_environment` is done after this.

    listen_fd: rank 0's inherited listening socket, bound at host:port by the launcher.
    """
    from lockstep.distributed import parallel_state

    store = connect(rank, world_size, host, port, listen_fd, timeout_s)
    parallel_state.init_from_store(store, rank, world_size, local_rank, host, backend, timeout_s, f"{host}:{port}")


def device_for(backend: str, local_rank: int) -> torch.device:
    """The device that `backend` uses for this rank, made current where that means something."""
    import torch

    if "nccl" not in backend:
        return torch.device("cpu")
    count = torch.cuda.device_count()
    if local_rank >= count:
        raise ValueError(f"local rank {local_rank} needs {local_rank + 1} CUDA devices, this machine shows {count}.")
    device = torch.device("cuda", local_rank)
    torch.cuda.set_device(device)
    return device
