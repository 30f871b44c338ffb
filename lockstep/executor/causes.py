"""Why a rank gave up, told to ranks that have no driver in common: notes in the store, and the groups marked as failed.

A rank that raises leaves the others in a collective that it will never come to. Where ranks share memory they are woken with
its reason; over sockets they notice when the process ends, or after the group's timeout. Either way what they see is an echo:
the note names the rank and its exception.
"""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import fields
from typing import TypeVar

import msgspec

from lockstep.distributed import parallel_state
from lockstep.distributed.groups import ParallelGroups
from lockstep.executor import failure, wire

Found = TypeVar("Found")
PATIENCE_S = 2.0  # how long after an echo its cause may take to be noted
_PAUSE_S = 0.05
_decode = msgspec.msgpack.Decoder(wire.Raised).decode


# What shared memory says of a peer that will not come. (Sockets' words are known to `failure`.)
_LOSS = ("has failed", "has left the group", "is dead", "has not come in")


def is_echo(answer: wire.Raised) -> bool:
    """Whether an exception may only tell of another rank's."""
    return any(words in answer.message for words in _LOSS) or failure.tells_of_a_lost_peer(answer)


class Causes:
    """The notes of one replica's ranks. `life` keeps those of a former LLM apart.

    spared: names of groups not to be marked, since the user's program has them.
    """

    def __init__(self, groups: ParallelGroups, life: int, spared: Collection[str] = ()) -> None:
        self._groups, self._spared, replica = groups, spared, groups.replica
        self._ranks, self._mine = range(replica.world_size), replica.rank_in_group
        self._store = parallel_state.shared_store(f"causes/{life}/{replica.ranks[0]}") if replica.world_size > 1 else None

    def tell(self, answer: wire.Raised) -> None:
        """Note what this rank raised; when it is fatal, wake the ranks that wait for this one."""
        if self._store is None:
            return
        store = self._store
        _within(PATIENCE_S, lambda: store.set(str(self._mine), wire.encode_value(answer)))
        if answer.fatal:
            self._break_groups(f"rank {self._mine} raised {answer.error_type} in {answer.phase}: {answer.message}")

    def find(self, number: int) -> tuple[int, wire.Raised] | None:
        """(rank, what it raised) of another rank: in anything, if that ended it, else in operation `number`."""
        return None if self._store is None else _within(2 * PATIENCE_S, lambda: self._look(number))

    def _look(self, number: int) -> tuple[int, wire.Raised] | None:
        deadline = time.monotonic() + PATIENCE_S
        while True:
            for rank in self._ranks:
                if rank != self._mine and self._store.check([str(rank)]):
                    answer = _decode(self._store.get(str(rank)))
                    if answer.fatal or answer.id == number:
                        return rank, answer
            if time.monotonic() > deadline:
                return None
            time.sleep(_PAUSE_S)

    def _break_groups(self, reason: str) -> None:
        for field in (f for f in fields(self._groups) if f.name not in self._spared):
            group = getattr(self._groups, field.name)
            fail = getattr(getattr(group, "cpu_communicator", None), "fail", None)
            if fail is not None and group.world_size > 1:
                with contextlib.suppress(Exception):  # it raises what it was told
                    fail(reason)


def _within(limit_s: float, ask: Callable[[], Found]) -> Found | None:
    """What `ask` returns; None when it raises or takes longer. The store's own calls have no limit where its host is cut off,
    and a store that is gone must take nobody's first error away."""
    found: list[Found] = []

    def run() -> None:
        with contextlib.suppress(Exception):
            found.append(ask())

    thread = threading.Thread(target=run, name="causes", daemon=True)
    thread.start()
    thread.join(limit_s)
    return found[0] if found else None
