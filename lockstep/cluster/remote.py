"""A replica that another host keeps, as the router holds it: a connection, and what came last over it."""

from __future__ import annotations

import contextlib
import errno
import time

from lockstep.cluster import wire
from lockstep.cluster.doorman import Arrival
from lockstep.cluster.replica import ReplicaHandle
from lockstep.executor.contract import ExecutorError
from lockstep.utils.frames import Channel

_UNANSWERED = (errno.ETIMEDOUT, errno.EHOSTUNREACH, errno.ENETUNREACH, errno.EHOSTDOWN)


class RemoteReplica(ReplicaHandle):
    """One start of one replica on another host. Its process is that host's keeper's to start and to end."""

    pid = 0

    def __init__(self, arrival: Arrival) -> None:
        super().__init__(arrival.replica, Channel(arrival.connection, wire.decode_reply))
        self.arrival = arrival

    @property
    def name(self) -> str:
        return f"replica {self.replica} on host {self.arrival.host}"

    def unexplained(self) -> ExecutorError:
        why, broken = "the connection was closed: its process or its host's keeper ended", self.channel.broken
        if broken is not None:
            words = broken.strerror or str(broken)
            why = f"its host does not answer any more ({words})" if broken.errno in _UNANSWERED else f"the connection failed ({words})"
        return ExecutorError(f"{self.name} is lost: {why}.", kind="died")

    def end(self, ask: bool, until_s: float) -> None:
        try:
            # What is unread here when we close would make the kernel drop what it has not sent yet.
            with contextlib.suppress(OSError, ValueError):  # ValueError: what comes last may be nothing that we know
                self.channel.receive()
                while ask and (left := until_s - time.monotonic()) > 0 and self.channel.wait(left):
                    self.channel.flush()
                    self.channel.receive()
        finally:
            self.channel.close()
