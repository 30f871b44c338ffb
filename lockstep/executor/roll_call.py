"""Who is still there, asked of ranks that have no driver in common, through the store that all of them reach.

A rank that stopped hearing from another cannot tell which one is gone: in a pipeline, or a collective, all of them wait for
the same one. So it calls the roll. Every rank answers from a thread of its own, whatever its engine is doing.

    the rank that noticed     store                      the others
    call            ------->  call
                              call               <-----  look, every LOOK_S
                              here/1, here/2     <-----  answer
    missing         <-------  no here/3: rank 3 is gone, or cut off

The roll is called once in a life, since whoever calls it ends the engine on all ranks.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Sequence
from typing import Any

LOOK_S = 0.5


class RollCall:
    """One rank's part in it. Its methods raise what the store raises, and wait for as long as the store does."""

    def __init__(self, store: Any, rank: int, ranks: Sequence[int]) -> None:
        """store: whose keys are this life's alone. ranks: of the replica, `rank` too."""
        self._store, self._rank, self._ranks = store, rank, ranks
        self._closed = threading.Event()
        threading.Thread(target=self._answer, name="roll-call", daemon=True).start()

    def call(self) -> None:
        """Ask everyone, and answer for oneself."""
        self._store.set("call", "")
        self._store.set(_key(self._rank), "")

    def missing(self) -> list[int]:
        """The ranks that have not answered yet."""
        return [rank for rank in self._ranks if not self._store.check([_key(rank)])]

    def close(self) -> None:
        """Answer no more. May be called twice."""
        self._closed.set()

    def _answer(self) -> None:
        with contextlib.suppress(Exception):  # the store is gone, and with it whoever would ask
            own = _connection(self._store)
            while not self._closed.wait(LOOK_S):
                if own.check(["call"]) and not self._closed.is_set():
                    own.set(_key(self._rank), "")
                    return


def _connection(store: Any) -> Any:
    """One for this thread alone, where the store can make it: a call on one that is cut off never ends, and others wait for it."""
    try:
        return store.clone()
    except Exception:  # a store that a user's program made need not be able to
        return store


def _key(rank: int) -> str:
    return f"here/{rank}"
