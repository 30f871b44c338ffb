"""What the scheduler puts in each plan."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from lockstep.engine.admission import Limits
from lockstep.engine.errors import RequestError
from lockstep.engine.plan_builder import ScheduledStep
from lockstep.engine.scheduler import Scheduler
from lockstep.protocol import EngineOutput, EngineRequest, SamplingParams, StepResult, TokenLogprobs
from lockstep.testing.fakes import FakeClock

VOCAB = 100


def scheduler(*, seqs: int = 4, budget: int = 64, length: int = 64, blocks: int = 32, size: int = 4, **options) -> Scheduler:
    caching, stages = options.pop("caching", True), options.pop("stages", 1)
    limits = Limits(
        max_num_seqs=seqs,
        max_num_batched_tokens=budget,
        max_model_len=length,
        vocab_size=VOCAB,
        num_blocks=blocks,
        block_size=size,
        **options,
    )
    return Scheduler(limits, prefix_caching=caching, stages=stages, clock=FakeClock())


def request(
    name: str, size: int, *, first: int = 0, priority: int = 0, salt: str | None = None, eos: int = 99, **sampling
) -> EngineRequest:
    """A prompt of `size` tokens, all different from those of a request with another `first`."""
    prompt = [(first + i) % 90 for i in range(size)]
    params = SamplingParams(**{"max_tokens": 8, **sampling})
    return EngineRequest(
        request_id=name, prompt_token_ids=prompt, sampling=params, seed=0, priority=priority, cache_salt=salt, eos_token_ids=[eos]
    )


def finish(s: Scheduler, step: ScheduledStep, token: int = 1) -> list[EngineOutput]:
    """The step has run, and each of its samples is `token`."""
    s.update(step, StepResult(step=step.plan.step, tokens=[token] * sum(step.plan.samples)))
    s.check()
    return s.take_outputs()


def names(step: ScheduledStep) -> list[str]:
    return [r.request_id for r in step.rows]


def add(s: Scheduler, *requests: EngineRequest) -> None:
    for r in requests:
        s.add(r)


def test_a_prompt_is_computed_at_once_and_then_token_by_token():
    s = scheduler()
    s.add(request("a", 5))
    step = s.schedule()
    plan = step.plan
    assert (plan.step, plan.slots, plan.num_computed, plan.num_tokens, plan.samples) == (0, [0], [0], [5], [True])
    assert plan.new[0].token_ids == [0, 1, 2, 3, 4] and plan.new[0].num_prompt_tokens == 5
    assert len(plan.new[0].block_ids) == 2 and plan.freed == [] and plan.new_blocks == []
    (out,) = finish(s, step)
    assert (out.new_token_ids, out.finish_reason) == ([1], None)
    plan = s.schedule().plan
    assert (plan.num_computed, plan.num_tokens, plan.samples, plan.new) == ([5], [1], [True], [])


def test_nothing_to_do_is_no_plan():
    s = scheduler()
    assert s.schedule() is None
    s.add(request("a", 5, max_tokens=1))
    s.schedule()
    assert s.schedule() is None, "its only token is in flight"


def test_the_budget_cuts_a_prompt_and_only_its_last_part_samples():
    s = scheduler(budget=4)
    s.add(request("a", 10))
    seen = []
    for _ in range(4):
        step = s.schedule()
        seen.append((step.plan.num_computed[0], step.plan.num_tokens[0], step.plan.samples[0]))
        finish(s, step)
    assert seen == [(0, 4, False), (4, 4, False), (8, 2, True), (10, 1, True)]


def test_a_prompt_that_goes_first_leaves_a_token_for_each_that_decodes():
    s = scheduler(budget=6, by_priority=True)
    add(s, request("low", 1, first=30, priority=1), request("lower", 1, first=40, priority=2))
    finish(s, s.schedule())
    s.add(request("high", 20))
    seen = []
    for _ in range(4):
        step = s.schedule()
        seen.append(dict(zip(names(step), step.plan.num_tokens, strict=True)))
        finish(s, step)
    assert seen == [{"low": 1, "lower": 1, "high": 4}] * 4


def test_a_prompt_gets_on_by_a_token_even_where_more_run_than_the_budget_holds():
    s = scheduler(budget=2, by_priority=True)
    add(s, *[request(f"idle{i}", 1, first=30 + i, priority=1, max_tokens=1) for i in range(2)])
    s.schedule()  # both have all their tokens in flight from here on
    s.add(request("high", 9))
    assert s.schedule().plan.num_tokens == [2]
    assert s.schedule().plan.num_tokens == [1]


def test_without_chunking_a_prompt_waits_until_it_fits_the_step_whole():
    s = scheduler(budget=8, chunked_prefill=False)
    add(s, request("a", 6), request("b", 6, first=30))
    step = s.schedule()
    assert (names(step), step.plan.num_tokens) == (["a"], [6])
    finish(s, step)
    step = s.schedule()
    assert (names(step), step.plan.num_tokens) == (["a", "b"], [1, 6])


def test_without_chunking_a_preempted_request_that_outgrew_the_budget_still_comes_back():
    s = scheduler(budget=8, blocks=10, size=2, length=16, chunked_prefill=False, caching=False, seqs=2)
    add(s, request("a", 2, max_tokens=14), request("b", 2, first=30, max_tokens=14))
    outs, most = [], 0
    while s.has_unfinished():
        step = s.schedule()
        most = max([most, *(len(new.token_ids) for new in step.plan.new)])
        outs += finish(s, step)
    assert {out.request_id for out in outs if out.finish_reason == "length"} == {"a", "b"}
    assert most > 8


def test_slots_are_given_back_with_the_next_plan_and_used_again_in_it():
    s = scheduler(seqs=1)
    add(s, request("a", 3, max_tokens=1), request("b", 3, first=30))
    step = s.schedule()
    assert names(step) == ["a"]
    (out,) = finish(s, step)
    assert out.finish_reason == "length"
    plan = s.schedule().plan
    assert plan.freed == [0] and [n.slot for n in plan.new] == [0] and plan.new[0].request_id == "b"


def test_blocks_are_added_only_when_a_token_needs_one():
    s = scheduler(size=4)
    s.add(request("a", 4, max_tokens=20))
    grown = []
    for _ in range(10):
        step = s.schedule()
        grown.append(len(step.plan.new_blocks))
        finish(s, step)
    assert grown == [0, 1, 0, 0, 0, 1, 0, 0, 0, 1]


def test_fcfs_ignores_priority_and_serves_in_order_of_arrival():
    s = scheduler(seqs=1)
    add(s, request("a", 3, priority=5), request("b", 3, priority=-5))
    assert names(s.schedule()) == ["a"]


def test_priority_serves_the_lowest_value_first_and_ties_by_arrival():
    s = scheduler(seqs=1, by_priority=True)
    add(s, request("a", 3, priority=1, max_tokens=1), request("b", 3, max_tokens=1), request("c", 3, max_tokens=1))
    order = []
    while s.has_unfinished():
        step = s.schedule()
        order += names(step)
        finish(s, step)
    assert order == ["b", "c", "a"]


def test_an_earlier_arrival_time_goes_first_whatever_the_order_of_adding():
    s = scheduler(seqs=1)
    late, early = request("late", 3), request("early", 3)
    late.arrival_s, early.arrival_s = 5.0, 2.0
    add(s, late, early)
    assert names(s.schedule()) == ["early"]


@pytest.mark.parametrize("by_priority", [False, True])
def test_when_blocks_run_out_the_last_in_order_is_preempted_and_recomputed(by_priority):
    s = scheduler(blocks=4, size=2, length=8, seqs=2, caching=False, by_priority=by_priority)
    add(s, request("a", 3, priority=1, max_tokens=5), request("b", 3, first=30, max_tokens=5))
    victim = "a" if by_priority else "b"
    step = s.schedule()
    assert sorted(names(step)) == ["a", "b"]
    slot = next(n.slot for n in step.plan.new if n.request_id == victim)
    finish(s, step)
    finish(s, s.schedule())
    step = s.schedule()  # both need a third block and none is left
    assert victim not in names(step) and step.plan.freed == [slot]
    assert s.stats().preemptions == 1
    ended = False
    while not ended:
        ended = any(out.finish_reason for out in finish(s, step))
        step = s.schedule()
    (new,) = step.plan.new
    assert new.request_id == victim and new.num_prompt_tokens == 3 and new.token_ids[3:] == [1, 1]
    assert step.plan.num_computed == [0] and step.plan.num_tokens == [5]


def test_nobody_is_admitted_in_a_step_that_preempted():
    s = scheduler(blocks=6, size=2, length=12, seqs=3, caching=False, by_priority=True)
    add(s, request("a", 4), request("b", 7, first=30, priority=2))
    finish(s, s.schedule())  # all six blocks are taken
    s.add(request("c", 1, first=60, priority=1))
    step = s.schedule()
    assert names(step) == ["a"] and s.stats().preemptions == 1 and s.kv.pool.num_free == 3
    finish(s, step)
    assert names(s.schedule()) == ["a", "c"]


def test_a_request_waits_until_all_it_has_fits_not_only_its_first_part():
    s = scheduler(blocks=6, size=2, length=12, budget=4, seqs=2, caching=False)
    add(s, request("a", 6, max_tokens=2), request("b", 8, first=30))
    while "b" not in names(step := s.schedule()):
        assert s.stats().waiting == 1
        finish(s, step)
    assert s.stats().preemptions == 0


# --- schedule-ahead ---


def test_the_next_plan_is_made_before_the_token_is_known():
    s = scheduler()
    s.add(request("a", 5))
    first, second, third = s.schedule(), s.schedule(), s.schedule()
    assert [p.plan.num_computed for p in (first, second, third)] == [[0], [5], [6]]
    assert s.stats().steps_in_flight == 3
    assert [out.new_token_ids for step in (first, second, third) for out in finish(s, step, step.plan.step)] == [[0], [1], [2]]


def test_lengths_are_never_overrun_ahead_of_results():
    s = scheduler(length=8)
    add(s, request("a", 5, max_tokens=2), request("b", 6, first=30, max_tokens=50))
    steps = [s.schedule(), s.schedule()]
    assert s.schedule() is None
    ends = {out.request_id: out.finish_reason for step in steps for out in finish(s, step)}
    assert ends == {"a": "length", "b": "length"}
    assert s.kv.pool.num_used == 0


def test_a_stop_found_late_drops_the_token_in_flight_and_frees_at_once():
    s = scheduler()
    s.add(request("a", 4))
    first, second = s.schedule(), s.schedule()
    (out,) = finish(s, first, token=99)
    assert (out.new_token_ids, out.finish_reason, out.stop_reason) == ([99], "stop", None)
    assert s.kv.pool.num_used == 0
    s.add(request("b", 4, first=30))
    third = s.schedule()
    assert third.plan.freed == [0] and third.plan.new[0].slot == 0
    assert finish(s, second) == []
    assert [o.request_id for o in finish(s, third)] == ["b"]


def test_the_row_of_a_stopped_request_publishes_nothing():
    s = scheduler(size=4)
    s.add(request("a", 3))
    first, second = s.schedule(), s.schedule()  # the second computes the stop token, which completes the first block
    finish(s, first, token=99)
    finish(s, second)
    s.add(EngineRequest(request_id="b", prompt_token_ids=[0, 1, 2, 99, 5], sampling=SamplingParams(), seed=0))
    assert s.schedule().plan.num_computed == [0]


def test_a_request_preempted_with_a_token_in_flight_waits_for_it():
    s = scheduler(blocks=4, size=2, length=8, seqs=2, caching=False)
    add(s, request("a", 3, max_tokens=5), request("b", 3, first=30, max_tokens=5))
    steps = [s.schedule(), s.schedule()]
    steps.append(s.schedule())  # preempts b, whose first two tokens are in flight
    assert names(steps[2]) == ["a"]
    s.abort(["a"])
    assert s.schedule() is None, "blocks and slots are free, but b's tokens have not arrived"
    assert [o.new_token_ids for o in finish(s, steps[0]) if o.request_id == "b"] == [[1]]
    assert s.schedule() is None
    assert [o.new_token_ids for o in finish(s, steps[1], token=2)] == [[2]]
    step = s.schedule()
    assert step.plan.new[0].token_ids == [30, 31, 32, 1, 2]
    assert finish(s, steps[2]) == []


def test_a_preempted_request_may_end_by_the_token_that_was_in_flight():
    s = scheduler(blocks=4, size=2, length=8, seqs=2, caching=False)
    add(s, request("a", 3, max_tokens=5), request("b", 3, first=30, max_tokens=5))
    steps = [s.schedule(), s.schedule(), s.schedule()]
    assert s.stats().preemptions == 1
    ends = {o.request_id: o.finish_reason for o in finish(s, steps[0], token=99)}
    assert ends == {"a": "stop", "b": "stop"}
    assert finish(s, steps[1]) == finish(s, steps[2]) == []
    assert not s.has_unfinished()


def test_abort_frees_blocks_at_once_and_ends_the_request_once():
    s = scheduler()
    add(s, request("a", 9), request("b", 9, first=30), request("waits", 60, first=60, max_tokens=1))
    step = s.schedule()
    used = s.kv.pool.num_used
    s.abort(["a", "waits", "a", "nobody"])
    assert (used, s.kv.pool.num_used) == (3 + 3 + 12, 3)
    outs = finish(s, step)
    assert sorted((o.request_id, o.finish_reason, tuple(o.new_token_ids)) for o in outs) == [
        ("a", "abort", ()),
        ("b", None, (1,)),
        ("waits", "abort", ()),
    ]
    s.abort(["a"])
    assert s.take_outputs() == []


# --- prefix cache ---


def run_out(s: Scheduler, *requests: EngineRequest) -> None:
    add(s, *requests)
    while s.has_unfinished():
        finish(s, s.schedule())


def test_a_later_request_starts_after_the_blocks_it_shares():
    s = scheduler(size=4)
    run_out(s, request("a", 10, max_tokens=1))
    s.add(request("b", 12))
    step = s.schedule()
    assert (step.plan.num_computed, step.plan.num_tokens) == ([8], [4])
    assert finish(s, step)[0].num_cached_tokens == 8
    assert (s.stats().prefix_hit_tokens, s.stats().prefix_query_tokens) == (8, 22)


def test_the_last_token_of_a_prompt_is_always_computed():
    s = scheduler(size=4)
    run_out(s, request("a", 8, max_tokens=1))
    s.add(request("b", 8))
    assert s.schedule().plan.num_computed == [4]


def test_generated_tokens_are_found_as_part_of_a_prompt():
    s = scheduler(size=4)
    run_out(s, request("a", 3, max_tokens=6))
    s.add(EngineRequest(request_id="b", prompt_token_ids=[0, 1, 2, 1, 1, 1, 1, 1, 1, 50], sampling=SamplingParams(), seed=0))
    assert s.schedule().plan.num_computed == [8]


def test_a_block_is_shared_while_the_step_that_writes_it_is_in_flight():
    s = scheduler(size=4)
    s.add(request("a", 9))
    s.schedule()
    s.add(request("b", 9))
    second = s.schedule()
    assert second.plan.num_computed[names(second).index("b")] == 8


def test_requests_of_one_step_do_not_compute_one_prefix_twice():
    s = scheduler(size=4)
    add(s, *[request(f"n{i}", 9) for i in range(3)], request("other", 9, first=30))
    first = s.schedule()
    assert names(first) == ["n0", "other"]
    second = s.schedule()
    assert second.plan.num_computed[names(second).index("n1")] == second.plan.num_computed[names(second).index("n2")] == 8


@pytest.mark.parametrize("salts", [("x", "y"), ("x", None), (None, "")])
def test_salts_keep_caches_apart(salts):
    s = scheduler(size=4)
    run_out(s, request("a", 10, max_tokens=1, salt=salts[0]))
    s.add(request("b", 10, salt=salts[1]))
    assert s.schedule().plan.num_computed == [0]


def test_without_caching_nothing_is_shared():
    s = scheduler(size=4, caching=False)
    run_out(s, request("a", 10, max_tokens=1))
    s.add(request("b", 10))
    assert s.schedule().plan.num_computed == [0]
    assert s.stats().prefix_query_tokens == 0


def test_prompt_logprobs_do_not_read_the_cache_but_fill_it():
    s = scheduler(size=4)
    run_out(s, request("a", 10, max_tokens=1, prompt_logprobs=0))
    s.add(request("b", 10, max_tokens=1, prompt_logprobs=0))
    step = s.schedule()
    assert step.plan.num_computed == [0]
    finish(s, step)
    s.add(request("c", 10))
    assert s.schedule().plan.num_computed == [8]


def test_prompt_logprobs_of_all_parts_come_with_the_first_token_only():
    s = scheduler(budget=4)
    s.add(request("a", 6, prompt_logprobs=0))
    entry = [TokenLogprobs([i], [0.0], 1) for i in range(6)]
    outs = []
    for part in ([(0, entry[1:5])], [(0, entry[5:6])], []):
        step = s.schedule()
        s.update(step, StepResult(step=step.plan.step, tokens=[1] * sum(step.plan.samples), prompt_logprobs=part))
        outs += s.take_outputs()
    assert [o.prompt_logprobs for o in outs] == [entry[1:], None]


@pytest.mark.parametrize("prompt_logprobs", [None, 0])
def test_a_preempted_request_finds_its_own_blocks_again(prompt_logprobs):
    """Also one that asked for prompt log-probabilities: it has had them."""
    s = scheduler(blocks=8, size=2, length=16, seqs=2)
    add(s, request("a", 5, max_tokens=11), request("b", 5, first=30, max_tokens=11, prompt_logprobs=prompt_logprobs))
    while not s.stats().preemptions:
        finish(s, s.schedule())
    s.abort(["a"])
    step = s.schedule()
    assert step.plan.new[0].request_id == "b" and step.plan.num_computed[0] > 0
    assert all(out.num_cached_tokens == 0 for out in finish(s, step)), "it counts what its prompt was spared, not a recompute"


def test_a_row_without_a_usable_token_ends_its_request_only_and_hides_its_blocks():
    s = scheduler(size=4)
    add(s, request("sick", 9), request("well", 9, first=30))
    step = s.schedule()
    s.update(step, StepResult(step=0, tokens=[-1, 7]))
    s.check()
    sick, well = s.take_outputs()
    assert (sick.finish_reason, sick.new_token_ids) == ("error", []) and "token -1" in sick.error and "'sick'" in sick.error
    assert (well.finish_reason, well.new_token_ids) == (None, [7])
    s.add(request("same", 9))
    step = s.schedule()
    assert step.plan.num_computed[names(step).index("same")] == 0


def test_a_result_of_another_step_is_our_fault():
    s = scheduler()
    s.add(request("a", 3))
    step = s.schedule()
    with pytest.raises(AssertionError, match="result of step 5"):
        s.update(step, StepResult(step=5, tokens=[1]))
    with pytest.raises(AssertionError, match="2 tokens for 1"):
        s.update(step, StepResult(step=0, tokens=[1, 2]))


# --- ends ---


@pytest.mark.parametrize(
    ("sampling", "token", "end"),
    [
        ({}, 99, ("stop", None)),
        ({"ignore_eos": True}, 99, (None, None)),
        ({"stop_token_ids": [7]}, 7, ("stop", 7)),
        ({"stop_token_ids": [7], "ignore_eos": True}, 7, ("stop", 7)),
        ({"stop_token_ids": [99]}, 99, ("stop", None)),
        ({"stop_token_ids": [99], "ignore_eos": True}, 99, ("stop", 99)),
        ({"min_tokens": 2}, 99, (None, None)),
        ({"min_tokens": 1}, 99, ("stop", None)),
        ({"max_tokens": 1}, 5, ("length", None)),
        ({"max_tokens": 1}, 99, ("stop", None)),
    ],
)
def test_how_a_token_ends_a_request(sampling, token, end):
    s = scheduler()
    s.add(request("a", 3, **sampling))
    (out,) = finish(s, s.schedule(), token)
    assert (out.finish_reason, out.stop_reason) == end
    assert out.new_token_ids == [token]


def test_what_the_workers_are_told_not_to_sample_early():
    s = scheduler()
    add(s, request("a", 3, min_tokens=2), request("b", 3, first=30, min_tokens=2, ignore_eos=True))
    assert [n.eos_token_ids for n in s.schedule().plan.new] == [[99], []]


# --- admission ---


@pytest.mark.parametrize(
    ("bad", "words"),
    [
        (request("r", 0), ["empty prompt"]),
        (request("r", 64), ["64 tokens", "max_model_len=64", "by 1 tokens"]),
        (request("r", 48), ["48 tokens", "13 KV blocks", "has 12"]),
        (EngineRequest(request_id="r", prompt_token_ids=[3, 100], sampling=SamplingParams(), seed=0), ["token id 100", "0 to 99"]),
        (EngineRequest(request_id="r", prompt_token_ids=[-1], sampling=SamplingParams(), seed=0), ["token id -1"]),
        (EngineRequest(request_id="r", prompt_token_ids=[1.5], sampling=SamplingParams(), seed=0), ["1.5", "not an integer"]),
        (EngineRequest(request_id="r", prompt_token_ids=[True], sampling=SamplingParams(), seed=0), ["True", "not an integer"]),
        (request("r", 3, stop_token_ids=[100]), ["stop_token_ids", "100"]),
        (request("r", 3, logit_bias={100: 1.0}), ["logit_bias", "100"]),
        (request("r", 3, allowed_token_ids=[5, 100]), ["allowed_token_ids", "100"]),
        (request("r", 3, bad_words_token_ids=[[1], [2, 100]]), ["bad_words", "100"]),
        (request("r", 3, eos=100), ["eos_token_ids", "100"]),
    ],
)
def test_what_can_never_run_is_refused_with_the_number(bad, words):
    s = scheduler(length=64, blocks=12, size=4)
    with pytest.raises(RequestError) as caught:
        s.add(bad)
    for word in ["'r'", *words]:
        assert word in str(caught.value)
    assert not s.has_unfinished()
    s.add(request("r", 47))
    assert names(s.schedule()) == ["r"]


def test_without_chunking_a_prompt_over_the_budget_is_refused():
    s = scheduler(budget=8, chunked_prefill=False)
    with pytest.raises(RequestError, match=r"9 tokens, more than max_num_batched_tokens=8"):
        s.add(request("a", 9))
    s.add(request("a", 8))


def test_an_id_is_free_again_only_after_its_end_was_taken():
    s = scheduler()
    s.add(request("a", 3))
    with pytest.raises(RequestError, match="'a' is in use"):
        s.add(request("a", 3))
    s.abort(["a"])
    with pytest.raises(RequestError, match="'a' is in use"):
        s.add(request("a", 3))
    s.take_outputs()
    s.add(request("a", 3))


def test_max_tokens_is_cut_to_what_the_length_leaves():
    s = scheduler(length=8)
    for max_tokens in (None, 3, 100):
        s.add(request("a", 5, max_tokens=max_tokens))
        outs = []
        while s.has_unfinished():
            outs += finish(s, s.schedule())
        assert len(outs) == 3 and outs[-1].finish_reason == "length"


def test_max_tokens_none_is_no_limit_but_the_length():
    s = scheduler(length=64)
    s.add(request("a", 5, max_tokens=None))
    outs = []
    while s.has_unfinished():
        outs += finish(s, s.schedule())
    assert len(outs) == 59


def test_a_cache_below_the_model_length_ends_requests_where_it_ends():
    s = scheduler(length=64, blocks=3, size=4)
    s.add(request("a", 9, max_tokens=None))
    outs = []
    while s.has_unfinished():
        outs += finish(s, s.schedule())
    assert 9 + len(outs) == 12 and outs[-1].finish_reason == "length"


def in_flight(s: Scheduler, stages: int, steps: int) -> Iterator[ScheduledStep]:
    """Plans, as an engine issues them that keeps `stages` in flight."""
    flight: list[ScheduledStep] = []
    for _ in range(steps):
        while len(flight) < stages and (step := s.schedule()) is not None:
            flight.append(step)
            yield step
        if flight:
            finish(s, flight.pop(0))


@pytest.mark.parametrize("stages", [2, 4])
def test_micro_batches_are_even_while_a_queue_waits_for_memory(stages: int):
    """A full cache and a long queue: those that run are still shared out over the stages."""
    s = scheduler(stages=stages, seqs=64, budget=512, length=64, blocks=200, size=4, caching=False)
    add(s, *(request(f"r{i}", 8, first=i, max_tokens=40) for i in range(80)))
    shares = [sum(step.plan.samples) / len(s.running) for step in in_flight(s, stages, 100) if len(s.running) >= 8]
    assert len(s.waiting) > 20, "memory was meant to be short"
    assert len(shares) > 50 and max(shares[20:]) <= 1.5 / stages


def test_chunks_of_prompts_take_no_decoders_place():
    """Long prompts that come first in every plan leave a running request its token as often as the stages allow."""
    s = scheduler(stages=2, seqs=8, budget=8, length=128, blocks=128, by_priority=True)
    add(s, request("short", 2, priority=1, max_tokens=60))
    finish(s, s.schedule())
    add(s, *(request(f"long{i}", 60, first=10 * i, priority=0) for i in range(3)))
    plans = list(in_flight(s, 2, 16))
    assert sum("short" in names(step) for step in plans) >= len(plans) // 2 - 1
