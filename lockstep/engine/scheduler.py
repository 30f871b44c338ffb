"""Decides what every step computes.

There is no prefill phase and no decode phase. Each request has tokens (known, or sampled by a step in flight) and a
count of computed ones; a step lets the computed tokens catch up, for as many requests as one token budget allows. A
decoding request is one token behind, a new one its whole prompt, a preempted one everything it had.

One `schedule` call:
  1. running requests in order, each as many tokens as it is behind and the budget allows; when blocks run out, the last
     running request is preempted: it loses its blocks and waits again, to recompute them later;
  2. if nobody was preempted, waiting requests in order, while slots, budget and blocks last.
`schedule` may be called again before the results of earlier plans have arrived. Each such step in flight has left a
placeholder token on every request that sampled in it, so lengths are known ahead though tokens are not.

In a pipeline the steps in flight are micro-batches, one for each stage, of different requests: a step takes no more than its
share of them, so that the others find some too, and one whose token is in flight is left out until every stage has had a step
since it was planned. Then its token comes from the last stage just when the first one is free for it: the step may be planned,
and handed over, before. A prompt's chunks may follow each other at once.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable

from lockstep.engine.admission import Limits, check_request
from lockstep.engine.errors import RequestError
from lockstep.engine.kv_manager import KVManager
from lockstep.engine.plan_builder import PlanBuilder, ScheduledStep
from lockstep.engine.queues import RequestQueue
from lockstep.engine.request import Request, Status
from lockstep.engine.stats import EngineLoad, EngineStats
from lockstep.protocol import EngineOutput, EngineRequest, FinishReason, StepResult, TokenLogprobs


class Scheduler:
    """Pure bookkeeping over plain data: no threads, no clock but the one handed in, no I/O."""

    def __init__(
        self,
        limits: Limits,
        *,
        prefix_caching: bool = True,
        hash_seed: int = 0,
        stages: int = 1,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self.limits, self._stages = limits, stages
        self.kv = KVManager(limits.num_blocks, limits.block_size, prefix_caching, hash_seed)
        self.waiting = RequestQueue()
        self.running = RequestQueue()
        self._clock = clock
        self._requests: dict[str, Request] = {}  # all that have not ended
        self._outputs: list[EngineOutput] = []  # not taken yet
        self._free_slots = list(range(limits.max_num_seqs - 1, -1, -1))  # a stack: low numbers first
        self._freed_slots: list[int] = []  # given back since the last plan, which the workers must hear of
        self._watermark = limits.num_blocks // 100  # blocks that admission leaves to those that run
        self._accepted = self._steps = self._in_flight = 0
        self._scheduled_tokens = self._generated_tokens = self._preemptions = self._finished = 0

    # --- requests in, outputs out ---

    def add(self, source: EngineRequest) -> None:
        """Queue a request. Raises RequestError when it can never run, or its id is in use."""
        if source.request_id in self._requests or any(o.request_id == source.request_id for o in self._outputs):
            raise RequestError(f"request id {source.request_id!r} is in use by an unfinished request: choose another id.")
        try:
            max_total = check_request(source, self.limits)
        except RequestError as e:
            raise RequestError(f"request {source.request_id!r}: {e}") from None
        priority = source.priority if self.limits.by_priority else 0
        request = Request(source, (priority, source.arrival_s or self._clock(), self._accepted), max_total)
        request.added_s = self._clock()
        self._accepted += 1
        self._requests[source.request_id] = request
        self.waiting.add(request)

    def abort(self, request_ids: Iterable[str]) -> None:
        """End requests now and free their blocks. Ids that are not (or no longer) here are ignored: aborts race with ends."""
        for request_id in request_ids:
            request = self._requests.get(request_id)
            if request is not None:
                self._finish(request)
                self._emit(request, [], "abort")

    def abort_all(self) -> None:
        """End every request now."""
        self.abort(list(self._requests))

    def fail_all(self, message: str) -> None:
        """End every request with an error, for good: no step will run any more, so slots and blocks are not tidied up."""
        for request in self._requests.values():
            request.status = Status.FINISHED
            self._emit(request, [], "error", error=message)
        self._finished += len(self._requests)
        self._requests.clear()
        self.waiting, self.running = RequestQueue(), RequestQueue()

    def has_unfinished(self) -> bool:
        """Whether a request has not ended, or an output has not been taken."""
        return bool(self._requests or self._outputs)

    def has_outputs(self) -> bool:
        """Whether an output has not been taken."""
        return bool(self._outputs)

    def preempt_all(self) -> None:
        """Every running request loses its blocks, and waits to start again. No step may be in flight."""
        assert not self._in_flight, f"{self._in_flight} steps in flight"
        for request in reversed(list(self.running.items)):
            self._preempt(request)

    def take_outputs(self) -> list[EngineOutput]:
        """What came for requests since the last call."""
        outputs, self._outputs = self._outputs, []
        return outputs

    # --- planning ---

    def schedule(self) -> ScheduledStep | None:
        """The next step, to be issued at once and passed to `update` with its result, in order. None when there is nothing to do."""
        plan = PlanBuilder(self.limits.max_num_batched_tokens)
        preempted = self._schedule_running(plan, -(-len(self.running) // self._stages))
        if not preempted and self.waiting:
            self._schedule_waiting(plan, -(-(len(self.running) + min(len(self.waiting), len(self._free_slots))) // self._stages))
        if not plan.rows:
            return None
        self.kv.commit()
        if self._stages > 1:
            for request in plan.sampled:
                request.sampled_in = self._steps
        step = plan.build(self._steps, self._freed_slots)
        self._freed_slots = []
        self._steps += 1
        self._in_flight += 1
        self._scheduled_tokens += self.limits.max_num_batched_tokens - plan.budget
        return step

    def _schedule_running(self, plan: PlanBuilder, rows: int) -> bool:
        """Step 1, with at most `rows` rows that sample. Returns whether anyone was preempted."""
        running, preemptions = self.running.items, self._preemptions
        block_size = self.limits.block_size
        at = 0
        pipelined = self._stages > 1
        while at < len(running) and plan.budget > 0 and len(plan.sampled) < rows:
            request = running[at]
            at += 1
            if pipelined and request.in_flight and self._steps - request.sampled_in < self._stages:
                continue
            known = len(request.token_ids)
            total = known + request.in_flight
            if total >= request.max_total:
                continue  # its last token is in flight
            end = request.num_computed + 1
            if end < total:  # a part of a prompt: leave one token for each of the others, so that it stalls nobody's decoding
                end = min(total, request.num_computed + max(1, plan.budget - len(running) + at))
            if end > len(request.block_ids) * block_size and not self._make_room(request, end, plan):
                break  # it was the last, and preempted itself
            if end >= request.next_publish <= known:
                self.kv.stage(request, end)
            plan.add(request, end, end == total)
        return self._preemptions != preemptions

    def _make_room(self, request: Request, end: int, plan: PlanBuilder) -> bool:
        """Give a running request blocks up to `end`, preempting from the last on. False when it had to go itself."""
        while (new := self.kv.extend(request, end)) is None:
            victim = self.running.items[-1]
            self._preempt(victim)
            if victim is request:
                return False
        plan.new_blocks.append((request.slot, new))
        return True

    def _preempt(self, request: Request) -> None:
        """Take slot and blocks of a running request; it keeps its tokens and waits in its old place."""
        self.running.remove(request)
        self._release(request)
        request.status = Status.WAITING
        request.preemptions += 1
        self._preemptions += 1
        self.waiting.add(request)

    def _schedule_waiting(self, plan: PlanBuilder, rows: int) -> None:
        """Step 2, up to `rows` rows that sample. Stops at the first that must wait for memory, so that none is overtaken for ever."""
        at = 0
        while at < len(self.waiting) and self._free_slots and plan.budget > 0 and len(plan.sampled) < rows:
            request = self.waiting.items[at]
            if request.in_flight:
                break  # preempted while its token was in flight: its length is not known to be final yet
            cached = self.kv.find_cached(request)
            if self.kv.is_coming(request, len(cached)):
                at += 1  # another request computes the same prefix in this very step: share it in the next
                continue
            if self.kv.num_free_after(request, cached) < (self._watermark if self.running else 0):
                break
            end = self._first_chunk(request, len(cached) * self.limits.block_size, plan)
            if end == 0:
                break
            self._start(self.waiting.pop(at), cached, end, plan)

    def _first_chunk(self, request: Request, num_cached: int, plan: PlanBuilder) -> int:
        """Up to which token a waiting request is computed in this step; 0 when it has to wait."""
        behind = request.total - num_cached
        if behind <= plan.budget:
            return request.total
        if self.limits.chunked_prefill:
            return num_cached + plan.budget
        # Without chunking only whole prompts run. A preempted request that has outgrown the budget must be cut all the same.
        outgrown = request.total > self.limits.max_num_batched_tokens
        return num_cached + plan.budget if outgrown else 0

    def _start(self, request: Request, cached: list[int], end: int, plan: PlanBuilder) -> None:
        """Give a waiting request a slot and blocks, and put it in the plan."""
        self.kv.admit(request, cached, end)
        if request.num_cached < 0:
            request.num_cached = min(request.num_computed, request.num_prompt)  # one that goes on has cached outputs too
        request.slot = self._free_slots.pop()
        if not request.preemptions:
            request.queued_s = self._clock() - request.added_s
        request.status = Status.RUNNING
        self.running.add(request)
        plan.new.append(request.as_new())
        if end >= request.next_publish:
            self.kv.stage(request, end)
        plan.add(request, end, end == request.total)

    # --- results ---

    def update(self, step: ScheduledStep, result: StepResult) -> None:
        """Take the result of the oldest step in flight: append its tokens, end what has ended."""
        assert result.step == step.plan.step, f"result of step {result.step} taken for step {step.plan.step}"
        assert len(result.tokens) == len(step.sampled), f"{len(result.tokens)} tokens for {len(step.sampled)} sampled rows"
        self._in_flight -= 1
        if result.prompt_logprobs:
            _keep_prompt_logprobs(step, result)
        logprobs, ended = result.logprobs, dict(result.ended)
        for i, request in enumerate(step.sampled):
            if request.status == Status.FINISHED:
                continue  # it stopped or was aborted while this token was in flight
            if error := ended.get(i):
                self._finish(request)
                self._emit(request, [], "error", error=error)
            else:
                self._accept(request, result.tokens[i], logprobs[i] if logprobs else None, i in ended)
        for slot, vector in result.embeddings:
            request = step.rows[step.plan.slots.index(slot)]
            if request.status != Status.FINISHED:
                self._finish(request)
                self._emit(request, [], "stop", embedding=vector)

    def _accept(self, request: Request, token: int, logprobs: TokenLogprobs | None, complete: bool) -> None:
        """A sampled token has arrived. complete: with it, the request's grammar allows no more."""
        request.in_flight -= 1
        if not 0 <= token < self.limits.vocab_size:
            self._finish(request, poisoned=True)
            message = f"the step gave token {token} for request {request.request_id!r}, outside the vocabulary of {self.limits.vocab_size}"
            self._emit(request, [], "error", error=message)
            return
        request.token_ids.append(token)
        self._generated_tokens += 1
        end = request.finish_reason()
        if end is not None and not (complete and end[0] == "length"):
            self._finish(request)
            self._emit(request, [token], end[0], stop_reason=end[1], logprobs=logprobs)
            return
        self._emit(request, [token], None, logprobs=logprobs)
        if complete:
            self._finish(request)
            self._emit(request, [], "stop")

    def _finish(self, request: Request, poisoned: bool = False) -> None:
        """Forget a request and free what it holds. Its rows in flight, if any, are ignored when they arrive."""
        if request.status == Status.RUNNING:
            self.running.remove(request)
            self._release(request, poisoned)
        else:
            self.waiting.remove(request)
        request.status = Status.FINISHED
        self._finished += 1
        del self._requests[request.request_id]

    def _release(self, request: Request, poisoned: bool = False) -> None:
        """Give back slot and blocks."""
        self.kv.release(request, poisoned)
        self._free_slots.append(request.slot)
        self._freed_slots.append(request.slot)
        request.slot = -1

    def _emit(
        self,
        request: Request,
        tokens: list[int],
        reason: FinishReason | None,
        *,
        stop_reason: int | None = None,
        logprobs: TokenLogprobs | None = None,
        error: str | None = None,
        embedding: bytes | None = None,
    ) -> None:
        first = request.num_output == len(tokens) == 1
        prompt_logprobs = None
        if first and request.prompt_logprobs is not None:
            # From here on it owes no prompt log-probabilities: if preempted, it may read the cache.
            prompt_logprobs, request.prompt_logprobs = request.prompt_logprobs, None
        self._outputs.append(
            EngineOutput(
                request_id=request.request_id,
                new_token_ids=tokens,
                logprobs=None if logprobs is None else [logprobs],
                prompt_logprobs=prompt_logprobs,
                finish_reason=reason,
                stop_reason=stop_reason,
                num_cached_tokens=max(request.num_cached, 0),
                error=error,
                embedding=embedding,
                queued_s=request.queued_s if first else 0.0,
                preemptions=request.preemptions if reason is not None else 0,
            )
        )

    # --- looking in ---

    def stats(self) -> EngineStats:
        """The numbers of this moment."""
        return EngineStats(
            running=len(self.running),
            waiting=len(self.waiting),
            steps_in_flight=self._in_flight,
            kv_blocks=self.kv.pool.num_blocks,
            kv_blocks_used=self.kv.pool.num_used,
            steps=self._steps,
            scheduled_tokens=self._scheduled_tokens,
            generated_tokens=self._generated_tokens,
            prefix_query_tokens=self.kv.query_tokens,
            prefix_hit_tokens=self.kv.hit_tokens,
            preemptions=self._preemptions,
            finished=self._finished,
        )

    def load(self) -> EngineLoad:
        """What the requests weigh that have not ended. O(requests)."""
        waiting = sum(r.total for r in self.waiting.items) + sum(r.total - r.num_computed - 1 for r in self.running.items)
        return EngineLoad(waiting, sum(r.num_computed for r in self.running.items), len(self._requests))

    def check(self) -> None:
        """Assert every invariant. O(everything): for tests."""
        self.kv.pool.check()
        held = [0] * self.limits.num_blocks
        for request in self.running.items:
            assert request.status == Status.RUNNING
            assert request.num_computed < request.total <= request.max_total
            assert len(request.block_ids) >= self.kv.blocks_for(request.num_computed)
            for block in request.block_ids:
                held[block] += 1
        assert held == self.kv.pool.references, "the references of a block are not its places in tables"
        for request in self.waiting.items:
            assert request.status == Status.WAITING and not request.block_ids and request.slot < 0
        slots = [r.slot for r in self.running.items] + self._free_slots
        assert sorted(slots) == list(range(self.limits.max_num_seqs)), "a slot is lost or held twice"
        for queue in (self.running, self.waiting):
            assert all(a.key < b.key for a, b in zip(queue.items, queue.items[1:], strict=False))
        assert {r.request_id for q in (self.running, self.waiting) for r in q.items} == self._requests.keys()


def _keep_prompt_logprobs(step: ScheduledStep, result: StepResult) -> None:
    """Put what a step computed of prompts in its place. A preempted request computes some positions again, to the same values."""
    row_of = {slot: i for i, slot in enumerate(step.plan.slots)}
    for slot, entries in result.prompt_logprobs:
        row = row_of[slot]
        kept = step.rows[row].prompt_logprobs
        if kept is not None:
            start = step.plan.num_computed[row]  # logits at position p are for token p + 1, which is entry p
            kept[start : start + len(entries)] = entries
