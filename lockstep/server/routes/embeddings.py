"""`/v1/embeddings`: the vectors of texts, from the hidden states of the model that is served."""

from __future__ import annotations

import asyncio
import base64
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import Response

from lockstep.frontend.embedding import NO_TEXT, check_dimensions, finish
from lockstep.frontend.inputs import Job
from lockstep.frontend.outputs import RequestOutput
from lockstep.frontend.streams import Stream
from lockstep.server.batch import BREATH
from lockstep.server.errors import TOO_LONG, ApiError
from lockstep.server.routes.models import check_model
from lockstep.server.routes.parsed import ParsedRoute
from lockstep.server.schemas.embeddings import EmbeddingRequest, EmbeddingResponse
from lockstep.server.sse import until_gone
from lockstep.server.state import ServerState, State

router = APIRouter(prefix="/v1", tags=["embeddings"], route_class=ParsedRoute)


@router.post("/embeddings", response_model=EmbeddingResponse)
async def embeddings(body: EmbeddingRequest, state: State, request: Request) -> Response:
    """A vector for each input, scaled to length 1 unless `normalize` is false."""
    check_model(state, body.model)
    try:
        check_dimensions(body.dimensions, state.engine.spec.hidden_size)
    except ValueError as e:
        raise ApiError(400, str(e), param="dimensions") from None
    jobs = await _jobs(body, state)

    async def abort() -> None:
        await state.engine.abort([job.request_id for job in jobs])

    async with until_gone(request.receive, abort):
        streams = [await state.engine.submit(job) for job in jobs]
        vectors = [await _vector(stream) for stream in streams]
    tokens = sum(len(job.prompt_token_ids) for job in jobs)
    answer = {"object": "list", "model": body.model or state.model, "usage": {"prompt_tokens": tokens, "total_tokens": tokens}}
    return Response(await asyncio.to_thread(_render, answer, vectors, body), media_type="application/json")


def _render(answer: dict[str, Any], vectors: list[bytes], body: EmbeddingRequest) -> bytes:
    """The response's JSON. It may be megabytes of digits: not for the event loop."""
    forms: list[list[float] | str] = []
    for vector in vectors:
        values = finish(vector, dimensions=body.dimensions, normalize=body.normalize is not False)
        forms.append(values.tolist() if body.encoding_format != "base64" else base64.b64encode(values.astype("<f4").tobytes()).decode())
    data = [{"object": "embedding", "index": index, "embedding": form} for index, form in enumerate(forms)]
    return msgspec.json.encode({**answer, "data": data})


async def _jobs(body: EmbeddingRequest, state: ServerState) -> list[Job]:
    """A job for each input, all of them checked before the first is queued. Raises ApiError for the first that cannot be."""
    prompts = body.prompts()
    jobs = []
    for index, prompt in enumerate(prompts):
        try:
            jobs.append(await state.engine.job(prompt, NO_TEXT, priority=body.priority or 0, pooling=body.pooling or "last"))
        except ValueError as e:
            said = str(e) if len(prompts) == 1 else f"input[{index}]: {e}"
            raise ApiError(400, said, param="input", code=TOO_LONG if "max_model_len" in said else None) from None
        if index % BREATH == BREATH - 1:
            await asyncio.sleep(0)
    return jobs


async def _vector(stream: Stream) -> bytes:
    last: RequestOutput | None = None
    async for output in stream:
        last = output
    assert last is not None, "a stream ends with an output"
    if last.embedding is None:
        raise ApiError(503, last.error or "the request was aborted: the server is shutting down.", code="engine_error")
    return last.embedding
