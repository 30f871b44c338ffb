"""Results on their way from the output rank to the other engines of its replica, over a group that is two lists."""

from __future__ import annotations

import contextlib
from collections import deque
from collections.abc import Iterator
from typing import Any

import pytest

from lockstep.executor.relay import Relay, ResultTimeout
from lockstep.protocol import StepResult


class Message:
    """A handle of either end."""

    def __init__(self, wire: deque[bytes], waited: list[int]) -> None:
        self.wire, self.waited = wire, waited

    def is_completed(self) -> bool:
        return bool(self.wire)

    def wait(self) -> Any:
        self.waited.append(1)
        return self.wire.popleft() if self.wire else None


class Group:
    """Rank `rank` of two; what one sends lies in `wire`."""

    world_size = 2

    def __init__(self, rank: int, wire: deque[bytes]) -> None:
        self.rank_in_group, self.wire, self.waited = rank, wire, []

    def isend_object(self, data: bytes, dst: int) -> list[Message]:
        assert dst == 1 - self.rank_in_group
        self.wire.append(data)
        return [Message(deque(), self.waited)]

    def irecv_object(self, src: int) -> Message:
        assert src == 1 - self.rank_in_group
        return Message(self.wire, self.waited)


@contextlib.contextmanager
def ending(phase: str) -> Iterator[None]:
    yield


def pair(depth: int = 2, limit_s: float = 60.0) -> tuple[Relay, Relay]:
    """The output rank's end, and the other's."""
    wire: deque[bytes] = deque()
    return tuple(Relay(Group(rank, wire), 1, depth, limit_s, ending) for rank in (1, 0))  # type: ignore[arg-type,return-value]


def result(step: int) -> StepResult:
    return StepResult(step=step, tokens=[step, step + 1])


def test_the_output_rank_has_its_result_at_once() -> None:
    output, _ = pair()
    future = output.hand_over(0, result(0))
    assert future.done() and future.result(0.0) == result(0)


def test_results_come_in_order_whichever_is_asked_for_first() -> None:
    output, other = pair()
    futures = [other.hand_over(step, None) for step in range(3)]
    assert not futures[0].done()
    for step in range(3):
        output.hand_over(step, result(step))
    assert futures[2].result(10) == result(2)
    assert all(f.done() for f in futures)
    assert [f.result(0) for f in futures] == [result(step) for step in range(3)]


def test_done_takes_what_is_here_and_does_not_wait() -> None:
    output, other = pair()
    first, second = other.hand_over(0, None), other.hand_over(1, None)
    assert not second.done()
    output.hand_over(0, result(0))
    assert not second.done()
    assert first.done()


def test_a_short_patience_ends_and_the_result_still_comes() -> None:
    output, other = pair()
    future = other.hand_over(0, None)
    with pytest.raises(ResultTimeout, match="step 0: no result from rank 1"):
        future.result(0.01)
    output.hand_over(0, result(0))
    assert future.result(5) == result(0)


def test_sends_are_waited_for_when_the_steps_after_them_have_run() -> None:
    output, _ = pair(depth=2)
    waited = output._group.waited  # type: ignore[attr-defined]
    for step, expected in enumerate((0, 0, 1, 2)):
        output.hand_over(step, result(step))
        assert len(waited) == expected


def test_another_steps_result_is_refused() -> None:
    output, other = pair()
    future = other.hand_over(0, None)
    output.hand_over(7, result(7))
    with pytest.raises(RuntimeError, match="waits for the result of step 0, and rank 1 sent that of 7"):
        future.result(60)
