"""The whole engine against a generator that knows no batching: random loads, tiny caches, every switch."""

from __future__ import annotations

import random
from collections import Counter

from hypothesis import HealthCheck, given, note, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lockstep.config.model_spec import ModelSpec
from lockstep.config.tree import CacheConfig, EngineConfig, ModelConfig, ParallelConfig, SchedulerConfig
from lockstep.engine.core import EngineCore
from lockstep.protocol import EngineOutput, EngineRequest, SamplingParams, StructuredOutputs
from lockstep.testing.fakes import FakeClock, FakeExecutor, embedding, generate

VOCAB = 7  # small, so that stop tokens and equal prefixes come often
MAX_LEN = 28
LONGEST_PROMPT = 22  # a preempted request can outgrow it
SETTINGS = settings(deadline=None, suppress_health_check=list(HealthCheck), stateful_step_count=60)

engines = st.fixed_dictionaries(
    {
        "block_size": st.sampled_from([1, 2, 3, 4, 8]),
        "spare_blocks": st.integers(0, 12),  # over what one request of full length needs
        "max_num_seqs": st.integers(1, 5),
        "budget": st.integers(1, 40),
        "chunked": st.booleans(),
        "caching": st.booleans(),
        "priority": st.booleans(),
        "depth": st.integers(1, 4),
        "just_in_time": st.booleans(),
        "stages": st.integers(1, 3),
    }
)

# Prompts are a shared beginning and an own end: the prefix cache has something to find.
prompts = st.builds(
    lambda kind, shared, own: [(kind + i) % 3 for i in range(shared)] + own,
    st.integers(0, 1),
    st.integers(0, 16),
    st.lists(st.integers(0, VOCAB - 1), min_size=1, max_size=6),
)

requests = st.fixed_dictionaries(
    {
        "prompt": prompts,
        "max_tokens": st.one_of(st.none(), st.integers(1, 20)),
        "min_tokens": st.integers(0, 4),
        "eos": st.sampled_from([[], [6], [5, 6]]),
        "stop_token_ids": st.sampled_from([None, [5], [4]]),
        "ignore_eos": st.booleans(),
        "seed": st.integers(0, 3),
        "choice": st.integers(0, 1),
        "priority": st.integers(-1, 1),
        "salt": st.sampled_from([None, None, "a"]),
        "prompt_logprobs": st.sampled_from([None, None, None, 0]),
        "logprobs": st.sampled_from([None, None, 1]),
        "grammar": st.sampled_from([None, None, None, "1", "5", "!3"]),  # ends after so many tokens, or fails there
        "pooling": st.sampled_from([None, None, None, "last", "mean"]),
    }
)


def make_engine(options: dict) -> tuple[EngineCore, FakeExecutor]:
    """An engine on the fake executor; the whole cache holds little more than one request of full length."""
    size = options["block_size"]
    budget = options["budget"] if options["chunked"] else max(options["budget"], LONGEST_PROMPT)
    config = EngineConfig(
        model=ModelConfig(max_model_len=MAX_LEN),
        parallel=ParallelConfig(pipeline_parallel_size=options["stages"]),
        cache=CacheConfig(
            block_size=size, num_gpu_blocks_override=-(-MAX_LEN // size) + options["spare_blocks"], enable_prefix_caching=options["caching"]
        ),
        scheduler=SchedulerConfig(
            max_num_seqs=options["max_num_seqs"],
            max_num_batched_tokens=budget,
            scheduling_policy="priority" if options["priority"] else "fcfs",
            enable_chunked_prefill=options["chunked"],
        ),
    )
    spec = ModelSpec("LlamaForCausalLM", 8, 3, 1, 1, 8, 8, VOCAB, MAX_LEN)
    depth = max(options["depth"], options["stages"])
    executor = FakeExecutor(vocab_size=VOCAB, block_size=size, max_concurrent_batches=depth, lag=depth, stages=options["stages"])
    return EngineCore(config, spec, executor, just_in_time=options["just_in_time"], clock=FakeClock()), executor


def make_request(name: str, r: dict) -> EngineRequest:
    max_tokens = r["max_tokens"]
    sampling = SamplingParams(
        max_tokens=max_tokens,
        min_tokens=min(r["min_tokens"], max_tokens or r["min_tokens"]),
        stop_token_ids=r["stop_token_ids"],
        ignore_eos=r["ignore_eos"],
        prompt_logprobs=r["prompt_logprobs"],
        logprobs=r["logprobs"],
        structured_outputs=StructuredOutputs(regex=r["grammar"]) if r["grammar"] else None,
    )
    return EngineRequest(
        request_id=name,
        prompt_token_ids=r["prompt"][: MAX_LEN - 1],
        sampling=sampling,
        seed=r["seed"],
        choice=r["choice"],
        eos_token_ids=r["eos"],
        priority=r["priority"],
        cache_salt=r["salt"],
        pooling=r["pooling"],
    )


class Ledger:
    """What each request was promised and what it got. Every output passes through here."""

    def __init__(self) -> None:
        self.requests: dict[str, EngineRequest] = {}
        self.got: dict[str, list[int]] = {}
        self.ends: dict[str, EngineOutput] = {}
        self.aborted: set[str] = set()

    def accept(self, request: EngineRequest) -> None:
        self.requests[request.request_id] = request
        self.got[request.request_id] = []

    def take(self, outputs: list[EngineOutput]) -> None:
        for out in outputs:
            name = out.request_id
            assert name not in self.ends, f"{name} got an output after its end"
            request, before = self.requests[name], len(self.got[name])
            self.got[name] += out.new_token_ids
            self._check_logprobs(request, out, before)
            if out.finish_reason is not None:
                self.ends[name] = out
                self.check(name)
            else:
                assert out.new_token_ids, "an output without tokens or an end"
            assert (out.error is not None) == (out.finish_reason == "error")
            assert (out.embedding is not None) == (request.pooling is not None and out.finish_reason == "stop")

    def _check_logprobs(self, request: EngineRequest, out: EngineOutput, before: int) -> None:
        size = len(request.prompt_token_ids)
        if out.new_token_ids and request.sampling.logprobs is not None:
            assert [entry.token_ids for entry in out.logprobs] == [[t] for t in out.new_token_ids]
            assert out.logprobs[0].logprobs == [-float(size + before + 1)], "log-probabilities of another position"
        else:
            assert out.logprobs is None
        if request.sampling.prompt_logprobs is not None and before == 0 and out.new_token_ids:
            assert [entry.token_ids[0] for entry in out.prompt_logprobs] == request.prompt_token_ids[1:]
            assert [entry.rank for entry in out.prompt_logprobs] == list(range(1, size))
            assert out.num_cached_tokens == 0
        else:
            assert out.prompt_logprobs is None
        assert 0 <= out.num_cached_tokens <= max(size - 1, 0) + before

    def check(self, name: str) -> None:
        request, end = self.requests[name], self.ends[name]
        if request.pooling is not None:
            assert self.got[name] == []
            if name not in self.aborted:
                assert end.finish_reason == "stop" and end.embedding == embedding(request.prompt_token_ids, request.pooling)
            return
        tokens, reason, stop = generate(request, VOCAB, MAX_LEN)
        if end.finish_reason == "abort":
            assert name in self.aborted
            assert self.got[name] == tokens[: len(self.got[name])]
            assert len(self.got[name]) < len(tokens) + (reason == "error"), f"{name} was aborted after its last token"
        else:
            assert (self.got[name], end.finish_reason, end.stop_reason) == (tokens, reason, stop)

    @property
    def alive(self) -> list[str]:
        return [name for name in self.requests if name not in self.ends]


def drain(core: EngineCore, ledger: Ledger, limit: int = 3000) -> None:
    """Step to the end, checking the invariants after each step, and that the end leaves nothing behind."""
    for _ in range(limit):
        if not core.has_unfinished():
            break
        ledger.take(core.step())
        core.scheduler.check()
    assert not core.has_unfinished(), f"not finished after {limit} steps: {core.stats()}"
    assert not ledger.alive
    stats = core.stats()
    assert stats.kv_blocks_used == stats.running == stats.waiting == stats.steps_in_flight == 0
    assert stats.finished == len(ledger.requests)


class EngineMachine(RuleBasedStateMachine):
    """Requests come, go and are aborted in any order, between any two steps."""

    def __init__(self) -> None:
        super().__init__()
        self.core: EngineCore | None = None
        self.count = 0

    @initialize(options=engines)
    def start(self, options: dict) -> None:
        self.core, self.executor = make_engine(options)
        self.ledger = Ledger()

    @rule(r=requests)
    def add(self, r: dict) -> None:
        request = make_request(f"r{self.count}", r)
        self.count += 1
        self.core.add_request(request)
        self.ledger.accept(request)

    @rule(times=st.integers(1, 6))
    def step(self, times: int) -> None:
        for _ in range(times):
            self.ledger.take(self.core.step())
            self.core.scheduler.check()

    @precondition(lambda self: self.core is not None and self.ledger.alive)
    @rule(data=st.data())
    def abort(self, data: st.DataObject) -> None:
        names = data.draw(st.lists(st.sampled_from(self.ledger.alive), unique=True, max_size=3))
        self.ledger.aborted |= set(names)
        used = self.core.stats().kv_blocks_used
        self.core.abort(names)
        assert self.core.stats().kv_blocks_used <= used
        running = {r.request_id for r in self.core.scheduler.running.items}
        assert not running & set(names), "an aborted request keeps its blocks"

    @invariant()
    def consistent(self) -> None:
        if self.core is not None:
            self.core.scheduler.check()

    def teardown(self) -> None:
        if self.core is not None:
            note(str(self.core.stats()))
            drain(self.core, self.ledger)


EngineMachine.TestCase.settings = settings(SETTINGS, max_examples=120)
TestEngineMachine = EngineMachine.TestCase


@settings(SETTINGS, max_examples=150)
@given(options=engines, loads=st.lists(requests, min_size=1, max_size=14))
def test_outputs_do_not_depend_on_how_requests_were_batched(options, loads):
    core, _ = make_engine(options)
    ledger = Ledger()
    for i, r in enumerate(loads):
        request = make_request(f"r{i}", r)
        core.add_request(request)
        ledger.accept(request)
    drain(core, ledger)


@settings(SETTINGS, max_examples=60)
@given(
    options=engines,
    before=st.lists(requests, max_size=4),
    patient=requests,
    stream=st.lists(requests, min_size=8, max_size=8),
    policy=st.booleans(),
)
def test_no_request_starves_under_a_steady_stream(options, before, patient, stream, policy):
    """Others ahead of it, and newer ones for ever: it ends within a bound that does not depend on how many come after it."""
    core, _ = make_engine({**options, "priority": policy})
    ledger = Ledger()
    for i, r in enumerate([*before, patient]):
        request = make_request(f"r{i}", {**r, "priority": 0})
        core.add_request(request)
        ledger.accept(request)
    # Whoever is the oldest is never preempted: alone it needs a step per token, plus those in flight.
    bound = (len(before) + 1) * (2 * MAX_LEN + 3) * options["stages"]  # a step is one micro-batch of those in flight
    for i in range(bound):
        if f"r{len(before)}" in ledger.ends:
            break
        late = make_request(f"late{i}", {**stream[i % len(stream)], "priority": i % 2})
        core.add_request(late)
        ledger.accept(late)
        ledger.take(core.step())
    assert f"r{len(before)}" in ledger.ends, f"not ended after {bound} steps: {core.stats()}"
    ledger.aborted |= set(ledger.alive)
    core.abort(ledger.alive)
    drain(core, ledger)


@settings(SETTINGS, max_examples=60)
@given(options=engines, loads=st.lists(requests, min_size=1, max_size=8), at=st.integers(0, 12), on=st.sampled_from(["issue", "result"]))
def test_a_failure_ends_every_request_exactly_once(options, loads, at, on):
    core, executor = make_engine(options)
    executor.fail_at_step, executor.fail_on = at, on
    ledger = Ledger()
    for i, r in enumerate(loads):
        request = make_request(f"r{i}", r)
        core.add_request(request)
        ledger.accept(request)
    while core.has_unfinished():
        outputs = core.step()
        for out in outputs:
            assert out.request_id not in ledger.ends
            ledger.got[out.request_id] += out.new_token_ids
            if out.finish_reason is not None:
                ledger.ends[out.request_id] = out
    assert not ledger.alive
    for name, end in ledger.ends.items():
        if ledger.requests[name].pooling is not None:
            assert not ledger.got[name] and end.finish_reason in ("stop", "error")
            continue
        tokens, reason, _ = generate(ledger.requests[name], VOCAB, MAX_LEN)
        assert ledger.got[name] == tokens[: len(ledger.got[name])]
        if end.finish_reason == "error" and not (reason == "error" and "fails at" in end.error):
            assert core.failure is not None and end.error == str(core.failure)


def test_the_loads_reach_the_corners():
    """The random loads above would prove little if they never met these: a fixed sample of the same kind does, often."""
    rng = random.Random(5)
    seen: Counter[str] = Counter()
    for _ in range(360):
        options = {
            "block_size": rng.choice([1, 2, 3, 4]),
            "spare_blocks": rng.randrange(8),
            "max_num_seqs": rng.randint(2, 5),
            "budget": rng.randint(2, 40),
            "chunked": rng.random() < 0.7,
            "caching": rng.random() < 0.8,
            "priority": rng.random() < 0.5,
            "depth": rng.randint(1, 4),
            "just_in_time": rng.random() < 0.5,
            "stages": rng.randint(1, 3),
        }
        core, executor = make_engine(options)
        ledger = Ledger()
        for i in range(10):
            kind, shared = rng.randrange(2), rng.randrange(17)
            r = {
                "prompt": [(kind + j) % 3 for j in range(shared)] + [rng.randrange(VOCAB) for _ in range(rng.randint(1, 6))],
                "max_tokens": rng.choice([None, None, 1, 12]),
                "min_tokens": rng.randrange(4),
                "eos": rng.choice([[], [6]]),
                "stop_token_ids": rng.choice([None, [5]]),
                "ignore_eos": False,
                "seed": rng.randrange(3),
                "choice": 0,
                "priority": rng.randrange(3),
                "salt": None,
                "prompt_logprobs": rng.choice([None, None, 0]),
                "logprobs": None,
                "grammar": rng.choice([None] * 6 + ["9", "!9"]),
                "pooling": rng.choice([None] * 4 + ["last", "mean"]),
            }
            request = make_request(f"r{i}", r)
            core.add_request(request)
            ledger.accept(request)
            for _ in range(rng.randrange(4)):
                ledger.take(core.step())
                core.scheduler.check()
            if rng.random() < 0.15 and ledger.alive:
                name = rng.choice(ledger.alive)
                seen["abort of a preempted request"] += any(r.preemptions and r.request_id == name for r in core.scheduler.waiting.items)
                seen["abort in flight"] += any(r.in_flight and r.request_id == name for r in core.scheduler.running.items)
                ledger.aborted.add(name)
                core.abort([name])
            seen["preempted in flight"] += sum(1 for r in core.scheduler.waiting.items if r.in_flight)
            seen["preempted before its vector"] += sum(1 for r in core.scheduler.waiting.items if r.preemptions and r.pooling)
        drain(core, ledger)
        stats = core.stats()
        seen["preemption"] += stats.preemptions
        seen["prefix hit"] += stats.prefix_hit_tokens > 0
        sampled = sum(sum(plan.samples) for plan in executor.plans)
        seen["dropped token"] += sampled - stats.generated_tokens
        seen["chunk"] += sum(1 for plan in executor.plans for n, s in zip(plan.num_tokens, plan.samples, strict=True) if not s)
        seen["slot reused at once"] += sum(1 for plan in executor.plans if {n.slot for n in plan.new} & set(plan.freed))
        seen.update(end.finish_reason for end in ledger.ends.values())
    assert len(seen) == 13 and min(seen.values()) >= 5, seen
