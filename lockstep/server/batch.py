"""The jobs of one HTTP request: made, run together, and ended together."""

from __future__ import annotations

import asyncio
import re
from collections.abc import AsyncIterator, Sequence
from typing import Any

from fastapi import Request

from lockstep.engine.errors import RequestError
from lockstep.frontend.async_engine import LONG_TEXT
from lockstep.frontend.errors import PromptError
from lockstep.frontend.inputs import Job
from lockstep.frontend.outputs import RequestOutput
from lockstep.frontend.prompts import Prompt, named
from lockstep.frontend.streams import SHUTTING_DOWN, Stream
from lockstep.frontend.tokenizer import encode
from lockstep.observability import logging
from lockstep.protocol import SamplingParams
from lockstep.server.errors import AGAIN, TOO_LONG, ApiError
from lockstep.server.middleware_gate import Running
from lockstep.server.schemas.common import SamplingFields
from lockstep.server.schemas.responses import TextOptions
from lockstep.server.schemas.wire import CachedTokens, Usage
from lockstep.server.sse import until_gone
from lockstep.server.state import ServerState

BREATH = 32  # prompts checked before others get their turn
_FIELD = re.compile(r"(?:prompts\[\d+\]: )?([a-z_]+)\b")
_SHAPE = re.compile(r"^(?:prompts\[\d+\]: )?structured_outputs(?:\.\w+)?")  # at the beginning of a refusal


def request_id(request: Request, given: str | None) -> str:
    """The one name of a request: in its response, its headers, log lines, spans and /v1/requests. given: what its body calls it."""
    if given:
        request.scope["state"]["request_id"] = given
        logging.request_id.set(given)
    name: str = request.scope["state"]["request_id"]
    return name


def routing(request: Request, body: SamplingFields) -> dict[str, Any]:
    """Where the request is to run: options of `AsyncEngine.job`. Headers stand in for fields that are not given."""
    session = body.session_id or request.headers.get("x-session-id") or None
    rank = body.data_parallel_rank
    header = request.headers.get("x-data-parallel-rank")
    if rank is None and header is not None:
        if not (header.isascii() and header.isdecimal() and len(header) < 9):
            raise ApiError(
                400, f"the header X-data-parallel-rank is {header[:40]!r}: it must be a whole number from 0.", param="data_parallel_rank"
            )
        rank = int(header)
    where = {"priority": body.priority or 0, "session_id": session and session[:256], "data_parallel_rank": rank}
    return where | {"shape": shaped_by(body)}


def shaped_by(body: SamplingFields) -> str:
    """The field that says what the output must look like: the one that holds, where there are several."""
    if getattr(body, "tool_choice", None) not in (None, "none", "auto"):
        return "tools"
    if body.structured_outputs is not None:
        return "structured_outputs"
    text = getattr(body, "text", None)
    return "text.format" if isinstance(text, TextOptions) and text.format is not None else "response_format"


def misshapen(message: str, shape: str) -> ApiError:
    """What the engine says of structured_outputs, told of the field that the client gave."""
    said = message if shape == "structured_outputs" else _SHAPE.sub(shape, message, count=1)
    return ApiError(400, said, param=shape)


def field_in(message: str) -> str | None:
    """The field of a request that the refusal begins with; None: it is about the prompt."""
    found = _FIELD.match(message)
    return found[1] if found and (found[1] in SamplingParams.__struct_fields__ or found[1] == "data_parallel_rank") else None


async def prepared(state: ServerState, prompt: str | list[int], body: SamplingFields, *, max_tokens: int | None) -> Prompt:
    """A prompt as the engine takes it: tokenized here where the request says how, else left to the engine's frontend."""
    made: dict[str, Any] = {"prompt" if isinstance(prompt, str) else "prompt_token_ids": prompt}
    if body.cache_salt:
        made["cache_salt"] = body.cache_salt
    special = body.add_special_tokens is not False
    if isinstance(prompt, str) and (body.truncate_prompt_tokens is not None or not special):
        made["prompt_token_ids"] = await tokens_of(state, prompt, special=special)
    if body.truncate_prompt_tokens is not None:
        made["prompt_token_ids"] = truncated(state, made["prompt_token_ids"], body.truncate_prompt_tokens, max_tokens)
        made.pop("prompt", None)  # what is left of it is its tokens' text
    if isinstance(prompt, str) and "prompt_token_ids" not in made and len(prompt) > LONG_TEXT:
        made["prompt_token_ids"] = await tokens_of(state, prompt)
    return made


async def tokens_of(state: ServerState, text: str, *, special: bool = True) -> list[int]:
    """A text's token ids; a long text is read beside the event loop."""

    def read() -> list[int]:
        return encode(state.engine.tokenizer, text, "prompt", add_special_tokens=special)

    return await state.aside.do(read) if len(text) > LONG_TEXT else read()


def truncated(state: ServerState, ids: list[int], keep: int, max_tokens: int | None) -> list[int]:
    """The last `keep` tokens; -1: as many as leave room for the output."""
    longest: int = state.engine.config.model.max_model_len  # type: ignore[assignment]
    if keep == -1:
        keep = max(1, longest - (max_tokens or 1))
    if keep == 0:
        raise ApiError(
            400, "truncate_prompt_tokens=0 leaves nothing of the prompt: give at least 1, or -1.", param="truncate_prompt_tokens"
        )
    return ids[-keep:]


class Batch:
    """The jobs of one request, by prompt."""

    def __init__(self, state: ServerState, jobs: list[Job], shape: str) -> None:
        self._state, self.jobs, self._shape = state, jobs, shape
        self._streams: list[Stream] = []
        self._running: Running | None = None  # the request that they are of, once they are started

    @classmethod
    async def make(
        cls,
        state: ServerState,
        prompts: Sequence[Prompt],
        sampling: SamplingParams,
        *,
        param: str = "prompt",
        shape: str = "structured_outputs",
        **options: Any,
    ) -> Batch:
        """Check all of them before any runs. Raises ApiError for one that cannot.

        param: the client's field that prompts come from. shape: the one that `sampling.structured_outputs` comes from.
        """
        if state.draining:
            raise ApiError(503, "the server is shutting down and takes no new requests.", code="draining", headers={"retry-after": "5"})
        jobs = []
        for i, prompt in enumerate(prompts):
            try:
                with named(i, len(prompts)):
                    jobs.append(await state.engine.job(prompt, sampling, **options))
            except (PromptError, RequestError) as e:
                long = "max_model_len" in str(e)
                name = field_in(str(e))
                if name == "structured_outputs":
                    raise misshapen(str(e), shape) from None
                raise ApiError(400, str(e), param=name or param, code=TOO_LONG if long else None) from None
            if i % BREATH == BREATH - 1:
                await asyncio.sleep(0)
        return cls(state, jobs, shape)

    async def start(self, request: Request) -> None:
        """Queue them."""
        self._running = request.scope["state"].get("running")
        for job in self.jobs:
            self._streams.append(await self._state.engine.submit(job))

    async def abort(self) -> None:
        """End what has not ended."""
        await self._state.engine.abort([job.request_id for job in self.jobs])

    async def results(self, request: Request) -> list[RequestOutput]:
        """Queue them and wait; the last output of each. Ends them when the client hangs up. Raises ApiError when one fails."""
        async with until_gone(request.receive, self.abort):
            await self.start(request)
            return await self.wait()

    async def wait(self) -> list[RequestOutput]:
        """The last output of each that was started. Raises ApiError when one fails."""
        outputs = await asyncio.gather(*(last(stream) for stream in self._streams))
        for error in map(self._error, outputs):
            if error is not None:
                raise error
        return outputs

    async def deltas(self) -> AsyncIterator[tuple[int, RequestOutput]]:
        """(prompt, output) of those that were started, as they come. Raises ApiError when one fails."""
        if len(self._streams) == 1:
            async for output in self._streams[0]:
                error = self._error(output)
                if error is None or _reopened(output):
                    yield 0, output
                if error is not None:
                    raise error
            return
        queue: asyncio.Queue[tuple[int, RequestOutput]] = asyncio.Queue()
        pumps = [asyncio.create_task(_pump(i, stream, queue)) for i, stream in enumerate(self._streams)]
        left = len(pumps)
        try:
            while left:
                index, output = await queue.get()
                left -= output.finished
                error = self._error(output)
                if error is None or _reopened(output):
                    yield index, output
                if error is not None:
                    raise error
        finally:
            for pump in pumps:
                pump.cancel()

    def _error(self, output: RequestOutput) -> ApiError | None:
        """What to tell for an output that failed, or that the server cut off: at a deadline, or at the end of a drain."""
        if self._running is not None and self._running.why is not None and _cut(output):
            return self._running.why
        for one in output.outputs:
            if one.finish_reason != "error":
                continue
            said = output.error or "the request failed in the engine."
            if said.startswith("structured_outputs"):  # found only beside the model: what was asked for cannot be written
                return misshapen(said, self._shape)
            return ApiError(503, said, code="shutting_down" if said == SHUTTING_DOWN else "engine_error", headers=AGAIN)
        return None


def _cut(output: RequestOutput) -> bool:
    """Whether a completion was ended from outside."""
    return any(one.finish_reason == "abort" for one in output.outputs)


def _reopened(output: RequestOutput) -> bool:
    """Whether completions were ended from outside, whose last text is to be told: they have not ended by themselves."""
    cut = [one for one in output.outputs if one.finish_reason == "abort"]
    for one in cut:
        one.finish_reason = None
    return bool(cut)


async def _pump(index: int, stream: Stream, queue: asyncio.Queue[tuple[int, RequestOutput]]) -> None:
    async for output in stream:
        queue.put_nowait((index, output))


async def last(stream: Stream) -> RequestOutput:
    """What the stream ends with."""
    async for output in stream:
        found = output
    return found


class Meter:
    """Counts what a request used."""

    def __init__(self, jobs: Sequence[Job]) -> None:
        self._prompt = sum(len(job.prompt_token_ids) for job in jobs)
        self._cached: dict[int, int] = {}
        self._output = 0

    def add(self, prompt: int, output: RequestOutput) -> None:
        """An output, whole or what is new."""
        self._cached[prompt] = output.num_cached_tokens
        for one in output.outputs:
            self._output += len(one.token_ids)

    @property
    def usage(self) -> Usage:
        cached = CachedTokens(sum(self._cached.values()))
        return Usage(self._prompt, self._output, self._prompt + self._output, cached)
