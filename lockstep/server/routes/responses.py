"""`/v1/responses`: text and calls of functions. Nothing is stored unless it is asked for."""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import AsyncIterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import Response

from lockstep.frontend.outputs import RequestOutput
from lockstep.protocol import FinishReason
from lockstep.server.batch import Meter, request_id, routing
from lockstep.server.errors import ApiError, as_api_error
from lockstep.server.middleware_gate import Running
from lockstep.server.response_events import ResponseEvents
from lockstep.server.response_items import chat_of, message_of, messages_of, new_id, output_of
from lockstep.server.response_store import Stored
from lockstep.server.routes.chat import ChatAnswer
from lockstep.server.routes.models import check_model
from lockstep.server.routes.parsed import ParsedRoute
from lockstep.server.sampling import refuse
from lockstep.server.schemas.chat import Message
from lockstep.server.schemas.responses import Item, NamedTool, ResponsesRequest
from lockstep.server.schemas.wire import Usage, encode
from lockstep.server.sse import DOCUMENTED, EventStream
from lockstep.server.state import ServerState, State

router = APIRouter(prefix="/v1", tags=["responses"], route_class=ParsedRoute)


@router.post("/responses", response_model=None, responses=DOCUMENTED)
async def responses(body: ResponsesRequest, state: State, request: Request) -> Response:
    """Answer an input."""
    check_model(state, body.model)
    if body.background and (not body.store or body.stream):
        raise ApiError(400, "background=true needs store=true and no stream: the response is fetched later by its id.", param="background")
    previous = body.previous_response_id
    before = state.responses.get(previous, "previous_response_id").messages if previous else []
    request_id(request, body.request_id)
    answer = ResponseAnswer(state, body, before)
    await answer.chat.prepare(**routing(request, body))
    if body.stream:
        await answer.chat.batch.start(request)
        return EventStream(answer.events(), answer.chat.batch.abort, done=b"")
    if body.background:
        return told(await answer.in_background(request))
    output = (await answer.chat.batch.results(request))[0]
    return told(answer.finished(output))


@router.get("/responses/{name}", response_model=None)
async def stored(name: str, state: State) -> Response:
    """A stored response as it is now."""
    return told(state.responses.get(name).response)


@router.delete("/responses/{name}", response_model=None)
async def delete(name: str, state: State) -> dict[str, Any]:
    """Forget a stored response; one that runs is ended."""
    task = state.responses.get(name).task
    if task is not None:
        task.cancel()
    state.responses.forget(name)
    return {"id": name, "object": "response", "deleted": True}


@router.post("/responses/{name}/cancel", response_model=None)
async def cancel(name: str, state: State) -> Response:
    """End a response that runs in the background."""
    found = state.responses.get(name)
    if found.task is None:
        raise ApiError(400, f"response {name[:80]!r} was not made with background=true: close its connection to end it.", param="id")
    found.task.cancel()
    with contextlib.suppress(asyncio.CancelledError):
        await found.task
    return told(state.responses.get(name).response)


def told(response: dict[str, Any]) -> Response:
    return Response(encode(response), media_type="application/json")


class ResponseAnswer:
    """What is said to one request: a conversation's answer, in items."""

    def __init__(self, state: ServerState, body: ResponsesRequest, before: list[Message]) -> None:
        """before: messages of earlier responses. Raises ApiError for what cannot be done."""
        refuse(body)
        self._state, self._body, self._before = state, body, before
        self._id, self._created_s = new_id("resp"), time.time()
        self.chat = ChatAnswer(state, chat_of(body, before), self._id)

    def response(self, status: str, output: list[dict[str, Any]] | None = None, usage: Usage | None = None, **more: Any) -> dict[str, Any]:
        """The response object."""
        body = self._body
        given = body.model_dump(include={"instructions", "max_output_tokens", "previous_response_id", "temperature", "top_p"})
        return {
            "id": self._id,
            "object": "response",
            "created_at": self._created_s,
            "status": status,
            "model": self._state.name_of(body.model),
            "output": output or [],
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"} if status == "incomplete" else None,
            **given,
            "metadata": body.metadata or {},
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "text": body.text.model_dump(exclude_none=True, by_alias=True) if body.text else {"format": {"type": "text"}},
            "tool_choice": self._choice(),
            "tools": [{"strict": None, "parameters": None, **t.model_dump(exclude_none=True)} for t in body.tools or ()],
            "truncation": "disabled",
            "store": bool(body.store),
            "background": bool(body.background),
            "usage": usage and usage_of(usage),
            **more,
        }

    def _choice(self) -> Any:
        choice = self._body.tool_choice
        return choice.model_dump() if isinstance(choice, NamedTool) else choice or ("auto" if self._body.tools else "none")

    def finished(self, output: RequestOutput) -> dict[str, Any]:
        """The response at its end; stored, if that was asked for."""
        whole = self.chat.whole(output)
        status = status_of(output.outputs[0].finish_reason)
        items = output_of(whole.choices[0].message, "incomplete" if status == "cancelled" else status)
        return self._kept(self.response(status, items, whole.usage))

    async def events(self) -> AsyncIterator[bytes]:
        """The response as events."""
        events, meter, reader = ResponseEvents(), Meter(self.chat.batch.jobs), self.chat.reader()
        yield events.event("response.created", response=self.response("in_progress"))
        yield events.event("response.in_progress", response=self.response("in_progress"))
        try:
            async for _, output in self.chat.batch.deltas():
                meter.add(0, output)
                one = output.outputs[0]
                for made in events.take(reader.read(one.text, last=one.finished)):
                    yield made
        except Exception as e:
            yield events.event("response.failed", response=self.failed(e))
            return
        status = status_of(one.finish_reason)
        for made in events.finish("incomplete" if status == "cancelled" else status):
            yield made
        response = self._kept(self.response(status, events.output, meter.usage))
        yield events.event(f"response.{'completed' if status == 'completed' else 'incomplete'}", response=response)

    async def in_background(self, request: Request) -> dict[str, Any]:
        """Start it; the response as it is now. Its result is stored, and the request ends when the response does."""
        await self.chat.batch.start(request)
        running: Running = request.scope["state"]["running"]
        first = self._kept(self.response("in_progress"))
        task = asyncio.create_task(self._run(running), name=self._id)
        self._state.responses.get(self._id).task = task
        running.goes_on(task)
        return first

    async def _run(self, running: Running) -> None:
        try:
            output = (await self.chat.batch.wait())[0]
            self.finished(output)
        except asyncio.CancelledError:
            if running.why is not None:
                self.failed(running.why)
            else:
                self._kept(self.response("cancelled"), only_known=True)
            raise
        except Exception as e:
            self.failed(e)
        finally:
            await self.chat.batch.abort()

    def failed(self, error: Exception) -> dict[str, Any]:
        """The response of a request that failed."""
        known = as_api_error(error)
        return self._kept(self.response("failed", error={"code": known.code or "server_error", "message": known.message}))

    def _kept(self, response: dict[str, Any], *, only_known: bool = False) -> dict[str, Any]:
        """The response; stored, if that was asked for. only_known: and only if it is stored already."""
        store = self._state.responses
        task = store.get(self._id).task if self._id in store else None
        if self._body.store and (self._id in store or not only_known):
            messages = [*self._before, *messages_of(self._body), *answer_messages(response["output"])]
            size = len(encode(response)) + sum(len(str(m.content)) for m in messages)
            store.put(Stored(response, messages, size, task))
        return response


def answer_messages(items: list[dict[str, Any]]) -> list[Message]:
    """An answer's items as messages for the next request; thoughts are not repeated."""
    return [message_of(i, Item.model_validate(item)) for i, item in enumerate(items) if item["type"] != "reasoning"]


def status_of(reason: FinishReason | None) -> str:
    return {"length": "incomplete", "abort": "cancelled"}.get(reason or "", "completed")


def usage_of(usage: Usage) -> dict[str, Any]:
    return {
        "input_tokens": usage.prompt_tokens,
        "input_tokens_details": {"cached_tokens": usage.prompt_tokens_details.cached_tokens, "cache_write_tokens": 0},
        "output_tokens": usage.completion_tokens,
        "output_tokens_details": {"reasoning_tokens": 0},
        "total_tokens": usage.total_tokens,
    }
