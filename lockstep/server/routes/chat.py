"""`/v1/chat/completions`."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from msgspec import UNSET

from lockstep.frontend.outputs import CompletionOutput, RequestOutput
from lockstep.protocol import RequestOutputKind, SamplingParams
from lockstep.server.batch import Batch, Meter, request_id, routing, truncated
from lockstep.server.errors import ApiError
from lockstep.server.logprobs import LogprobWriter, prompt_positions
from lockstep.server.pace import Pace
from lockstep.server.reading import Reader, merged, plan_of
from lockstep.server.routes.models import check_model
from lockstep.server.routes.parsed import ParsedRoute
from lockstep.server.sampling import sampling_params
from lockstep.server.schemas.chat import ChatRequest
from lockstep.server.schemas.wire import Chat, ChatChoice, ChatChunk, ChatLogprobs, ChatMessage, ChunkChoice, Delta, Usage, encode
from lockstep.server.sse import DOCUMENTED, EventStream, event
from lockstep.server.state import ServerState, State
from lockstep.server.talk import prompt_of

router = APIRouter(prefix="/v1", tags=["chat"], route_class=ParsedRoute)


@router.post("/chat/completions", response_model=None, responses=DOCUMENTED)
async def chat_completions(body: ChatRequest, state: State, request: Request) -> Response:
    """Answer a conversation."""
    check_model(state, body.model)
    answer = ChatAnswer(state, body, f"chatcmpl-{request_id(request, body.request_id)}")
    await answer.prepare(**routing(request, body))
    if body.stream:
        await answer.batch.start(request)
        return EventStream(answer.events(), answer.batch.abort)
    output = (await answer.batch.results(request))[0]
    return Response(encode(answer.whole(output)), media_type="application/json")


class ChatAnswer:
    """What is said to one request."""

    batch: Batch

    def __init__(self, state: ServerState, body: ChatRequest, name: str) -> None:
        """name: the response's id. Raises ApiError for fields that contradict each other."""
        if body.top_logprobs and not body.logprobs:
            raise ApiError(400, f"top_logprobs={body.top_logprobs} needs logprobs=true.", param="top_logprobs")
        self._state, self._body = state, body
        self._id, self._created_s = name, int(time.time())
        self._plan = plan_of(state, body)
        self._writer = LogprobWriter(state.engine.tokenizer, as_ids=bool(body.return_tokens_as_token_ids))

    async def prepare(self, **options: Any) -> None:
        """Check it, and make it ready to start. Raises ApiError."""
        sampling, body = self.sampling(), self._body
        prompt = await prompt_of(self._state, body, tools=self._plan.shows_tools)
        if body.truncate_prompt_tokens is not None:
            prompt = {
                "prompt_token_ids": truncated(self._state, prompt["prompt_token_ids"], body.truncate_prompt_tokens, sampling.max_tokens)
            }
        if body.cache_salt:
            prompt["cache_salt"] = body.cache_salt
        self.batch = await Batch.make(self._state, [prompt], sampling, param="messages", response_id=self._id, **options)

    def reader(self) -> Reader:
        """What reads one answer as it grows."""
        return Reader(self._plan)

    def sampling(self) -> SamplingParams:
        """How the engine is to run it."""
        body = self._body
        more: dict[str, Any] = {"max_tokens": body.max_completion_tokens or body.max_tokens}
        more["output_kind"] = RequestOutputKind.DELTA if body.stream else RequestOutputKind.FINAL_ONLY
        if body.logprobs:
            more["logprobs"] = body.top_logprobs or 0
        if self._plan.special_tokens:
            more["skip_special_tokens"] = False
        return sampling_params(self._state, body, self._plan.constraint, **more)

    def whole(self, output: RequestOutput) -> Chat:
        """The response."""
        meter, body = Meter(self.batch.jobs), self._body
        meter.add(0, output)
        found = Chat(
            id=self._id,
            created=self._created_s,
            model=self._state.name_of(body.model),
            choices=[self._choice(one) for one in output.outputs],
            usage=meter.usage,
            system_fingerprint=self._state.fingerprint,
        )
        if body.return_token_ids:
            found.prompt_token_ids = output.prompt_token_ids
        if body.prompt_logprobs is not None:
            found.prompt_logprobs = prompt_positions(output.prompt_logprobs)
        return found

    def _choice(self, one: CompletionOutput) -> ChatChoice:
        reader = Reader(self._plan)
        read = reader.read(one.text, last=True)
        content = "" if read.content is UNSET else read.content
        message = ChatMessage(content=content)
        if read.reasoning_content is not UNSET and self._body.include_reasoning is not False:
            message.reasoning_content = read.reasoning_content
        if read.tool_calls is not UNSET:
            message.tool_calls, message.content = merged(read.tool_calls), content or None
        choice = ChatChoice(
            index=one.index,
            message=message,
            logprobs=self._logprobs(one),
            finish_reason=reader.finish_reason(one.finish_reason),
            stop_reason=one.stop_reason,
        )
        if self._body.return_token_ids:
            choice.token_ids = one.token_ids
        return choice

    async def events(self) -> AsyncIterator[bytes]:
        """The response as events: the roles, what is new of each choice, and what was used if that was asked for."""
        body, meter, pace = self._body, Meter(self.batch.jobs), Pace(self._body.stream_interval or 1)
        options = body.stream_options
        last, always = bool(options and options.include_usage), bool(options and options.continuous_usage_stats)
        readers = [Reader(self._plan) for _ in range(body.n or 1)]
        begun = False

        def written(choices: list[ChunkChoice], usage: Usage | None = None) -> bytes:
            return event(self._chunk(choices, usage if usage else None if last or always else UNSET))

        async for _, output in self.batch.deltas():
            if not begun:
                begun = True
                first = self._chunk([ChunkChoice(index=i, delta=Delta(role="assistant", content="")) for i in range(len(readers))], UNSET)
                if last or always:
                    first.usage = meter.usage if always else None
                if body.return_token_ids:
                    first.prompt_token_ids = output.prompt_token_ids
                yield event(first)
            meter.add(0, output)
            ready = [one for new in output.outputs if (one := pace.take(new.index, new)) is not None]
            choices = [choice for one in ready if (choice := self._news(readers[one.index], one)) is not None]
            if choices:
                yield written(choices, meter.usage if always else None)
        if last:
            yield written([], meter.usage)

    def _chunk(self, choices: list[ChunkChoice], usage: Any) -> ChatChunk:
        state = self._state
        return ChatChunk(
            id=self._id,
            created=self._created_s,
            model=state.name_of(self._body.model),
            choices=choices,
            usage=usage,
            system_fingerprint=state.fingerprint,
        )

    def _news(self, reader: Reader, one: CompletionOutput) -> ChunkChoice | None:
        """What is new of a choice; None when the text that came is held back."""
        delta, body = reader.read(one.text, last=one.finished), self._body
        if body.include_reasoning is False:
            delta.reasoning_content = UNSET
        silent = delta.content is UNSET and delta.reasoning_content is UNSET and delta.tool_calls is UNSET
        if silent and not one.finished and not body.logprobs and not body.return_token_ids:
            return None
        choice = ChunkChoice(
            index=one.index, delta=delta, logprobs=self._logprobs(one), finish_reason=reader.finish_reason(one.finish_reason)
        )
        if one.finished:
            choice.stop_reason = one.stop_reason
        if body.return_token_ids:
            choice.token_ids = one.token_ids
        return choice

    def _logprobs(self, one: CompletionOutput) -> ChatLogprobs | None:
        if not self._body.logprobs or one.logprobs is None:
            return None
        return self._writer.chat(one.logprobs, self._body.top_logprobs or 0)
