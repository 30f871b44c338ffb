"""The fakes are only worth something if they notice: each kind of wrong plan is caught."""

from __future__ import annotations

import pytest

from lockstep.executor.contract import ExecutorError
from lockstep.protocol import EngineRequest, NewRequest, SamplingParams, StepPlan
from lockstep.testing.fakes import ByteTokenizer, FakeClock, FakeExecutor, chain, generate, next_token


def worker(**options) -> FakeExecutor:
    executor = FakeExecutor(block_size=2, **{"max_concurrent_batches": 9, **options})
    executor.initialize_kv_cache(8)
    return executor


def new(slot: int, tokens: list[int], blocks: list[int]) -> NewRequest:
    return NewRequest(slot, f"r{slot}", tokens, len(tokens), blocks, SamplingParams(), 0)


def start(executor: FakeExecutor, slot: int = 0, tokens: tuple[int, ...] = (1, 2, 3), blocks: tuple[int, ...] = (0, 1)) -> None:
    plan = StepPlan(executor.issued, [slot], [0], [len(tokens)], [True], [new(slot, list(tokens), list(blocks))])
    executor.execute_model(plan).result()


@pytest.mark.parametrize(
    ("plan", "complaint"),
    [
        (StepPlan(1, [], [], [], []), "without rows"),
        (StepPlan(2, [0], [3], [1], [True]), "issued after 1 steps"),
        (StepPlan(1, [0, 0], [3, 3], [1, 1], [True, True]), "two rows of one slot"),
        (StepPlan(1, [0], [2], [1], [True]), "position 2 computed after 3"),
        (StepPlan(1, [0], [3], [0], [True]), "computes nothing"),
        (StepPlan(1, [0], [3], [2], [True]), "computes 5 of 4"),
        (StepPlan(1, [0], [3], [1], [False]), "samples=False"),
        (StepPlan(1, [1], [0], [1], [True], [new(0, [1], [2])]), "while in use"),
        (StepPlan(1, [0], [3], [1], [True], [new(1, [1], [2])]), "without a row"),
        (StepPlan(1, [1], [0], [3], [True], [new(1, [1, 2, 3], [2])]), "1 blocks for 3 tokens"),
        (StepPlan(1, [1], [0], [3], [True], [new(1, [1, 2, 3], [2, 2])]), "a block twice"),
        (StepPlan(1, [0, 1], [3, 0], [1, 1], [True, True], [new(1, [1], [1])]), "block 1 is written by slots 0 and 1"),
        (StepPlan(1, [0, 1], [3, 3], [1, 1], [True, True], [new(1, [1, 2, 3, 4], [0, 1])]), "written by slots 0 and 1"),
        (StepPlan(1, [1], [2], [1], [True], [new(1, [1, 2, 3], [1, 2])]), "holds something else"),
        (StepPlan(1, [1], [2], [1], [True], [new(1, [1, 9, 3], [0, 2])]), "reads position 1 in block 0"),
        (StepPlan(1, [1], [2], [1], [True], [new(1, [1, 2, 3], [5, 2])]), "reads position 0 in block 5"),
    ],
)
def test_a_wrong_plan_is_caught(plan, complaint):
    executor = worker()
    start(executor)
    with pytest.raises(AssertionError, match=complaint):
        executor.execute_model(plan)


def test_a_block_written_by_one_row_and_read_by_another_in_one_step_is_caught():
    executor = worker()
    start(executor, tokens=(1, 2, 3), blocks=(0, 1))
    rows = StepPlan(1, [0, 1], [3, 3], [1, 1], [True, True], [new(1, [1, 2, 3, 9], [0, 1, 4])])
    with pytest.raises(AssertionError, match="block 1 is written by"):
        executor.execute_model(rows)


def test_a_right_plan_passes_and_shares_a_written_prefix():
    executor = worker()
    start(executor)
    executor.execute_model(StepPlan(1, [0, 1], [3, 2], [1, 1], [True, True], [new(1, [1, 2, 7], [0, 2])])).result()


def test_tokens_are_those_of_the_plain_generator():
    request = EngineRequest(request_id="r", prompt_token_ids=[1, 2, 3], sampling=SamplingParams(max_tokens=2), seed=0)
    executor = worker()
    start(executor)
    first = next_token(chain([1, 2, 3])[-1], 0, 0, 258)
    second = executor.execute_model(StepPlan(1, [0], [3], [1], [True])).result().tokens
    assert generate(request, 258, 64) == ([first, *second], "length", None)
    assert next_token(5, 0, 0, 258) != next_token(5, 1, 0, 258) != next_token(5, 1, 1, 258)


def test_results_lag_and_come_in_order():
    executor = worker(lag=1)
    plans = [StepPlan(0, [0], [0], [1], [True], [new(0, [1], [0])]), StepPlan(1, [0], [1], [1], [True])]
    a = executor.execute_model(plans[0])
    assert not a.done()
    b = executor.execute_model(plans[1])
    assert a.done() and not b.done()
    with pytest.raises(AssertionError, match="before an earlier one"):
        b.result()


def test_too_many_steps_in_flight_are_caught():
    executor = worker(max_concurrent_batches=1)
    executor.execute_model(StepPlan(0, [0], [0], [1], [True], [new(0, [1], [0])]))
    with pytest.raises(AssertionError, match="2 steps in flight"):
        executor.execute_model(StepPlan(1, [0], [1], [1], [True]))


def test_failure_is_told_to_callbacks_and_to_every_later_call():
    executor, told = worker(fail_at_step=0), []
    executor.register_failure_callback(told.append)
    with pytest.raises(ExecutorError):
        start(executor)
    executor.register_failure_callback(told.append)
    assert len(told) == 2 and told[0] is told[1]
    for call in (executor.check_health, lambda: executor.collective_rpc("memory")):
        with pytest.raises(ExecutorError):
            call()


def test_the_clock_stands_still_until_advanced():
    clock = FakeClock(2.0)
    assert clock() == clock() == 2.0
    clock.advance(0.5)
    assert clock() == 2.5
    with pytest.raises(AssertionError):
        clock.advance(-1)


def test_the_tokenizer_round_trips_any_text():
    tokenizer = ByteTokenizer()
    text = "Grüße, 世界\n"
    assert tokenizer.decode(tokenizer.encode(text)) == text
    ids = [*tokenizer.encode("a", add_special_tokens=True), tokenizer.eos_token_id]
    assert ids == [256, 97, 257]
    assert tokenizer.decode(ids) == "a" and tokenizer.decode(ids, skip_special_tokens=False) == "<bos>a<eos>"
