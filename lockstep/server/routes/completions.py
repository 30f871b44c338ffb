"""`/v1/completions`."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response
from msgspec import UNSET

from lockstep.frontend.outputs import CompletionOutput, RequestOutput
from lockstep.frontend.tokenizer import decoder_of
from lockstep.protocol import RequestOutputKind, SamplingParams
from lockstep.server.batch import Batch, Meter, prepared, request_id, routing
from lockstep.server.errors import ApiError
from lockstep.server.logprobs import LogprobWriter, joined, prompt_positions
from lockstep.server.pace import Pace
from lockstep.server.routes.models import check_model
from lockstep.server.routes.parsed import ParsedRoute
from lockstep.server.sampling import sampling_params
from lockstep.server.schemas.completions import CompletionRequest
from lockstep.server.schemas.wire import Completion, CompletionChoice, CompletionLogprobs, Usage, encode
from lockstep.server.sse import DOCUMENTED, EventStream, event
from lockstep.server.state import ServerState, State
from lockstep.server.text_offsets import TextOffsets

router = APIRouter(prefix="/v1", tags=["completions"], route_class=ParsedRoute)


@router.post("/completions", response_model=None, responses=DOCUMENTED)
async def completions(body: CompletionRequest, state: State, request: Request) -> Response:
    """Continue each prompt."""
    check_model(state, body.model)
    answer = Answer(state, body, request_id(request, body.request_id))
    prompts = [await prepared(state, prompt, body, max_tokens=body.max_tokens) for prompt in body.prompts()]
    answer.batch = await Batch.make(state, prompts, answer.sampling(), response_id=answer.id, **routing(request, body))
    if body.stream:
        await answer.batch.start(request)
        return EventStream(answer.events(), answer.batch.abort)
    return Response(encode(answer.whole(await answer.batch.results(request))), media_type="application/json")


class Answer:
    """What is said to one request."""

    batch: Batch

    def __init__(self, state: ServerState, body: CompletionRequest, name: str) -> None:
        """Raises ApiError for fields that contradict each other."""
        self._state, self._body = state, body
        self.id, self._created_s = f"cmpl-{name}", int(time.time())
        self._n = body.n or 1
        self._best_of = body.best_of or self._n
        self._writer = LogprobWriter(state.engine.tokenizer, as_ids=bool(body.return_tokens_as_token_ids))
        self._offsets: dict[int, TextOffsets] = {}  # of each choice that has log-probabilities
        if self._best_of < self._n:
            raise ApiError(400, f"best_of={body.best_of} is less than n={self._n}: the best n of best_of are told.", param="best_of")
        if self._best_of > self._n and body.stream:
            raise ApiError(
                400, "best_of cannot be streamed: which ones are best is known at the end. Set stream or best_of.", param="best_of"
            )
        if body.max_tokens == 0 and not body.echo:
            raise ApiError(400, "max_tokens=0 asks for nothing without echo: give at least 1, or echo.", param="max_tokens")

    def sampling(self) -> SamplingParams:
        """How the engine is to run it."""
        body = self._body
        more: dict[str, Any] = {"n": self._best_of, "max_tokens": 1 if body.max_tokens == 0 else body.max_tokens}
        more["output_kind"] = RequestOutputKind.DELTA if body.stream else RequestOutputKind.FINAL_ONLY
        more["logprobs"] = 0 if body.logprobs is None and self._best_of > self._n else body.logprobs
        if body.echo and body.logprobs is not None and body.prompt_logprobs is None:
            more["prompt_logprobs"] = body.logprobs
        return sampling_params(self._state, body, **more)

    def whole(self, outputs: list[RequestOutput]) -> Completion:
        """The response."""
        meter, choices = Meter(self.batch.jobs), []
        for i, output in enumerate(outputs):
            if self._body.max_tokens == 0:
                output.outputs = [nothing(one) for one in output.outputs]
            meter.add(i, output)
            best = sorted(output.outputs, key=mean_logprob, reverse=True)[: self._n] if self._best_of > self._n else output.outputs
            for index, one in enumerate(best):
                choices.append(self._choice(output, one, i * self._n + index, first=True))
        return self._completion(choices, meter.usage)

    async def events(self) -> AsyncIterator[bytes]:
        """The response as events."""
        body, meter = self._body, Meter(self.batch.jobs)
        options = body.stream_options
        last, always = bool(options and options.include_usage), bool(options and options.continuous_usage_stats)
        pace, begun = Pace(body.stream_interval or 1), set[int]()
        async for prompt, output in self.batch.deltas():
            if body.max_tokens == 0:
                output.outputs = [nothing(one) for one in output.outputs]
            meter.add(prompt, output)
            choices = []
            for one in output.outputs:
                index = prompt * self._n + one.index
                ready = pace.take(index, one)
                if ready is not None:
                    choices.append(self._choice(output, ready, index, first=index not in begun))
                    begun.add(index)
            if choices:
                chunk = self._completion(choices, meter.usage if always else None)
                yield event(chunk if always or last else without_usage(chunk))
        if last:
            yield event(self._completion([], meter.usage))

    def _completion(self, choices: list[CompletionChoice], usage: Usage | None) -> Completion:
        made, fingerprint = self._created_s, self._state.fingerprint
        return Completion(
            id=self.id,
            created=made,
            model=self._state.name_of(self._body.model),
            choices=choices,
            usage=usage,
            system_fingerprint=fingerprint,
        )

    def _choice(self, output: RequestOutput, one: CompletionOutput, index: int, *, first: bool) -> CompletionChoice:
        """A choice, or what is new of it. first: nothing was told of it before."""
        body, text = self._body, one.text
        prompt = self._prompt_text(output) if body.echo and first else None
        logprobs = None
        if body.logprobs is not None and one.logprobs is not None:
            logprobs = self._logprobs(output, one, index, prompt)
        choice = CompletionChoice(
            index=index, text=(prompt or "") + text, logprobs=logprobs, finish_reason=one.finish_reason, stop_reason=one.stop_reason
        )
        if body.return_token_ids:
            choice.token_ids = one.token_ids
            if first:
                choice.prompt_token_ids = output.prompt_token_ids
        if body.prompt_logprobs is not None and first:
            choice.prompt_logprobs = prompt_positions(output.prompt_logprobs)
        return choice

    def _logprobs(self, output: RequestOutput, one: CompletionOutput, index: int, prompt: str | None) -> CompletionLogprobs:
        """prompt: what is echoed before this part of the choice; None: nothing is."""
        ids = output.prompt_token_ids
        if index not in self._offsets:
            special = self._body.skip_special_tokens is False
            self._offsets[index] = TextOffsets(self._state.engine.tokenizer, begin=len(prompt or ""), context=ids, special=special)
        written = self._writer.completion(one.logprobs or [], self._offsets[index])
        if prompt is None:
            return written
        return joined(self._writer.prompt(ids, output.prompt_logprobs or [None], prompt), written)

    def _prompt_text(self, output: RequestOutput) -> str:
        if output.prompt is not None:
            return output.prompt
        return decoder_of(self._state.engine.tokenizer, skip_special_tokens=False)(output.prompt_token_ids)


def mean_logprob(one: CompletionOutput) -> float:
    """By which completions of different lengths are compared."""
    return (one.cumulative_logprob or 0.0) / max(1, len(one.token_ids))


def nothing(one: CompletionOutput) -> CompletionOutput:
    """A completion of no tokens: of max_tokens=0, for which the engine had to make one."""
    ended = one.finish_reason and ("length" if one.finish_reason == "stop" else one.finish_reason)
    return CompletionOutput(one.index, logprobs=None if one.logprobs is None else [], finish_reason=ended)


def without_usage(chunk: Completion) -> Completion:
    """A chunk of a stream whose client did not ask for usage."""
    chunk.usage = UNSET
    return chunk
