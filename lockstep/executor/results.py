"""Step results on their way from the output rank to whoever waits for them, with no thread between.

A result that goes through the monitor's socket wakes two threads one after the other, which costs more than all the rest of
a round trip. So the caller of `StepFuture.result` takes results out of a message queue by itself. Everything else a rank has
to say still goes through the socket, and so does a result that finds no room in the queue.
"""

from __future__ import annotations

import threading
import time

from lockstep.distributed.message_queue import MessageQueue, QueueClosed, QueueHandle
from lockstep.executor import wire
from lockstep.executor.operations import Operation, Operations

_RETRY_S = 0.05  # how soon a second waiter looks again whether the first one took its result


class Results:
    """The driver's end."""

    def __init__(self, operations: Operations, rank: int) -> None:
        """`rank` writes, into the queue of `handle`."""
        self.handle: QueueHandle = MessageQueue.prepare()
        self._reader = MessageQueue.attach(self.handle)
        self._operations, self._rank = operations, rank
        self._taking = threading.Lock()

    def wait(self, operation: Operation, timeout: float | None) -> float | None:
        """Return when `operation` is done, after `timeout` s, or when no more results come this way. Other steps' results that
        come first are handed out too. Returns what is left of `timeout`."""
        deadline = None if timeout is None else time.monotonic() + timeout
        left = timeout
        while not operation.finished():
            left = None if deadline is None else deadline - time.monotonic()
            if left is not None and left <= 0:
                return 0.0
            if not self._taking.acquire(timeout=_RETRY_S if left is None else min(_RETRY_S, left)):
                continue
            try:
                self._hand_out(self._reader.poll(left, operation.finished))
            except QueueClosed:  # the rank is dead or we are shutting down: the monitor says which
                break
            finally:
                self._taking.release()
        return left

    def take(self) -> None:
        """Hand out what has come. Does nothing while somebody waits: that one does it."""
        if not self._taking.acquire(blocking=False):
            return
        try:
            while (message := self._reader.poll(0.0)) is not None:
                self._hand_out(message)
        except QueueClosed:
            pass
        finally:
            self._taking.release()

    def wake(self) -> None:
        """Let who waits look again whether its operation is done: it was answered another way, or failed."""
        self._reader.wake()

    def close(self) -> None:
        """Wake everybody for good. May be called twice."""
        self._reader.close()

    def _hand_out(self, message: bytes | None) -> None:
        if message is None:
            return
        answer = wire.decode_answer(message)
        assert isinstance(answer, wire.StepDone)
        self._operations.answer(self._rank, answer.id, answer.result)
