"""Tokens that go back through a pipeline: to whom they belong, whatever has become of the slot, and never waited for too early."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import numpy as np

from lockstep.protocol import NewRequest, SamplingParams, StepPlan
from lockstep.worker.batch import BatchState
from lockstep.worker.returns import Returns

STAGES = 2


class Pipe:
    """What was sent and not received yet; the groups of either end."""

    def __init__(self) -> None:
        self.sent: list[list[int]] = []

    def groups(self, stage: int) -> Any:
        pp = SimpleNamespace(
            world_size=STAGES,
            is_first_rank=stage == 0,
            is_last_rank=stage == STAGES - 1,
            isend_object=lambda obj, dst: self.sent.append(obj) or [],
            recv_object=lambda src: self.sent.pop(0),
        )
        return SimpleNamespace(pp=pp, tp=SimpleNamespace(rank_in_group=0, broadcast_object=lambda obj: obj))


class Ends:
    """Both stages, given the same plans."""

    def __init__(self) -> None:
        self.pipe = Pipe()
        self.states = [BatchState(4, 32, 4) for _ in range(STAGES)]
        self.first, self.last = (Returns(self.pipe.groups(stage), state) for stage, state in enumerate(self.states))

    def apply(self, step: int, new: tuple[int, ...] = (), freed: tuple[int, ...] = ()) -> None:
        one: dict[str, Any] = {"token_ids": [90, 91], "num_prompt_tokens": 2, "sampling": SamplingParams(), "seed": 0}
        started = [NewRequest(slot=slot, request_id=f"{step}.{slot}", block_ids=[slot], **one) for slot in new]
        for state in self.states:
            state.apply(StepPlan(step, [], [], [], [], started, [], list(freed)))

    def sample(self, slots: list[int], tokens: list[int]) -> None:
        at = np.array(slots)
        self.first.sampled(at, np.empty(0, np.int64))
        self.last.sampled(at, np.array(tokens))

    def known(self, slot: int) -> list[int]:
        state = self.states[0]
        return state.tokens[slot, : state.lengths[slot]].tolist()


def test_tokens_come_when_a_step_needs_them_and_not_before() -> None:
    ends = Ends()
    ends.apply(0, new=(0, 1))
    ends.sample([0], [7])
    ends.sample([1], [8])
    assert ends.known(0) == ends.known(1) == [90, 91, 0] and len(ends.pipe.sent) == 2
    ends.first.take(np.array([2]))
    assert len(ends.pipe.sent) == 2, "nobody who has a row is owed any"
    ends.first.take(np.array([0]))
    assert ends.known(0) == [90, 91, 7] and ends.known(1) == [90, 91, 0]
    ends.first.take(np.array([1, 0]))
    assert ends.known(1) == [90, 91, 8] and not ends.pipe.sent
    assert (ends.states[0].tokens == ends.states[1].tokens).all()


def test_a_token_of_who_has_left_changes_nothing_of_who_has_the_slot_now() -> None:
    ends = Ends()
    ends.apply(0, new=(0, 1))
    ends.sample([0, 1], [7, 8])
    ends.apply(1, new=(0,), freed=(0,))
    ends.first.take(np.array([0]))
    assert len(ends.pipe.sent) == 1, "the new one is owed nothing, and waits for nobody"
    ends.sample([0], [5])
    ends.first.take(np.array([0]))
    assert (ends.known(0), ends.known(1)) == ([90, 91, 5], [90, 91, 8])


def test_what_nobody_needs_is_not_kept_for_ever() -> None:
    ends = Ends()
    for step in range(20):
        ends.apply(step, new=(step % 4,), freed=(step % 4,) if step >= 4 else ())
        ends.first.take(np.array([step % 4]))
        ends.sample([step % 4], [step])
        assert len(ends.pipe.sent) <= STAGES + 2


def test_a_step_that_samples_nothing_sends_nothing() -> None:
    ends = Ends()
    ends.apply(0, new=(0,))
    ends.sample([], [])
    ends.first.take(np.array([0]))
    assert not ends.pipe.sent and ends.known(0) == [90, 91]
