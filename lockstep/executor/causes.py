"""Why a rank gave up, told to ranks that have no driver in common: notes in the store, and the groups marked as failed.

A rank that raises leaves the others in a collective that it will never come to. Where ranks share memory they are woken with
its reason; over sockets they notice when the process ends, or after the group's timeout. Either way what they see is an echo:
the note names the rank and its exception. Where nobody has a cause to note, a rank may be gone: then the roll is called.
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
from lockstep.executor.contract import ExecutorError
from lockstep.executor.roll_call import RollCall

Found = TypeVar("Found")
PATIENCE_S = 2.0  # how long after an echo its cause may take to be noted
_PAUSE_S = 0.05

# What shared memory says of a peer that will not come. (Sockets' words are known to `failure`.)
_LOSS = ("has failed", "has left the group", "is dead", "has not come in")


def is_echo(answer: wire.Raised) -> bool:
    """Whether an exception may only tell of another rank's."""
    return any(words in answer.message for words in _LOSS) or failure.tells_of_a_lost_peer(answer)


class Note(msgspec.Struct, array_like=True):
    """What a rank raised. lost: the ranks that did not answer when it asked who is there."""

    rank: int
    answer: wire.Raised
    lost: list[int] = []


_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(Note).decode


class Causes:
    """The notes of one replica's ranks. `life` keeps those of a former LLM apart. `close` it at the end.

    spared: names of groups not to be marked, since the user's program has them.
    """

    def __init__(self, groups: ParallelGroups, life: int, spared: Collection[str] = ()) -> None:
        self.hosts: list[str] = []  # of the ranks; written by the executor once it knows
        self._groups, self._spared, replica = groups, spared, groups.replica
        self._ranks, self._mine = range(replica.world_size), replica.rank_in_group
        self._store = parallel_state.shared_store(f"causes/{life}/{replica.ranks[0]}") if replica.world_size > 1 else None
        self._roll = RollCall(self._store, self._mine, self._ranks) if self._store is not None else None

    def explain(self, answer: wire.Raised) -> ExecutorError:
        """The error of the rank that is at the bottom of what this one raised and will not survive. It is noted for the others."""
        note = Note(self._mine, answer)
        if self._roll is not None and is_echo(answer):
            found = _within(2 * PATIENCE_S, lambda: self._look(answer, self._roll))
            if found is None:
                self._break_groups(answer)
                return failure.cut_off(self._mine, answer)
            note = found
        if note.rank == self._mine:
            self._tell(note)
        if note.lost:
            return failure.missing(note.lost, [self.hosts[rank] for rank in note.lost if self.hosts], note.rank, note.answer)
        return failure.raised(note.rank, note.answer)

    def tell(self, answer: wire.Raised) -> None:
        """Note what this rank raised, and survives: others may be waiting for it."""
        self._tell(Note(self._mine, answer))

    def close(self) -> None:
        """Answer no more for this rank. May be called twice."""
        if self._roll is not None:
            self._roll.close()

    def _tell(self, note: Note) -> None:
        """Put it where others look; when it is fatal, wake the ranks that wait for this one."""
        if self._store is None:
            return
        store = self._store
        _within(PATIENCE_S, lambda: store.set(str(self._mine), _encode(note)))
        if note.answer.fatal:
            self._break_groups(note.answer)

    def _look(self, answer: wire.Raised, roll: RollCall) -> Note:
        """The note of another rank (of anything, if that ended it, else of this very operation), or else one of our own, with the
        ranks that are missing. Raises what the store does."""
        deadline = time.monotonic() + PATIENCE_S
        roll.call()
        while True:
            for rank in self._ranks:
                if rank != self._mine and self._store.check([str(rank)]):
                    note = _decode(self._store.get(str(rank)))
                    if note.answer.fatal or note.answer.id == answer.id:
                        return note
            if time.monotonic() > deadline:
                return Note(self._mine, answer, roll.missing())
            time.sleep(_PAUSE_S)

    def _break_groups(self, answer: wire.Raised) -> None:
        reason = f"rank {self._mine} raised {answer.error_type} in {answer.phase}: {answer.message}"
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
