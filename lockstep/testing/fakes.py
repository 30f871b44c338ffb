"""Stand-ins that run the whole engine in milliseconds, and notice when it is wrong."""

from __future__ import annotations

import hashlib
import struct
from collections import deque
from collections.abc import Callable, Collection, Sequence
from typing import Any

import msgspec

from lockstep.executor.contract import Executor, ExecutorError, RankMemory
from lockstep.protocol import EngineRequest, FinishReason, NewRequest, Pooling, SamplingParams, StepPlan, StepResult, TokenLogprobs

GIB = 1 << 30


class FakeClock:
    """Time that passes only when told to. Call it for the time in seconds."""

    def __init__(self, now_s: float = 1.0) -> None:
        self.now_s = now_s

    def __call__(self) -> float:
        return self.now_s

    def advance(self, seconds: float) -> None:
        """Let time pass."""
        assert seconds >= 0, "time does not go back"
        self.now_s += seconds


class ByteTokenizer:
    """One token per byte (ids 0..255), then the special tokens `bos` and `eos`."""

    bos_token_id, eos_token_id, vocab_size = 256, 257, 258

    def encode(self, text: str, add_special_tokens: bool = False) -> list[int]:
        """The UTF-8 bytes of `text`, after bos if asked for."""
        return [self.bos_token_id] * add_special_tokens + list(text.encode("utf-8"))

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        """The text of `ids`; bytes that are no UTF-8 become U+FFFD."""
        special = {self.bos_token_id: b"<bos>", self.eos_token_id: b"<eos>"}
        parts = ((b"" if skip_special_tokens else special[i]) if i in special else bytes([i]) for i in ids)
        return b"".join(parts).decode("utf-8", "replace")


# --- the fake model: its next token is a hash of everything before it ---


def chain(tokens: Sequence[int], parent: int = 0) -> list[int]:
    """For each position, a number that stands for its key and value: it depends on all tokens up to there."""
    values = []
    for token in tokens:
        digest = hashlib.blake2b(struct.pack("<Qi", parent, token), digest_size=8).digest()
        parent = int.from_bytes(digest, "little")
        values.append(parent)
    return values


def next_token(state: int, seed: int, choice: int, vocab_size: int, forbidden: Collection[int] = ()) -> int:
    """The token sampled after the sequence whose last `chain` value is `state`."""
    digest = hashlib.blake2b(struct.pack("<Qqi", state, seed, choice), digest_size=8).digest()
    token = int.from_bytes(digest, "little") % vocab_size
    while token in forbidden:
        token = (token + 1) % vocab_size
    return token


def fake_grammar(params: SamplingParams, num_output: int) -> tuple[bool, str | None]:
    """(whether the grammar ends a request at its `num_output`-th token, why if it fails): "7" allows 7 tokens, "!7" fails at the 7th."""
    if params.structured_outputs is None:
        return False, None
    limit = str(params.structured_outputs.regex)
    return num_output >= int(limit.lstrip("!")), f"fails at {limit}" if limit.startswith("!") else None


def embedding(tokens: Sequence[int], pooling: Pooling) -> bytes:
    """The vector of a prompt: 8 bytes."""
    values = chain(tokens)
    return struct.pack("<Q", values[-1] if pooling == "last" else sum(values) % 2**64)


def generate(request: EngineRequest, vocab_size: int, max_model_len: int) -> tuple[list[int], FinishReason, int | None]:
    """(output tokens, finish reason, stop reason) that any correct engine gives for a request: no batching, no cache, no steps."""
    p, eos = request.sampling, set() if request.sampling.ignore_eos else set(request.eos_token_ids)
    stops = eos | set(p.stop_token_ids or ())
    most = min(max_model_len - len(request.prompt_token_ids), p.max_tokens or max_model_len)
    state, output = chain(request.prompt_token_ids)[-1], list[int]()
    while True:
        token = next_token(state, request.seed, request.choice, vocab_size, stops if len(output) < p.min_tokens else ())
        complete, error = fake_grammar(p, len(output) + 1)
        if complete and error:
            return output, "error", None
        output.append(token)
        if token in stops:
            return output, "stop", None if token in eos else token
        if complete:
            return output, "stop", None
        if len(output) == most:
            return output, "length", None
        state = chain([token], state)[-1]


class _Slot:
    """A row of the fake worker's batch state."""

    def __init__(self, new: NewRequest) -> None:
        self.new = new
        self.tokens = list(new.token_ids)
        self.blocks = list(new.block_ids)
        self.sampled_in = -(1 << 30)  # the last step that sampled
        self.num_computed: int | None = None  # unknown until its first row: some of it may be cached
        self.first: int | None = None  # position that was computed first
        self.stops = set(new.eos_token_ids) | set(new.sampling.stop_token_ids or ())


class _StepAccess:
    """Which blocks the rows of one step read and write: none may be touched by two rows if one of them writes it."""

    def __init__(self, kv: list[list[int]]) -> None:
        self.before = [list(block) for block in kv]  # a row reads what was there before the step
        self.writer: dict[int, int] = {}  # block -> slot
        self.readers: dict[int, set[int]] = {}  # block -> slots

    def write(self, block: int, slot: int) -> None:
        other = self.writer.setdefault(block, slot)
        assert other == slot, f"block {block} is written by slots {other} and {slot} in one step"

    def check(self) -> None:
        for block, slot in self.writer.items():
            others = self.readers.get(block, set()) - {slot}
            assert not others, f"block {block} is written by slot {slot} and read by slots {sorted(others)} in one step"


class FakeFuture:
    """A step whose result shows only after `lag` more steps have been issued, or when it is waited for."""

    def __init__(self, executor: FakeExecutor, plan: StepPlan, result: StepResult) -> None:
        self._executor, self._plan, self._result = executor, plan, result
        self.step, self._delivered = plan.step, False

    def done(self) -> bool:
        return self._executor.issued - self._plan.step > self._executor.lag

    def result(self, timeout: float | None = None) -> StepResult:
        if not self._delivered:
            self._executor.wait(self._plan, timeout)
            self._result = self._executor.deliver(self, self._plan, self._result)
            self._delivered = True
        return self._result


class FakeExecutor(Executor):
    """Executes plans as a worker would, on a model that is a hash, and asserts that every plan makes sense.

    For each place in a block it keeps what was written there (`chain`), and before each row it compares all that the
    row reads: a block reused too early, shared wrongly or never written is found at the step that reads it.

    fail_at_step: raise ExecutorError at that step, when it is issued or (fail_on="result") waited for.
    stages: of the pipeline that it stands for: a token comes back to the first when the step has been through all of them.
    sick: called with (request id, position); true makes the row yield token -1, as a sampler without a usable logit.
    """

    def __init__(
        self,
        *,
        vocab_size: int = 258,
        block_size: int = 16,
        max_concurrent_batches: int = 1,
        stages: int = 1,
        lag: int = 0,
        memory: Sequence[RankMemory] | None = None,
        fail_at_step: int | None = None,
        fail_on: str = "issue",
        sick: Callable[[str, int], bool] | None = None,
    ) -> None:
        self.vocab_size, self.block_size, self.max_concurrent_batches, self.lag = vocab_size, block_size, max_concurrent_batches, lag
        self.fail_at_step, self.fail_on, self.sick, self.stages = fail_at_step, fail_on, sick, stages
        self._memory = list(memory or [RankMemory(rank=0, weight_bytes=GIB, free_bytes=GIB, kv_bytes_per_block=1 << 16)])
        self._slots: dict[int, _Slot] = {}
        self._pending: deque[FakeFuture] = deque()
        self._failure: ExecutorError | None = None
        self._callbacks: list[Callable[[ExecutorError], None]] = []
        self.kv: list[list[int]] = []  # [block][offset] -> chain value, 0 where nothing was written
        self.plans: list[StepPlan] = []
        self.issued = 0
        self.is_shut_down = False

    # --- the contract ---

    def memory(self) -> list[RankMemory]:
        return self._memory

    def initialize_kv_cache(self, num_blocks: int) -> None:
        assert not self.kv, "the KV cache is allocated once"
        self.kv = [[0] * self.block_size for _ in range(num_blocks)]

    def execute_model(self, plan: StepPlan) -> FakeFuture:
        self.check_health()
        plan = msgspec.msgpack.decode(msgspec.msgpack.encode(plan), type=StepPlan)  # as ranks get it: nothing shared with the engine
        assert len(self._pending) < self.max_concurrent_batches, f"{len(self._pending) + 1} steps in flight"
        assert plan.step == self.issued, f"step {plan.step} issued after {self.issued} steps"
        self.issued += 1
        self.plans.append(plan)
        if plan.step == self.fail_at_step and self.fail_on == "issue":
            self.fail(ExecutorError(f"rank 0 died in step {plan.step}", rank=0, phase=f"step {plan.step}", exitcode=-9))
        future = FakeFuture(self, plan, self._execute(plan))
        self._pending.append(future)
        return future

    def wait(self, plan: StepPlan, timeout: float | None) -> None:
        """A step is waited for. One with a clock lets its time pass, and raises TimeoutError where `timeout` is over before."""

    def deliver(self, future: FakeFuture, plan: StepPlan, result: StepResult) -> StepResult:
        """A step has been waited for."""
        self.check_health()
        if plan.step == self.fail_at_step:
            self.fail(ExecutorError(f"rank 0 died in step {plan.step}", rank=0, phase=f"step {plan.step}", exitcode=-9))
        assert self._pending.popleft() is future, "a later step was waited for before an earlier one"
        return result

    def collective_rpc(
        self, method: str, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None, timeout: float | None = None
    ) -> list[Any]:
        self.check_health()
        return [getattr(self, method)(*args, **(kwargs or {})) for _ in self._memory]

    def check_health(self) -> None:
        if self._failure is not None:
            raise self._failure

    def register_failure_callback(self, callback: Callable[[ExecutorError], None]) -> None:
        if self._failure is not None:
            callback(self._failure)
        else:
            self._callbacks.append(callback)

    def shutdown(self) -> None:
        self.is_shut_down = True
        self._failure = self._failure or ExecutorError("the executor has been shut down", kind="shutdown")

    def fail(self, error: ExecutorError) -> None:
        """Fail now, as when a rank dies. Raises the error."""
        self._failure, callbacks, self._callbacks = error, self._callbacks, []
        for callback in callbacks:
            callback(error)
        raise error

    # --- the worker ---

    def _execute(self, plan: StepPlan) -> StepResult:
        self._apply(plan)
        access = _StepAccess(self.kv)
        result = StepResult(step=plan.step, tokens=[])
        logprobs: list[TokenLogprobs | None] = []
        assert plan.slots, "a plan without rows"
        assert len(set(plan.slots)) == len(plan.slots), "two rows of one slot"
        for at, count, slot, samples in zip(plan.num_computed, plan.num_tokens, plan.slots, plan.samples, strict=True):
            row = self._slots[slot]
            near = plan.step - row.sampled_in < self.stages and any(row.sampled_in == future.step for future in self._pending)
            assert self.stages == 1 or not near, f"slot {slot}: step {plan.step} would wait for the token of step {row.sampled_in}"
            values = self._compute(row, at, count, slot, access)
            if row.new.sampling.prompt_logprobs is not None:
                last = min(at + count, row.new.num_prompt_tokens - 1)
                entries = [TokenLogprobs([row.tokens[i + 1]], [-float(i + 1)], i + 1) for i in range(at, last)]
                result.prompt_logprobs.append((slot, entries))
            done = at + count == len(row.tokens)
            if row.new.pooling is not None:
                assert not samples, f"slot {slot} wants a vector, and samples"
                assert row.new.pooling == "last" or row.first == 0, f"slot {slot} wants the mean of positions from {row.first} on"
                if done:
                    result.embeddings.append((slot, embedding(row.tokens, row.new.pooling)))
                continue
            assert samples == done, f"slot {slot}: samples={samples} at {at + count} of {len(row.tokens)} tokens"
            if samples:
                row.sampled_in = plan.step
                result.tokens.append(self._sample(row, values[-1]))
                over, error = fake_grammar(row.new.sampling, len(row.tokens) - row.new.num_prompt_tokens)
                if over:
                    result.ended.append((len(result.tokens) - 1, error))
                asked = row.new.sampling.logprobs is not None
                logprobs.append(TokenLogprobs([result.tokens[-1]], [-float(len(row.tokens))], 1) if asked else None)
        access.check()
        result.logprobs = logprobs if any(entry is not None for entry in logprobs) else None
        return result

    def _apply(self, plan: StepPlan) -> None:
        """Slots given back, then new requests, then new blocks."""
        for slot in plan.freed:
            del self._slots[slot]
        for new in plan.new:
            assert new.slot not in self._slots, f"slot {new.slot} given to {new.request_id!r} while in use"
            assert new.slot in plan.slots, f"request {new.request_id!r} takes a slot without a row"
            self._slots[new.slot] = _Slot(new)
        for slot, blocks in plan.new_blocks:
            self._slots[slot].blocks += blocks

    def _compute(self, row: _Slot, at: int, count: int, slot: int, access: _StepAccess) -> list[int]:
        """Check what the row reads, then write its keys and values. Returns these."""
        name, size = f"slot {slot} ({row.new.request_id!r})", self.block_size
        assert count > 0, f"{name} computes nothing"
        assert row.num_computed in (None, at), f"{name}: position {at} computed after {row.num_computed}"
        assert at + count <= len(row.tokens), f"{name}: computes {at + count} of {len(row.tokens)} tokens"
        assert at + count <= len(row.blocks) * size, f"{name}: {len(row.blocks)} blocks for {at + count} tokens"
        assert len(set(row.blocks)) == len(row.blocks), f"{name} has a block twice"
        values = chain(row.tokens[: at + count])
        for i in range(at):
            block = row.blocks[i // size]
            access.readers.setdefault(block, set()).add(slot)
            assert access.before[block][i % size] == values[i], f"{name} reads position {i} in block {block}, which holds something else"
        for i in range(at, at + count):
            block = row.blocks[i // size]
            access.write(block, slot)
            self.kv[block][i % size] = values[i]
        row.first = at if row.first is None else row.first
        row.num_computed = at + count
        return values

    def _sample(self, row: _Slot, state: int) -> int:
        """Choose the next token and append it, as every rank does by itself."""
        new, num_output = row.new, len(row.tokens) - row.new.num_prompt_tokens
        if self.sick is not None and self.sick(new.request_id, len(row.tokens)):
            row.tokens.append(0)
            return -1
        forbidden = row.stops if num_output < new.sampling.min_tokens else ()
        row.tokens.append(next_token(state, new.seed, new.choice, self.vocab_size, forbidden))
        return row.tokens[-1]


class NoopFuture:
    """A step that took no time."""

    def __init__(self, result: StepResult) -> None:
        self._result = result

    def done(self) -> bool:
        return True

    def result(self, timeout: float | None = None) -> StepResult:
        return self._result


class NoopExecutor(FakeExecutor):
    """Checks nothing and computes nothing: every row's token is 1. What is left is the engine's own time."""

    def initialize_kv_cache(self, num_blocks: int) -> None:
        pass

    def execute_model(self, plan: StepPlan) -> NoopFuture:  # type: ignore[override]
        return NoopFuture(StepResult(step=plan.step, tokens=[1] * sum(plan.samples)))
