"""`/generate`: text or tokens in, text and tokens out, with SGLang's names."""

from __future__ import annotations

import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from lockstep.frontend.outputs import CompletionOutput, RequestOutput
from lockstep.protocol import RequestOutputKind, SamplingParams
from lockstep.server.batch import Batch, request_id, routing
from lockstep.server.errors import ApiError
from lockstep.server.logprobs import least
from lockstep.server.routes.parsed import ParsedRoute
from lockstep.server.sampling import sampling_params
from lockstep.server.schemas.common import SamplingFields, StructuredOutputsFields
from lockstep.server.schemas.generate import GenerateRequest
from lockstep.server.schemas.wire import encode
from lockstep.server.sse import DOCUMENTED, EventStream, event
from lockstep.server.state import ServerState, State

router = APIRouter(tags=["generate"], route_class=ParsedRoute)
SAME = (
    *("n", "temperature", "top_p", "top_k", "min_p", "seed", "stop", "stop_token_ids", "ignore_eos", "skip_special_tokens"),
    *("presence_penalty", "frequency_penalty", "repetition_penalty", "logit_bias"),
)


@router.post("/generate", response_model=None, responses=DOCUMENTED)
async def generate(body: GenerateRequest, state: State, request: Request) -> Response:
    """Continue each prompt. A stream's events hold all text so far."""
    if (body.text is None) == (body.input_ids is None):
        raise ApiError(400, "give either text or input_ids.", param="text")
    started_s = time.monotonic()
    fields = as_fields(body)
    name = request_id(request, body.rid)
    options = routing(request, fields) | {"shape": shaped_by(body)}
    batch = await Batch.make(state, body.prompts(), sampling(state, body, fields), param="text", response_id=name, **options)

    def shown(output: RequestOutput, which: list[CompletionOutput], prompt: int) -> list[dict[str, Any]]:
        return [answer(output, one, f"{name}-{prompt}" if body.several else name, started_s) for one in which]

    if not body.stream:
        answers = [one for i, output in enumerate(await batch.results(request)) for one in shown(output, output.outputs, i)]
        return Response(encode(answers if body.several or len(answers) > 1 else answers[0]), media_type="application/json")

    async def events() -> AsyncIterator[bytes]:
        ended = set[tuple[int, int]]()  # (prompt, completion): their ends have been told
        async for i, output in batch.deltas():
            new = [one for one in output.outputs if (i, one.index) not in ended]
            ended.update((i, one.index) for one in new if one.finished)
            for one in shown(output, new, i):
                yield event(one | ({"index": i} if body.several else {}))

    await batch.start(request)
    return EventStream(events(), batch.abort)


def shaped_by(body: GenerateRequest) -> str:
    """The field that says what the output must look like."""
    given = body.sampling_params
    return f"sampling_params.{next((name for name in ('json_schema', 'regex', 'ebnf') if getattr(given, name) is not None), 'json_schema')}"


def as_fields(body: GenerateRequest) -> SamplingFields:
    """The same in the names of the other endpoints."""
    given = body.sampling_params
    fields: dict[str, Any] = {name: getattr(given, name) for name in SAME}
    fields |= {"min_tokens": given.min_new_tokens, "include_stop_str_in_output": given.no_stop_trim}
    fields |= {"priority": body.priority, "session_id": body.session_id, "data_parallel_rank": body.data_parallel_rank}
    shape = {"json": given.json_schema, "regex": given.regex, "grammar": given.ebnf}
    chosen = {name: value for name, value in shape.items() if value is not None}
    if chosen:
        fields["structured_outputs"] = StructuredOutputsFields.model_validate(chosen)
    return SamplingFields(**fields)


def sampling(state: ServerState, body: GenerateRequest, fields: SamplingFields) -> SamplingParams:
    """How the engine is to run it."""
    more: dict[str, Any] = {"max_tokens": body.sampling_params.max_new_tokens}
    more["output_kind"] = RequestOutputKind.CUMULATIVE if body.stream else RequestOutputKind.FINAL_ONLY
    if body.return_logprob:
        more["logprobs"] = body.top_logprobs_num or 0
    return sampling_params(state, fields, **more)


def answer(output: RequestOutput, one: CompletionOutput, name: str, started_s: float) -> dict[str, Any]:
    """One completion."""
    about: dict[str, Any] = {
        "id": name,
        "finish_reason": reason(one),
        "prompt_tokens": len(output.prompt_token_ids),
        "completion_tokens": len(one.token_ids),
        "cached_tokens": output.num_cached_tokens,
        "e2e_latency": time.monotonic() - started_s,
    }
    if one.logprobs is not None:
        rows = [[(least(p.logprob), token, p.decoded_token) for token, p in position.items()] for position in one.logprobs]
        about["output_token_logprobs"] = [row[0] for row in rows]
        about["output_top_logprobs"] = rows
    return {"text": one.text, "output_ids": one.token_ids, "meta_info": about}


def reason(one: CompletionOutput) -> dict[str, Any] | None:
    """Why it ended; None: it has not."""
    if one.finish_reason is None:
        return None
    if one.finish_reason == "length":
        return {"type": "length", "length": len(one.token_ids)}
    return {"type": one.finish_reason, "matched": one.stop_reason}
