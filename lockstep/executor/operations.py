"""Orders under way: who still owes an answer, and who waits for it."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

from lockstep.distributed.progress import rank_list
from lockstep.executor import failure, wire
from lockstep.executor.contract import ExecutorError
from lockstep.protocol import StepResult

if TYPE_CHECKING:
    from lockstep.executor.results import Results


class Operation:
    """One order. Written by the monitor thread under the table's lock, waited for by the caller."""

    def __init__(self, number: int, what: str, ranks: Iterable[int], limit_s: float) -> None:
        self.id, self.what, self.limit_s = number, what, limit_s
        self.missing = set(ranks)  # those that have not answered
        self.values: dict[int, Any] = {}
        self.raised: list[tuple[int, wire.Raised]] = []  # in the order they arrived
        self.raised_at = 0.0
        self.error: ExecutorError | None = None
        self._finished = threading.Event()

    def done(self) -> bool:
        """Whether all answered, or it failed."""
        return self.finished()

    def wait(self, timeout: float | None) -> None:
        """Until done. Raises the ExecutorError it failed with; TimeoutError after `timeout` s."""
        if not self._sleep(timeout):
            raise TimeoutError(f"{self.what}: no answer from {rank_list(sorted(self.missing))} after {timeout} s")
        if self.error is not None:
            raise self.error

    def finished(self) -> bool:
        """As `done`, of what has been taken in so far."""
        return self._finished.is_set()

    def _sleep(self, timeout: float | None) -> bool:
        """Return when done, or after `timeout` s; whether it is done."""
        return self._finished.wait(timeout)

    def finish(self) -> None:
        self._finished.set()


class StepOperation(Operation):
    """The StepFuture of a step. `results`: who takes step results in, set before anybody waits."""

    results: Results

    def done(self) -> bool:
        if not self.finished():
            self.results.take()
        return self.finished()

    def _sleep(self, timeout: float | None) -> bool:
        return super()._sleep(self.results.wait(self, timeout))

    def result(self, timeout: float | None = None) -> StepResult:
        self.wait(timeout)
        (value,) = self.values.values()
        assert isinstance(value, StepResult)
        return value


class Operations:
    """All orders that are not answered yet, oldest first, and the error that ended everything, once there is one."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._open: dict[int, Operation] = {}
        self._last = 0
        self.error: ExecutorError | None = None
        self.frozen = False  # it is about to fail: answers come too late
        self.places: dict[int, str] = {}  # rank -> the other host it is on, in words
        self.oldest_since = 0.0  # monotonic time since which the oldest has been the oldest

    def open(self, make: type[Operation], what: str, ranks: Iterable[int], limit_s: float) -> Operation:
        """A new operation. Raises the terminal error if there is one."""
        with self._lock:
            if self.error is not None:
                raise self.error
            self._last += 1
            operation = make(self._last, what, ranks, limit_s)
            if not self._open:
                self.oldest_since = time.monotonic()
            self._open[operation.id] = operation
            return operation

    def drop(self, operation: Operation) -> None:
        """The order was never given."""
        with self._lock:
            self._open.pop(operation.id, None)

    def answer(self, rank: int, number: int, value: Any) -> None:
        """A rank's value. An answer that nobody waits for is dropped."""
        with self._lock:
            operation = self._open.get(number)
            if operation is None or self.frozen or rank not in operation.missing:
                return
            operation.values[rank] = value
            self._answered(operation, rank)

    def answer_raised(self, rank: int, answer: wire.Raised) -> None:
        """A rank raised in a call and lives on."""
        with self._lock:
            operation = self._open.get(answer.id)
            if operation is None or rank not in operation.missing:
                return
            operation.raised.append((rank, answer))
            operation.raised_at = operation.raised_at or time.monotonic()
            self._answered(operation, rank)

    def _answered(self, operation: Operation, rank: int) -> None:
        operation.missing.discard(rank)
        if operation.missing:
            return
        if operation.raised:
            first_rank, first = operation.raised[0]
            operation.error = failure.raised(first_rank, first, where=self.places.get(first_rank, ""))
        del self._open[operation.id]
        self.oldest_since = time.monotonic()
        operation.finish()

    def oldest(self) -> Operation | None:
        with self._lock:
            return next(iter(self._open.values()), None)

    def half_answered(self, since_s: float) -> Operation | None:
        """A call in which a rank raised more than `since_s` ago while others still owe their answer."""
        latest = time.monotonic() - since_s
        with self._lock:
            return next((o for o in self._open.values() if o.raised and o.raised_at < latest), None)

    def fail(self, error: ExecutorError) -> bool:
        """End everything with `error`. False when something else did before: the first failure wins."""
        with self._lock:
            if self.error is not None:
                return False
            self.error = error
            for operation in self._open.values():
                operation.error = error
                operation.finish()
            self._open.clear()
            return True
