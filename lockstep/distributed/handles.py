"""What an asynchronous transfer gives back."""

from __future__ import annotations

import threading
from typing import Any, Protocol, runtime_checkable

from lockstep.distributed import ledger


@runtime_checkable
class Handle(Protocol):
    """A transfer under way. It keeps what it needs alive; tensors must not be changed (send) or read (receive) before `wait`."""

    def is_completed(self) -> bool: ...

    def wait(self) -> None:
        """Block until the transfer is done. May be called again."""
        ...


class WorkHandle:
    """A torch `Work` together with the tensors that must outlive it."""

    def __init__(self, work: Any, keep: tuple[Any, ...] = (), *, knows_its_state: bool = True) -> None:
        """knows_its_state: False where `work.is_completed` turns true only in `wait`, as gloo's sends and receives do."""
        self._work, self._keep, self._knows = work, keep, knows_its_state
        self._waiter: threading.Thread | None = None
        self._error: BaseException | None = None

    def is_completed(self) -> bool:
        if self._work is None:
            return True
        if self._knows:
            return bool(self._work.is_completed())
        if self._waiter is None:
            # Only a handle that is polled pays for a thread; it sleeps in the library.
            self._waiter = threading.Thread(target=self._wait_aside, name="transfer", daemon=True)
            self._waiter.start()
        return not self._waiter.is_alive()

    def _wait_aside(self) -> None:
        try:
            self._work.wait()
        except BaseException as error:
            self._error = error

    def wait(self) -> None:
        if self._work is None:
            return
        if ledger.active and not self._knows:
            ledger.active[0].wait_for(self.is_completed)
        if self._waiter is None:
            self._work.wait()
        else:
            self._waiter.join()
            if self._error is not None:
                raise self._error
        # Released here, not at garbage collection: a waited handle holds no memory.
        self._work, self._keep, self._waiter = None, (), None


class DoneHandle:
    """A transfer that was finished when it was asked for."""

    def is_completed(self) -> bool:
        return True

    def wait(self) -> None:
        return None
