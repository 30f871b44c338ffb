"""Bodies within their bounds: read whole before a route runs, counted as they come, and parsed once, for all that comes after."""

from __future__ import annotations

import asyncio
from typing import Any

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lockstep.server.body_json import parse
from lockstep.server.errors import ApiError, respond

LONG_BYTES = 256 << 10  # longer bodies are looked through beside the event loop
LINGER_S, LINGER_BYTES = 2.0, 64 << 20  # for a client to finish sending what is refused: it reads the answer only then


class Bodies:
    """Reads each request's body, checks it, and hands it on in one piece; as `scope["state"]["json"]` too, parsed."""

    def __init__(self, app: ASGIApp, most_bytes: int) -> None:
        self._app, self._most = app, most_bytes
        self._one_long = asyncio.Lock()  # for the others there is time between two of them

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _has_body(scope):
            await self._app(scope, receive, send)
            return
        try:
            body = await self._read(scope, receive)
            if body is None:
                return  # the client has gone
            if body:
                scope["state"]["json"] = parse(body) if len(body) <= LONG_BYTES else await self._parse_long(body)
        except ApiError as e:
            await respond(e)(scope, receive, send)
            return
        await self._app(scope, _replay(body, receive), send)

    async def _parse_long(self, body: bytes) -> Any:
        """In a thread, which lets the event loop go on between its calls."""
        async with self._one_long:
            return await asyncio.to_thread(parse, body)

    async def _read(self, scope: Scope, receive: Receive) -> bytes | None:
        announced = _header(scope, b"content-length")
        if announced.isdigit() and int(announced) > self._most:
            if not _header(scope, b"expect"):
                await _linger(receive)
            raise self._too_long()
        parts, total, more = [], 0, True
        while more:
            message = await receive()
            if message["type"] == "http.disconnect":
                return None
            part, more = message.get("body", b""), message.get("more_body", False)
            total += len(part)
            if total > self._most:
                if more:
                    await _linger(receive)
                raise self._too_long()
            parts.append(part)
        return parts[0] if len(parts) == 1 else b"".join(parts)

    def _too_long(self) -> ApiError:
        message = f"the body is longer than max_body_bytes={self._most}: send less at once."
        return ApiError(413, message, code="body_too_long", headers={"connection": "close"})


def _has_body(scope: Scope) -> bool:
    """Whether one was announced. (One that was not is none in HTTP.)"""
    return scope["method"] not in ("GET", "HEAD", "OPTIONS") or bool(
        _header(scope, b"content-length") or _header(scope, b"transfer-encoding")
    )


def _header(scope: Scope, name: bytes) -> bytes:
    return next((value for key, value in scope["headers"] if key == name), b"")


async def _linger(receive: Receive) -> None:
    """Let the client send on, for a while and into nothing: one that is cut off while it sends never reads why."""
    total = 0
    try:
        async with asyncio.timeout(LINGER_S):
            while total < LINGER_BYTES:
                message = await receive()
                total += len(message.get("body", b""))
                if not message.get("more_body", False):
                    return
    except TimeoutError:
        return


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives the body, then what comes after it: the client's going."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
