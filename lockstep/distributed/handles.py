"""What an asynchronous transfer gives back."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable


@runtime_checkable
class Handle(Protocol):
    """A transfer under way. It keeps what it needs alive; tensors must not be changed (send) or read (receive) before `wait`."""

    def is_completed(self) -> bool: ...

    def wait(self) -> None:
        """Block until the transfer is done. May be called again."""
        ...


class WorkHandle:
    """A torch `Work` together with the objects that must outlive it."""

    def __init__(self, work: Any, keep: tuple[Any, ...] = (), then: Callable[[], None] | None = None) -> None:
        self._work, self._keep, self._then = work, keep, then

    def is_completed(self) -> bool:
        return self._work is None or bool(self._work.is_completed())

    def wait(self) -> None:
        if self._work is None:
            return
        self._work.wait()
        if self._then is not None:
            self._then()
        # Released here, not at garbage collection: a waited handle holds no memory.
        self._work, self._keep, self._then = None, (), None


class DoneHandle:
    """A transfer that was finished when it was asked for."""

    def is_completed(self) -> bool:
        return True

    def wait(self) -> None:
        return None
