"""What every use of Ray here shares: the connection to a cluster, and actors that each do one thing for this process.

An actor is asked once, with bytes that msgspec encoded, and its answer is its end: "" in good order, else why not, as text.
"""

from __future__ import annotations

import contextlib
import os
import platform
import re
import signal
import socket
import threading
from collections.abc import Callable, Iterable
from typing import Any

from lockstep.config.errors import ConfigError
from lockstep.config.tree import ParallelConfig
from lockstep.observability import logging
from lockstep.utils import env
from lockstep.utils.cores import usable_cpus

LEAVE_S = 3.0  # how long actors may take to leave by themselves
MOST_WORDS = 400  # characters of what Ray says that are passed on
_COLOUR = re.compile(r"\x1b\[[0-9;]*m")
_log = logging.get_logger(__name__)


class Session:
    """This process's connection to a Ray cluster: one for all executors, given up with the last one if it was made here."""

    _users, _ours = 0, False
    _lock = threading.Lock()

    @classmethod
    def open(cls, parallel: ParallelConfig, kind: str) -> None:
        """Connect, unless that is done. Raises ConfigError when no cluster answers."""
        import ray

        with cls._lock:
            if not ray.is_initialized():
                handler = signal.getsignal(signal.SIGTERM)
                _connect(parallel, kind)
                cls._ours = True
                if threading.current_thread() is threading.main_thread():
                    signal.signal(signal.SIGTERM, handler)  # Ray puts its own there: what a signal does is the program's to say
            cls._users += 1

    @staticmethod
    def address() -> str:
        """This host's address as the cluster's nodes know it."""
        import ray

        return str(ray.util.get_node_ip_address())

    @classmethod
    def close(cls) -> None:
        """The opposite of `open`."""
        import ray

        with cls._lock:
            cls._users -= 1
            if cls._users == 0 and cls._ours:
                cls._ours = False
                ray.shutdown()


def _connect(parallel: ParallelConfig, kind: str) -> None:
    """To the cluster at RAY_ADDRESS, else to one that was started on this host, else to one of this process's own."""
    import ray

    address, quiet = env.ray_address(), {"log_to_driver": False, "configure_logging": False}
    if address.startswith("ray://"):
        raise ConfigError(
            f"RAY_ADDRESS={address!r} is for Ray's client, and the ranks must reach this process: run it on a node of the cluster, "
            "with RAY_ADDRESS=auto."
        )
    try:
        if address != "local":
            _probe(address)
            ray.init(address=address or "auto", **quiet)
            return
    except OSError as e:  # a ConnectionError, too
        if address:
            words = str(e).partition("\n")[0]
            raise ConfigError(
                f"RAY_ADDRESS={address!r}: no Ray cluster answers there ({words}): start it, set RAY_AUTH_MODE=token if it wants one (and "
                "have its token here, see `ray get-auth-token`), or unset RAY_ADDRESS."
            ) from None
    except Exception as e:  # one answers, and will not have us: a cluster of our own is not what was meant
        with contextlib.suppress(Exception):
            ray.shutdown()
        which = f"RAY_ADDRESS={address!r}" if address else "the Ray cluster that runs on this host"
        raise ConfigError(
            f"{which} cannot be used: {_in_one_line(e)}. Install the cluster's versions of Ray and Python here (these are Ray "
            f"{ray.__version__} and Python {platform.python_version()}), set RAY_AUTH_MODE=token if it wants a token (see `ray "
            "get-auth-token`), or set RAY_ADDRESS=local for a cluster of this process's own."
        ) from None
    if parallel.local_replicas > 1:
        raise ConfigError(
            f"data_parallel_size={parallel.data_parallel_size} with distributed_executor_backend='ray': every replica connects to the "
            "same cluster, and none runs here: start one with `ray start --head`, or set RAY_ADDRESS."
        )
    cpus = max(usable_cpus(), parallel.world_size if kind == "CPU" else 1)
    _log.info("no Ray cluster runs here: starting one for this process (%d CPUs)", cpus)
    ray.init(address="local", num_cpus=cpus, include_dashboard=False, **quiet)


def _probe(address: str) -> None:
    """Raises OSError where nobody listens: Ray would wait for long, and may end the process."""
    host, _, port = address.rpartition(":")
    if host and port.isdigit():
        socket.create_connection((host.strip("[]"), int(port)), 5.0).close()


def _in_one_line(error: Exception) -> str:
    words = " ".join(_COLOUR.sub("", str(error)).split()) or type(error).__name__
    return words[:MOST_WORDS].rstrip(". ")


class Troupe:
    """The actors of one engine, by number. Closing it leaves none."""

    def __init__(self) -> None:
        self._owner = os.getpid()
        self._open = False
        self._actors: dict[int, Any] = {}
        self._made: dict[int, Any] = {}  # done once the actor has a place in the cluster
        self._ends: dict[int, Any] = {}  # what becomes of it

    def join(self, parallel: ParallelConfig, kind: str) -> str:
        """Join the cluster; this host's address as its nodes know it. Raises ConfigError when none can be used."""
        Session.open(parallel, kind)
        self._open = True
        return Session.address()

    def start(self, number: int, actor: type, method: str, launch: bytes, room: tuple[str, float], options: dict[str, Any]) -> None:
        """Start an actor, and have it do `method`. One of that number that has ended makes room.

        room: CPU or GPU, and how many of one node. options: what else Ray is to know. It has the settings of our environment that
        mean the same on its host.
        """
        import ray

        before = self._actors.pop(number, None)
        if before is not None:
            ray.kill(before)
        kind, count = room
        options = {**options, "num_cpus": count if kind == "CPU" else 0, "num_gpus": count if kind == "GPU" else 0}
        shared = env.for_other_hosts()
        if shared:
            options["runtime_env"] = {"env_vars": shared}
        made = self._actors[number] = ray.remote(actor).options(**options).remote()
        self._made[number] = made.__ray_ready__.remote()
        self._ends[number] = getattr(made, method).remote(launch)

    def over(self, numbers: Iterable[int], timeout_s: float = 0.0) -> dict[int, str]:
        """Which of these have ended, and how, in words; waits so long for all of them. Never raises."""
        import ray

        wanted = {number: self._ends[number] for number in numbers if number in self._ends}
        try:
            if not wanted or not ray.is_initialized():
                return {}
            done, _ = ray.wait(list(wanted.values()), num_returns=len(wanted), timeout=timeout_s)
        except Exception:  # the cluster is gone
            return {}
        return {number: _outcome(end, timeout_s + 1.0) for number, end in wanted.items() if end in done}

    def pending(self) -> list[int]:
        """The numbers of those that wait for room in the cluster."""
        import ray

        if not self._made or not ray.is_initialized():
            return []
        _, waiting = ray.wait(list(self._made.values()), num_returns=len(self._made), timeout=0.0)
        return [number for number, made in self._made.items() if made in waiting]

    def close(self, before_leaving: Callable[[], None] | None = None) -> None:
        """End the actors, and leave the cluster if it was joined here. Never raises; may be called twice, and by a forked child."""
        if not self._open or os.getpid() != self._owner:
            return
        self._open = False
        import ray

        with contextlib.suppress(Exception):  # the cluster may be gone, which is as good
            if ray.is_initialized():
                if self._ends:
                    ray.wait(list(self._ends.values()), num_returns=len(self._ends), timeout=LEAVE_S)
                for actor in self._actors.values():
                    ray.kill(actor)
                if before_leaving is not None:
                    before_leaving()
        for held in (self._actors, self._made, self._ends):
            held.clear()
        with contextlib.suppress(Exception):
            Session.close()


def _outcome(end: Any, timeout_s: float) -> str:
    import ray

    try:
        return str(ray.get(end, timeout=timeout_s))
    except Exception as e:  # the actor is dead, or could not be made
        return in_words(e)


def in_words(error: Exception) -> str:
    """What Ray says about an actor, without its colours, carets and guesses: the first line and the last."""
    cause = getattr(error, "cause", None)
    if cause is not None:  # what the actor's own code raised
        return f"{type(cause).__name__}: {cause}"
    lines = [_COLOUR.sub("", line).partition(" Some common causes")[0].strip() for line in str(error).splitlines()]
    lines = [line for line in lines if line.strip("^~ ")]
    return " ".join(dict.fromkeys((lines or [type(error).__name__])[:: max(1, len(lines) - 1)]))
