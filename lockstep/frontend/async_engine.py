"""The engine as an API process has it: requests in by await, outputs out as async streams. It never blocks on the engine.

Tokenizing and detokenizing are done here; what crosses to the engine's process is token ids.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Callable, Coroutine, Iterable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import zmq

from lockstep.cluster.health import EngineHealth
from lockstep.config.model_spec import ModelSpec
from lockstep.engine.admission import check_request
from lockstep.engine.core import limits_of
from lockstep.engine.errors import RequestError
from lockstep.engine.stats import EngineStats
from lockstep.executor.contract import RankMemory
from lockstep.frontend import engine_wire as wire
from lockstep.frontend.collector import Collector
from lockstep.frontend.engine_link import EngineLink
from lockstep.frontend.inputs import InputProcessor, Job
from lockstep.frontend.outputs import RequestOutput, bare_end
from lockstep.frontend.problems import problems_of
from lockstep.frontend.prompts import Prompt
from lockstep.frontend.replays import Replays
from lockstep.frontend.streams import SHUTTING_DOWN, CallLate, CallRefused, EngineDeadError, Stream, submitted
from lockstep.observability.logging import get_logger, request_id
from lockstep.observability.otel import RequestSpans
from lockstep.protocol import EngineOutput, FinishReason, Pooling, SamplingParams
from lockstep.utils import procs
from lockstep.utils.frames import NO_MESSAGE

LONG_TEXT = 20_000  # characters; longer prompts are tokenized beside the event loop
CALL_S = 60.0
LOOK_S = 0.1  # how often it is looked whether the engine's process lives
RESTART_GRACE_S = 60.0  # beyond its start: until the former one is gone, and pauses between attempts
SEED_STRIDE = 1 << 32  # API processes draw seeds from ranges of their own

_log = get_logger(__name__)


class AsyncEngine:
    """One API process's connection to the engine. Everything is called on one event loop.

    Each accepted job's stream ends with exactly one output that is `finished`, whatever happens to the engine.
    """

    def __init__(self, endpoint: str, secret: str, spec: ModelSpec, folder: Path, tokenizer: Any, *, index: int = 0) -> None:
        """index: of this API process among all. `connect` before anything else."""
        self.index, self._link = index, EngineLink(endpoint, secret, index)
        self.spec, self.folder, self.tokenizer = spec, folder, tokenizer
        self.observer: RequestSpans | None = None
        self.failure: EngineDeadError | None = None
        self.on_welcome: Callable[[], None] = lambda: None  # called when another engine has come, with other memory perhaps
        self.lost_why = ""  # why there is no engine just now, told by who keeps it
        self._health: EngineHealth | None = None
        self._pulse_s = time.monotonic()  # when the engine last said how it is
        self.started_s = time.monotonic()
        self._collector = Collector(tokenizer)
        self._streams: dict[str, Stream] = {}  # job -> its stream, until its end has been put there
        self._jobs: dict[str, Job] = {}
        self._answers: dict[int, asyncio.Future[msgspec.Raw]] = {}
        self._count = 0
        self._compiler = ThreadPoolExecutor(1, "grammars")
        self._replays = Replays()
        self._dropped = False  # by the engine, which runs on
        self._tasks: list[asyncio.Task[None]] = []

    # --- life ---

    async def connect(self, timeout_s: float = 30.0) -> None:
        """Prove the secret, and wait until the engine runs. Raises EngineDeadError when it does not in time."""
        self._meet(await self._link.greet(timeout_s))
        seeded = replace(self.config.model, seed=self.config.model.seed + self.index * SEED_STRIDE)
        self._inputs = InputProcessor(replace(self.config, model=seeded), self.spec, self.folder, self.tokenizer)
        self._tasks = [self._task(self._listen(), "engine-outputs"), self._task(self._follow(), "engine-restarts")]

    def _meet(self, welcome: wire.Welcome) -> None:
        """An engine runs: what it takes is bounded by the memory that it found."""
        self.memory, self.config, self._pulse_s = welcome.memory, welcome.config, time.monotonic()
        self._limits = limits_of(self.config, self.spec, self.memory)

    def _task(self, work: Coroutine[Any, Any, None], name: str) -> asyncio.Task[None]:
        """Without it nothing would be heard: when it fails, so does everything, rather than hang."""
        task = asyncio.create_task(work, name=name)
        task.add_done_callback(self._task_ended)
        return task

    def _task_ended(self, task: asyncio.Task[None]) -> None:
        error = None if task.cancelled() else task.exception()
        if error is not None:
            _log.error("%s failed", task.get_name(), exc_info=error)
            self.fail(f"the connection to the engine failed: {type(error).__name__}: {error}")

    async def _follow(self) -> None:
        """When the engine's process dies, another one takes its place at the same endpoint: go on with that."""
        while self.failure is None:
            await asyncio.sleep(LOOK_S)
            health = self._health
            if not self._dropped and (health is None or procs.alive(health.pid, health.born)):
                await self._replay()  # those whose turn has come
                continue
            await self._unlink(health)
            limit_s = self.config.runtime.startup_timeout_seconds + RESTART_GRACE_S
            try:
                self._meet(await self._link.greet(limit_s))
            except EngineDeadError as e:
                self.fail(f"the engine's process died, and no other came: {e}")
                return
            self.on_welcome()
            await self._replay()
            self._tasks[0] = self._task(self._listen(), "engine-outputs")

    async def _unlink(self, health: EngineHealth | None) -> None:
        """The engine that was is not ours any more: it died, or has dropped us."""
        self._link.linked, self._health = False, None
        self._tasks[0].cancel()
        with contextlib.suppress(asyncio.CancelledError, Exception):  # `_task_ended` has told it
            await self._tasks[0]
        if self._dropped and (health is None or procs.alive(health.pid, health.born)):
            _log.error("the engine dropped this process, which did not read: %d requests are given to it anew", len(self._jobs))
            self._replays.cut_off()
        else:
            _log.error("the engine's process (pid %d) died: %d requests wait for the next", health.pid if health else 0, len(self._jobs))
            self._link.renew()
            for name in self._replays.died(time.monotonic()):
                self._end(name, "error", f"request {name!r} was given up: one engine after another died while it ran there.")
        self._dropped = False
        for waiting in self._answers.values():
            if not waiting.done():
                waiting.set_exception(CallRefused("the engine's process died during the call, and is started again: call again."))

    async def _replay(self) -> None:
        """Give the engine requests that it does not have, with the tokens that have come: it goes on after them."""
        for name in self._replays.due(time.monotonic()) if self._link.linked else ():
            job = self._jobs.get(name)
            if job is not None:
                self._replays.sent(name)
                for request in self._collector.resumed(job):
                    await self._link.send(wire.Add(request))

    async def close(self) -> None:
        """Hang up. Streams that have not ended, end with an error."""
        self.fail(SHUTTING_DOWN)
        for task in reversed(self._tasks):
            task.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):  # `_task_ended` has told it
                await task
        self._compiler.shutdown(wait=False, cancel_futures=True)
        if self.observer is not None:
            await asyncio.to_thread(self.observer.close)
        await self._link.close()

    def fail(self, message: str) -> None:
        """The engine is gone: every stream ends with this, and nothing more is taken."""
        if self.failure is not None:
            return
        self.failure = EngineDeadError(message)
        for name in list(self._streams):
            self._end(name, "error", message)
        for waiting in self._answers.values():
            if not waiting.done():
                waiting.set_exception(EngineDeadError(message))
        self._answers.clear()

    @property
    def unfinished(self) -> int:
        """Jobs of this process that have not ended."""
        return len(self._streams)

    # --- how it is ---

    @property
    def health(self) -> EngineHealth | None:
        """What the engine last said of itself; None between two engine processes."""
        return self._health

    def problems(self) -> list[dict[str, Any]]:
        """What is not well, in words and numbers, worst first; empty when every rank answers. Asks nobody: it is known here."""
        return problems_of(self.failure, self._health, time.monotonic() - self._pulse_s, self.lost_why)

    @property
    def takes_requests(self) -> bool:
        """Whether a request would be run now."""
        health = self._health
        if self.failure is not None or health is None or not health.takes_requests:
            return False
        return not any("process" in problem for problem in self.problems())

    # --- requests ---

    async def job(
        self,
        prompt: Prompt,
        sampling: SamplingParams,
        *,
        priority: int = 0,
        session_id: str | None = None,
        data_parallel_rank: int | None = None,
        response_id: str = "",
        pooling: Pooling | None = None,
    ) -> Job:
        """A job, checked but not queued: `submit` it. Raises PromptError or RequestError when it cannot run, EngineDeadError.

        response_id: of what it is for; the id of the HTTP request at hand is noted too. pooling: see `InputProcessor.job`.
        """
        self._raise_failure()
        self._count += 1
        name = f"#{self.index}-{self._count}"  # what no client can call its own

        def make() -> Job:
            return self._inputs.job(prompt, sampling, request_id=name, priority=priority, arrival_s=time.monotonic(), pooling=pooling)

        await self._check_structured(sampling)
        long = isinstance(prompt, str) and len(prompt) > LONG_TEXT
        job = await asyncio.to_thread(make) if long else make()
        for request in job.requests:
            request.session_id, request.data_parallel_rank = session_id, data_parallel_rank
        job.call(request_id.get(), response_id)
        check_request(job.requests[0], self._limits)
        known = self.config.parallel.replica_numbers
        if data_parallel_rank is not None and data_parallel_rank not in known:
            here = f"are {known[0]} to {known[-1]}" if len(known) > 1 else f"is {known[0]}"
            raise RequestError(f"data_parallel_rank={data_parallel_rank} does not exist: there {here}. Name it, or none.")
        return job

    async def _check_structured(self, sampling: SamplingParams) -> None:
        """Compile a grammar that is new here beside the event loop. Raises PromptError."""
        wanted = sampling.structured_outputs
        if wanted is not None and not self._inputs.structured.knows(wanted):
            await asyncio.get_running_loop().run_in_executor(self._compiler, self._inputs.structured.check, wanted)

    async def submit(self, job: Job) -> Stream:
        """Queue a job; its outputs, of the kind that its parameters ask for. Raises EngineDeadError."""
        self._raise_failure()
        stream = self._streams[job.request_id] = Stream()
        self._jobs[job.request_id] = job
        self._collector.start(job)
        noted = submitted.get()
        if noted is not None:
            noted.append(job.request_id)
        if self.observer is not None:
            self.observer.started(job.request_id, job.requests)
        if self._link.linked:
            self._replays.sent(job.request_id)
        else:
            self._replays.kept(job.request_id)
        for request in job.requests:
            await self._link.send(wire.Add(request))
        return stream

    async def generate(self, prompt: Prompt, sampling: SamplingParams, **options: Any) -> AsyncIterator[RequestOutput]:
        """`job` and `submit` in one; leaving the iterator early aborts the request."""
        job = await self.job(prompt, sampling, **options)
        try:
            async for output in await self.submit(job):
                yield output
        finally:
            await self.abort([job.request_id])

    async def abort(self, names: Iterable[str]) -> None:
        """End jobs: their streams end with "abort", their memory is freed. Those that have ended are ignored."""
        for name in names:
            job = self._jobs.get(name)
            if job is None:
                continue
            self._end(name, "abort", None)
            with contextlib.suppress(zmq.ZMQError):
                await self._link.send(wire.Abort([request.request_id for request in job.requests]))

    def _end(self, name: str, reason: FinishReason, error: str | None) -> None:
        """End a job from here: its stream gets a last output with what there is of each completion."""
        job, stream = self._jobs.pop(name), self._streams.pop(name)
        self._replays.ended(name)
        ends = [EngineOutput(request_id=r.request_id, new_token_ids=[], finish_reason=reason, error=error) for r in job.requests]
        try:
            last = self._collector.take(ends)[0]
        except Exception:  # it ends anyhow
            _log.exception("the end of request %s could not be made", name)
            self._collector.forget([request.request_id for request in job.requests])
            last = [bare_end(name, job.prompt, job.prompt_token_ids, job.sampling.n, reason, error)]
        for output in last:
            stream.put(output)
            self._observe_end(output)

    def _observe_end(self, output: RequestOutput) -> None:
        if self.observer is not None and output.finished:
            self.observer.ended(output.request_id, [one.finish_reason for one in output.outputs], output.error)

    # --- calls ---

    async def call(self, method: str, *args: Any, type: Any = Any, timeout_s: float = CALL_S) -> Any:
        """Call one of `engine_server.CALLS`. Raises CallRefused, CallLate, ValueError for wrong arguments, EngineDeadError."""
        self._raise_failure()
        if not self._link.linked:
            raise CallRefused("the engine's process died, and is started again: call again in a moment.")
        self._count += 1
        number = self._count
        waiting = self._answers[number] = asyncio.get_running_loop().create_future()
        try:
            await self._link.send(wire.Call(number, method, list(args)))
            value = await asyncio.wait_for(waiting, timeout_s)
        except TimeoutError:
            raise CallLate(f"the engine did not answer {method} in {timeout_s:g} s: call again in a moment.") from None
        finally:
            self._answers.pop(number, None)
        return msgspec.msgpack.decode(value, type=type)

    async def stats(self) -> EngineStats:
        """The engine's numbers at this moment."""
        found: EngineStats = await self.call("stats", type=EngineStats)
        return found

    async def ranks(self) -> list[RankMemory]:
        """Each rank's memory, replica by replica."""
        found: list[RankMemory] = await self.call("ranks", type=list[RankMemory])
        return found

    # --- what the engine says ---

    async def _listen(self) -> None:
        while True:
            try:
                replies = await self._link.receive()
            except NO_MESSAGE as e:
                self.fail(f"the engine said something that is no message: {e}")
                return
            outputs = [output for reply in replies if isinstance(reply, wire.Outputs) for output in reply.outputs]
            if outputs:
                await self._take(outputs)
            for reply in replies:
                self._hear(reply)

    def _hear(self, reply: wire.Reply) -> None:
        if isinstance(reply, wire.Pulse):
            self._health, self._pulse_s = reply.health, time.monotonic()
        elif isinstance(reply, wire.Answer | wire.Refused):
            self._answer(reply)
        elif isinstance(reply, wire.Dropped):
            self._dropped = True
        elif isinstance(reply, wire.Dead):
            self.fail(reply.message)

    async def _take(self, news: list[EngineOutput]) -> None:
        by_job: dict[str, list[EngineOutput]] = {}
        for one in news:
            by_job.setdefault(wire.job_of(one.request_id), []).append(one)
        now_s, ended = time.monotonic(), list[str]()
        for name, outputs in by_job.items():
            self._replays.brought(name, now_s)
            try:
                ended += self._pass_on(outputs)
            except Exception as e:  # one request's trouble is not that of all
                _log.exception("what the engine said of request %s could not be passed on", name)
                if name in self._jobs:
                    ended += [request.request_id for request in self._jobs[name].requests]
                    self._end(name, "error", f"the output of this request could not be made: {type(e).__name__}.")
        if ended:  # last: whoever cancels this here loses no output
            await self._link.send(wire.Abort(ended))

    def _pass_on(self, news: list[EngineOutput]) -> list[str]:
        """Put one job's outputs into its stream; the engine requests to abort, because a stop string ended them."""
        if self.observer is not None:
            self.observer.took(news)
        outputs, ended = self._collector.take(news)
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is None:
                continue
            stream.put(output)
            if output.finished:
                del self._streams[output.request_id], self._jobs[output.request_id]
                self._replays.ended(output.request_id)
            self._observe_end(output)
        return ended

    def _answer(self, reply: wire.Answer | wire.Refused) -> None:
        waiting = self._answers.get(reply.id)
        if waiting is None or waiting.done():
            return
        if isinstance(reply, wire.Answer):
            waiting.set_result(reply.value)
        else:
            waiting.set_exception(ValueError(reply.message) if reply.wrong else CallRefused(reply.message))

    def _raise_failure(self) -> None:
        if self.failure is not None:
            raise self.failure
