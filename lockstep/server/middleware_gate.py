"""The gate before the routes that generate: closed while the server drains, narrow while it is full, and every request has an end.

A request that is to end early, at its deadline or at the end of a drain, ends as well as it still can: an error, where its
response has not begun; else its jobs are aborted, and the stream ends with that error (`batch.Batch`).
"""

from __future__ import annotations

import asyncio
import math
from typing import TYPE_CHECKING, Any

from starlette._utils import get_route_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lockstep.frontend.streams import submitted
from lockstep.server.admission import Busy, NeverFits, Ticket
from lockstep.server.admission_cost import characters_of, cost_of, ids_of
from lockstep.server.errors import TOO_LONG, ApiError, respond

if TYPE_CHECKING:
    from lockstep.server.state import ServerState

GENERATES = frozenset(
    {
        *("/v1/completions", "/v1/chat/completions", "/v1/responses", "/v1/embeddings", "/v1/messages"),
        *("/generate", "/completion", "/invocations", "/pooling", "/embeddings"),
    }
)
READINESS = frozenset({"/readyz", "/ready"})
GRACE_S = 5.0  # for a stream whose jobs were aborted to say so
AGAIN_S = 5  # when to come back to a server that is going: its successor's time


class Running:
    """A request that passed the gate and has not ended. At `scope["state"]["running"]`, for the route."""

    def __init__(self, state: ServerState, ticket: Ticket, limit_s: float) -> None:
        self._state, self._ticket = state, ticket
        self.jobs: list[str] = []  # that its route has submitted
        self.begun = False  # its response
        self.why: ApiError | None = None  # it was stopped
        self.timeout = asyncio.timeout(None)
        self._task: asyncio.Task[None] | None = None
        late = ApiError(504, f"the request was not done in {limit_s:g} s, its deadline.", code="deadline_exceeded")
        self._timer = asyncio.get_running_loop().call_later(limit_s, self.stop, late)
        state.running.add(self)

    def goes_on(self, task: asyncio.Task[None]) -> None:
        """The request ends with this task, not with its response: its place, its deadline and the drain are the task's."""
        self._task = task
        task.add_done_callback(lambda _: self._end())

    def answered(self) -> None:
        """Its response has ended, and so has it, unless it goes on."""
        if self._task is None:
            self._end()

    def _end(self) -> None:
        self._timer.cancel()
        self._state.running.discard(self)
        self._ticket.leave()

    def stop(self, why: ApiError) -> None:
        """End it early. May be called twice; the first reason counts."""
        if self.why is not None:
            return
        self.why, now_s = why, asyncio.get_running_loop().time()
        if self._task is not None:
            self._task.cancel()
            return
        self.timeout.reschedule(now_s + GRACE_S if self.begun else now_s)
        if self.begun:
            self._state.background(self._state.engine.abort(list(self.jobs)))


class Gate:
    """See above. Keeps `state.running` and `state.admission`."""

    def __init__(self, app: ASGIApp, state: ServerState) -> None:
        self._app, self._state = app, state

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        path = get_route_path(scope) if scope["type"] == "http" else ""
        try:
            if self._state.draining and (path in GENERATES or path in READINESS):
                raise ApiError(
                    503,
                    "the server is shutting down: ask another one, or again in a moment.",
                    code="draining",
                    headers={"retry-after": str(AGAIN_S), "connection": "close"},
                )
            if path not in GENERATES or scope["method"] != "POST":
                await self._app(scope, receive, send)
                return
            body = scope["state"].get("json")
            self._check_ids(body)
            self._check_characters(body)
            limit_s, ticket = self._limit_s(scope, body), self._admit(scope, body)
        except ApiError as e:
            await respond(e)(scope, receive, send)
            return
        await self._run(ticket, limit_s, scope, receive, send)

    def _admit(self, scope: Scope, body: Any) -> Ticket:
        state = self._state
        key = scope["state"].get("client_key") or (scope.get("client") or ("local",))[0]
        try:
            return state.admission.admit(cost_of(body, state.max_model_len), key)
        except Busy as e:
            raise ApiError(429, str(e), code="queue_full", headers={"retry-after": str(e.retry_after_s)}) from None
        except NeverFits as e:
            param = "n" if isinstance(body, dict) and body.get("n") not in (None, 1) else None
            raise ApiError(400, str(e), param=param, code="request_too_large") from None

    def _check_ids(self, body: Any) -> None:
        """No token ids are looked at that are more than fit, but for those that are to be cut."""
        name, count = ids_of(body)
        if count > self._state.max_model_len and not body.get("truncate_prompt_tokens"):
            message = f"the prompt has {count} token ids, more than max_model_len={self._state.max_model_len}: shorten it."
            raise ApiError(400, message, param=name, code=TOO_LONG)

    def _check_characters(self, body: Any) -> None:
        """No text is tokenized that could not fit even if every token of it were the longest there is; of one that is to be cut
        (truncate_prompt_tokens), no more than /tokenize takes.
        """
        state, length = self._state, characters_of(body)
        if length > state.most_characters:
            cut, most = isinstance(body, dict) and body.get("truncate_prompt_tokens"), state.options.max_tokenize_characters
            if not cut:
                message = f"the prompt has {length} characters, more than {state.most_characters}, all that could fit: shorten it."
                raise ApiError(400, message, param="prompt", code=TOO_LONG)
            if length > most:
                message = f"the prompt has {length} characters, more than max_tokenize_characters={most}, though only its end is taken"
                raise ApiError(400, f"{message} (truncate_prompt_tokens): shorten it.", param="prompt", code=TOO_LONG)

    def _limit_s(self, scope: Scope, body: Any) -> float:
        """Seconds that the request has: what it asks for, and no more than the server allows."""
        limit_s = self._state.options.request_timeout
        named = next((value.decode("latin-1") for name, value in scope["headers"] if name == b"x-request-timeout"), None)
        if named is not None:
            limit_s = min(limit_s, _seconds(named, "X-Request-Timeout"))
        asked = body.get("timeout") if isinstance(body, dict) else None
        return limit_s if asked is None else min(limit_s, _seconds(asked, "timeout"))

    async def _run(self, ticket: Ticket, limit_s: float, scope: Scope, receive: Receive, send: Send) -> None:
        running = scope["state"]["running"] = Running(self._state, ticket, limit_s)
        token = submitted.set(running.jobs)

        async def watched(message: Message) -> None:
            running.begun = True
            await send(message)

        try:
            async with running.timeout:
                await self._app(scope, receive, watched)
        except TimeoutError:
            if running.why is None:
                raise  # somebody else's
            if not running.begun:
                await respond(running.why)(scope, receive, send)
        finally:
            running.answered()
            submitted.reset(token)


def _seconds(value: Any, name: str) -> float:
    try:
        seconds = math.nan if isinstance(value, bool) else float(value)
    except (TypeError, ValueError, OverflowError):
        seconds = math.nan
    if not (math.isfinite(seconds) and seconds > 0):
        raise ApiError(400, f"{name}={str(value)[:40]!r} is no time limit: give seconds above 0.", param=name)
    return seconds
