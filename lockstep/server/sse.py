"""Server-sent events: a response that is written while it is made, and stops being made when nobody reads it."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from lockstep.server.errors import as_api_error, body_of
from lockstep.server.schemas.wire import encode

DONE = b"data: [DONE]\n\n"
DIRECT = "lockstep.send"  # in a scope: the server's own `send`, around which no middleware is


def event(value: Any) -> bytes:
    """A value as an event."""
    return b"data: " + encode(value) + b"\n\n"


def named_event(kind: str, value: Any) -> bytes:
    """A value as an event of a kind."""
    return b"event: " + kind.encode() + b"\ndata: " + encode(value) + b"\n\n"


def error_event(error: Exception) -> bytes:
    """An exception as an event; its status went out with the headers, so it stands in the body."""
    known = as_api_error(error)
    return event(body_of(known.status, known.message, known.param, known.code))


async def gone(receive: Receive) -> None:
    """Returns when the client hangs up."""
    while (await receive())["type"] != "http.disconnect":
        pass


@contextlib.asynccontextmanager
async def until_gone(receive: Receive, abort: Callable[[], Awaitable[None]]) -> AsyncIterator[None]:
    """Inside, `abort` is called when the client hangs up; and at the end in any case, so that nothing is left running."""

    async def watch() -> None:
        await gone(receive)
        await abort()

    watcher = asyncio.create_task(watch())
    try:
        yield
    finally:
        watcher.cancel()
        await abort()


# For OpenAPI: what a route answers that can stream. Of events the schema is of each (so before 3.2 of the specification).
_EVENT = {"type": "object", "properties": {"event": {"type": "string"}, "data": {"type": "string"}}, "required": ["data"]}
DOCUMENTED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {"schema": _EVENT}}}}


class EventStream(Response):
    """Writes the events of an iterator, then [DONE]. An exception on the way becomes an event."""

    media_type = "text/event-stream"

    def __init__(
        self,
        events: AsyncIterator[bytes],
        abort: Callable[[], Awaitable[None]],
        *,
        done: bytes = DONE,
        headers: Mapping[str, str] | None = None,
    ) -> None:
        """abort: ends what makes the events; called when the client hangs up, and at the end."""
        self.background = None
        self.status_code = 200
        self.init_headers({"cache-control": "no-cache", "x-accel-buffering": "no", **(headers or {})})
        self._events, self._abort, self._done = events, abort, done

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        async with until_gone(receive, self._abort):
            await send({"type": "http.response.start", "status": self.status_code, "headers": self.raw_headers})
            await asyncio.create_task(self._write(scope.get(DIRECT, send)))
            await send({"type": "http.response.body", "body": self._done, "more_body": False})

    async def _write(self, send: Send) -> None:
        """The events. In a task of its own, and past the middleware, which looks at how an answer begins and ends: for each
        token both would walk through a dozen frames, a sixth of what a token costs in all."""
        try:
            async for chunk in self._events:
                await send({"type": "http.response.body", "body": chunk, "more_body": True})
        except Exception as e:
            await send({"type": "http.response.body", "body": error_event(e), "more_body": True})
