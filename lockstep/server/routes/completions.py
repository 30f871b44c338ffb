"""`/v1/completions`."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import msgspec
from fastapi import APIRouter
from fastapi.responses import StreamingResponse
from pydantic import BaseModel

from lockstep.protocol import RequestOutputKind, SamplingParams
from lockstep.server.routes.models import check_model
from lockstep.server.state import State

router = APIRouter(prefix="/v1", tags=["completions"])


class CompletionRequest(BaseModel):
    model: str | None = None
    prompt: str | list[int]
    max_tokens: int | None = 16
    temperature: float = 1.0
    stream: bool = False


@router.post("/completions", response_model=None)
async def completions(body: CompletionRequest, state: State) -> Any:
    check_model(state, body.model)
    kind = RequestOutputKind.DELTA if body.stream else RequestOutputKind.FINAL_ONLY
    sampling = SamplingParams(max_tokens=body.max_tokens, temperature=body.temperature, output_kind=kind)
    job = await state.engine.job(body.prompt, sampling)
    stream = await state.engine.submit(job)
    if body.stream:

        async def events() -> AsyncIterator[bytes]:
            try:
                async for output in stream:
                    for one in output.outputs:
                        data = {"choices": [{"index": one.index, "text": one.text, "finish_reason": one.finish_reason}]}
                        yield b"data: " + msgspec.json.encode(data) + b"\n\n"
                yield b"data: [DONE]\n\n"
            finally:
                await state.engine.abort([job.request_id])

        return StreamingResponse(events(), media_type="text/event-stream")
    async for output in stream:
        choices = [{"index": one.index, "text": one.text, "finish_reason": one.finish_reason} for one in output.outputs]
    return {"id": f"cmpl-{job.request_id}", "object": "text_completion", "model": state.model, "choices": choices}
