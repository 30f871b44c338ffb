"""Step results where every rank has an engine: the output rank sends each to the others of its replica, point to point.

    output rank     step 0, send   step 1, send   ...
    other ranks     step 0   step 1 ...   take 0   ...

Nobody waits for a later stage before its engine needs the result, so the stages of a pipeline overlap. Messages between two
ranks keep their order, and the replica's group has no other point-to-point traffic: a result needs no number to be found.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import TYPE_CHECKING

import msgspec

from lockstep.executor.contract import StepFuture
from lockstep.protocol import StepResult

if TYPE_CHECKING:
    from lockstep.distributed.group import GroupCoordinator
    from lockstep.distributed.handles import Handle
    from lockstep.distributed.objects import Incoming

_encode = msgspec.msgpack.Encoder().encode
_decode = msgspec.msgpack.Decoder(StepResult).decode
_POLL_S = 5e-5
Ending = Callable[[str], AbstractContextManager[None]]


class ResultTimeout(TimeoutError):
    """A result did not come in the time that its caller gave it. It may still come."""


class Relay:
    """One rank's end. `ending(phase)` turns an exception in its body into the executor's failure."""

    def __init__(self, group: GroupCoordinator, output_rank: int, depth: int, limit_s: float, ending: Ending) -> None:
        """depth: steps that may be in flight. limit_s: after which the group itself gives up waiting."""
        self._group, self._output_rank, self._depth, self._limit_s, self.ending = group, output_rank, depth, limit_s, ending
        self._peers = [rank for rank in range(group.world_size) if rank != group.rank_in_group]
        self._sending: deque[list[Handle]] = deque()  # of each step, oldest first
        self._expected: deque[_Future] = deque()
        self._incoming: Incoming | None = None  # for the first one expected

    def hand_over(self, step: int, result: StepResult | None) -> StepFuture:
        """The future of a step that this rank has run; on the output rank `result` goes to the others."""
        future = _Future(self, step, result)
        if self._group.rank_in_group != self._output_rank:
            self._expected.append(future)
            return future
        assert result is not None, "the output rank's execute_model returned nothing"
        if self._peers:
            data = _encode(result)
            self._sending.append([handle for peer in self._peers for handle in self._group.isend_object(data, peer)])
        # Whoever took part in this step has taken the result of the one `depth` steps ago: this does not wait.
        while len(self._sending) > self._depth:
            for handle in self._sending.popleft():
                handle.wait()
        return future

    def arrived(self, future: _Future) -> bool:
        """Whether a result, and all before it, is here."""
        while future.value is None and self._listen().is_completed():
            self._take()
        return future.value is not None

    def wait(self, future: _Future, timeout: float | None) -> None:
        """Return when the result, and all before it, is here. Raises ResultTimeout after `timeout` s."""
        deadline = None if timeout is None else time.monotonic() + timeout
        while future.value is None:
            if deadline is not None and timeout is not None and timeout < self._limit_s:
                while not self._listen().is_completed():
                    if time.monotonic() > deadline:
                        raise ResultTimeout(f"step {self._expected[0].step}: no result from rank {self._output_rank} after {timeout} s")
                    time.sleep(_POLL_S)
            self._take()

    def flush(self, limit_s: float) -> None:
        """Wait, for `limit_s` at most, until the other ranks have what was sent."""
        deadline = time.monotonic() + limit_s
        for handle in [handle for handles in self._sending for handle in handles]:
            while not handle.is_completed() and time.monotonic() < deadline:
                time.sleep(_POLL_S)
        self._sending.clear()

    def _listen(self) -> Incoming:
        if self._incoming is None:
            self._incoming = self._group.irecv_object(self._output_rank)
        return self._incoming

    def _take(self) -> None:
        data = self._listen().wait()
        self._incoming = None
        future, result = self._expected.popleft(), _decode(data)
        if result.step != future.step:
            raise RuntimeError(
                f"this rank waits for the result of step {future.step}, and rank {self._output_rank} sent that of {result.step}"
            )
        future.value = result


class _Future:
    """See `StepFuture`."""

    def __init__(self, relay: Relay, step: int, value: StepResult | None) -> None:
        self._relay, self.step, self.value = relay, step, value

    def done(self) -> bool:
        if self.value is None:
            with self._relay.ending(f"step {self.step}"):
                return self._relay.arrived(self)
        return True

    def result(self, timeout: float | None = None) -> StepResult:
        if self.value is None:
            with self._relay.ending(f"step {self.step}"):
                self._relay.wait(self, timeout)
        assert self.value is not None
        return self.value
