"""The engine as an API process has it: requests in by await, outputs out as async streams. It never blocks on the engine.

Tokenizing and detokenizing are done here; what crosses to the engine's process is token ids.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator, Iterable
from dataclasses import replace
from pathlib import Path
from typing import Any

import msgspec
import zmq
import zmq.asyncio

from lockstep.config.model_spec import ModelSpec
from lockstep.engine.admission import check_request
from lockstep.engine.core import limits_of
from lockstep.engine.errors import RequestError
from lockstep.engine.stats import EngineStats
from lockstep.executor.contract import ExecutorError, RankMemory
from lockstep.frontend import engine_wire as wire
from lockstep.frontend.collector import Collector
from lockstep.frontend.inputs import InputProcessor, Job
from lockstep.frontend.outputs import RequestOutput
from lockstep.frontend.prompts import Prompt
from lockstep.observability.logging import get_logger
from lockstep.observability.otel import RequestSpans
from lockstep.protocol import EngineOutput, FinishReason, SamplingParams

LONG_TEXT = 20_000  # characters; longer prompts are tokenized beside the event loop
CALL_S = 60.0
SEED_STRIDE = 1 << 32  # API processes draw seeds from ranges of their own

_log = get_logger(__name__)


class EngineDeadError(ExecutorError):
    """The engine runs no more: no request can be taken."""


class CallRefused(RuntimeError):
    """A call of the engine failed; the engine runs on."""


class Stream:
    """The outputs of one job, as they come. Ends after the one that is `finished`."""

    def __init__(self) -> None:
        self._queue: asyncio.Queue[RequestOutput] = asyncio.Queue()

    def put(self, output: RequestOutput) -> None:
        self._queue.put_nowait(output)

    async def __aiter__(self) -> AsyncIterator[RequestOutput]:
        while True:
            output = await self._queue.get()
            yield output
            if output.finished:
                return


class AsyncEngine:
    """One API process's connection to the engine. Everything is called on one event loop.

    Each accepted job's stream ends with exactly one output that is `finished`, whatever happens to the engine.
    """

    def __init__(self, endpoint: str, secret: str, spec: ModelSpec, folder: Path, tokenizer: Any, *, index: int = 0) -> None:
        """index: of this API process among all. `connect` before anything else."""
        self._endpoint, self._secret, self._index = endpoint, secret, index
        self.index = index
        self.spec, self.folder, self.tokenizer = spec, folder, tokenizer
        self.observer: RequestSpans | None = None
        self.failure: EngineDeadError | None = None
        self.started_s = time.monotonic()
        self._context: zmq.asyncio.Context = zmq.asyncio.Context()
        self._socket = self._context.socket(zmq.DEALER)
        self._socket.setsockopt(zmq.IDENTITY, f"api-{index}".encode())
        self._socket.setsockopt(zmq.MAXMSGSIZE, wire.MAX_BYTES)
        self._socket.setsockopt(zmq.SNDHWM, 0)
        self._socket.setsockopt(zmq.RCVHWM, 0)
        self._socket.setsockopt(zmq.LINGER, 0)
        self._collector = Collector(tokenizer)
        self._streams: dict[str, Stream] = {}  # job -> its stream, until its end has been put there
        self._jobs: dict[str, Job] = {}
        self._answers: dict[int, asyncio.Future[msgspec.Raw]] = {}
        self._count = 0
        self._listener: asyncio.Task[None] | None = None

    # --- life ---

    async def connect(self, timeout_s: float = 30.0) -> None:
        """Prove the secret, and wait until the engine runs. Raises EngineDeadError when it does not in time."""
        self._socket.connect(self._endpoint)
        try:
            welcome = await asyncio.wait_for(self._greet(), timeout_s)
        except TimeoutError:
            raise EngineDeadError(f"the engine did not answer in {timeout_s:g} s.", kind="hung") from None
        self.memory = welcome.memory
        self.config = welcome.config
        self._limits = limits_of(self.config, self.spec, self.memory)
        seeded = replace(self.config.model, seed=self.config.model.seed + self._index * SEED_STRIDE)
        self._inputs = InputProcessor(replace(self.config, model=seeded), self.spec, self.folder, self.tokenizer)
        self._listener = asyncio.create_task(self._listen(), name="engine-outputs")

    async def _greet(self) -> wire.Welcome:
        mine = wire.nonce()
        await self._send(wire.Hello(mine))
        while True:
            reply = wire.decode_reply(await self._socket.recv())
            if isinstance(reply, wire.Challenge):
                if wire.engine_proof(self._secret, mine, reply.nonce) != reply.proof:
                    raise EngineDeadError("what listens at the engine's endpoint is not the engine.")
                await self._send(wire.Proof(wire.api_proof(self._secret, mine, reply.nonce)))
            elif isinstance(reply, wire.Welcome):
                return reply

    async def close(self) -> None:
        """Hang up. Streams that have not ended, end with an error."""
        self.fail("the server is shutting down.")
        if self._listener is not None:
            self._listener.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await self._listener
        if self.observer is not None:
            await asyncio.to_thread(self.observer.close)
        self._socket.close()
        self._context.term()

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

    # --- requests ---

    async def job(
        self,
        prompt: Prompt,
        sampling: SamplingParams,
        *,
        priority: int = 0,
        session_id: str | None = None,
        data_parallel_rank: int | None = None,
    ) -> Job:
        """A job, checked but not queued: `submit` it. Raises PromptError or RequestError when it cannot run, EngineDeadError."""
        self._raise_failure()
        self._count += 1
        name = f"{self._index}-{self._count}"

        def make() -> Job:
            return self._inputs.job(prompt, sampling, request_id=name, priority=priority, arrival_s=time.monotonic())

        long = isinstance(prompt, str) and len(prompt) > LONG_TEXT
        job = await asyncio.to_thread(make) if long else make()
        for request in job.requests:
            request.session_id, request.data_parallel_rank = session_id, data_parallel_rank
        check_request(job.requests[0], self._limits)
        replicas = self.config.parallel.data_parallel_size
        if data_parallel_rank is not None and not 0 <= data_parallel_rank < replicas:
            raise RequestError(f"data_parallel_rank={data_parallel_rank} does not exist: there are {replicas}, from 0 on.")
        return job

    async def submit(self, job: Job) -> Stream:
        """Queue a job; its outputs, of the kind that its parameters ask for. Raises EngineDeadError."""
        self._raise_failure()
        stream = self._streams[job.request_id] = Stream()
        self._jobs[job.request_id] = job
        self._collector.start(job)
        if self.observer is not None:
            self.observer.started(job.request_id, job.requests)
        for request in job.requests:
            await self._send(wire.Add(request))
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
                await self._send(wire.Abort([request.request_id for request in job.requests]))

    def _end(self, name: str, reason: FinishReason, error: str | None) -> None:
        """End a job from here: its stream gets a last output with what there is of each completion."""
        job, stream = self._jobs.pop(name), self._streams.pop(name)
        ends = [EngineOutput(request_id=r.request_id, new_token_ids=[], finish_reason=reason, error=error) for r in job.requests]
        for output in self._collector.take(ends)[0]:
            stream.put(output)
            self._observe_end(output)

    def _observe_end(self, output: RequestOutput) -> None:
        if self.observer is not None and output.finished:
            self.observer.ended(output.request_id, [one.finish_reason for one in output.outputs], output.error)

    # --- calls ---

    async def call(self, method: str, *args: Any, type: Any = Any, timeout_s: float = CALL_S) -> Any:
        """Call one of `engine_server.CALLS`. Raises CallRefused, ValueError for wrong arguments, TimeoutError, EngineDeadError."""
        self._raise_failure()
        self._count += 1
        number = self._count
        waiting = self._answers[number] = asyncio.get_running_loop().create_future()
        try:
            await self._send(wire.Call(number, method, list(args)))
            value = await asyncio.wait_for(waiting, timeout_s)
        except TimeoutError:
            raise TimeoutError(f"the engine did not answer {method} in {timeout_s:g} s") from None
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
                reply = wire.decode_reply(await self._socket.recv())
            except msgspec.DecodeError as e:
                self.fail(f"the engine said something that is no message: {e}")
                return
            if isinstance(reply, wire.Outputs):
                await self._take(reply)
            elif isinstance(reply, wire.Answer | wire.Refused):
                self._answer(reply)
            elif isinstance(reply, wire.Dead):
                self.fail(reply.message)

    async def _take(self, reply: wire.Outputs) -> None:
        if self.observer is not None:
            self.observer.took(reply.outputs)
        outputs, ended = self._collector.take(reply.outputs)
        if ended:
            await self._send(wire.Abort(ended))
        for output in outputs:
            stream = self._streams.get(output.request_id)
            if stream is None:
                continue
            stream.put(output)
            self._observe_end(output)
            if output.finished:
                del self._streams[output.request_id], self._jobs[output.request_id]

    def _answer(self, reply: wire.Answer | wire.Refused) -> None:
        waiting = self._answers.get(reply.id)
        if waiting is None or waiting.done():
            return
        if isinstance(reply, wire.Answer):
            waiting.set_result(reply.value)
        else:
            waiting.set_exception(ValueError(reply.message) if reply.wrong else CallRefused(reply.message))

    async def _send(self, order: wire.Order) -> None:
        await self._socket.send(wire.encode(order))

    def _raise_failure(self) -> None:
        if self.failure is not None:
            raise self.failure
