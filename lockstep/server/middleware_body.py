"""Bodies within their bounds: read whole before a route runs, counted as they come, and JSON that every parser reads alike.

What a later stage would trip over is refused here: nesting that exhausts a stack, bytes that are no UTF-8, halves of surrogate
pairs, NaN, numbers beyond all ranges.
"""

from __future__ import annotations

import asyncio
import re
from typing import Any

import msgspec
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lockstep.server.errors import ApiError, respond
from lockstep.server.schemas.common import INT64

MAX_DEPTH = 64  # arrays and objects in each other
MAX_CONTAINERS = 100_000  # arrays and objects in a body
LONG_BYTES = 256 << 10  # longer bodies are looked through beside the event loop
LINGER_S, LINGER_BYTES = 2.0, 64 << 20  # for a client to finish sending what is refused: it reads the answer only then
_BRACKETS = re.compile(rb'"(?:[^"\\]++|\\.)*+"?|[\[\]{}]', re.DOTALL)
_MANY_DIGITS = re.compile(rb"\d{19}")
_HALF = re.compile(rb"\\u[dD][89abAB][0-9a-fA-F]{2}(?!\\u[dD][c-fC-F])|(?<!\\u[dD][89abAB][0-9a-fA-F]{2})\\u[dD][c-fC-F]")
_decode = msgspec.json.Decoder().decode


class Bodies:
    """Reads each request's body, checks it, and hands it on in one piece; as `scope["state"]["json"]` too, parsed."""

    def __init__(self, app: ASGIApp, most_bytes: int) -> None:
        self._app, self._most = app, most_bytes

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not _has_body(scope):
            await self._app(scope, receive, send)
            return
        try:
            body = await self._read(scope, receive)
            if body is None:
                return  # the client has gone
            if body:
                scope["state"]["json"] = await asyncio.to_thread(parse, body) if len(body) > LONG_BYTES else parse(body)
        except ApiError as e:
            await respond(e)(scope, receive, send)
            return
        await self._app(scope, _replay(body, receive), send)

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


def parse(body: bytes) -> Any:
    """The value of a JSON body. Raises ApiError 400 for what is none, or nested too deeply."""
    check_nesting(body)
    try:
        value = _decode(body)
    except (msgspec.MsgspecError, UnicodeDecodeError, RecursionError) as e:
        half = "the body's text has half of a surrogate pair (like \\ud83d alone), which is no character: send the whole pair, or UTF-8."
        message = half if _HALF.search(body) else f"the body is no valid JSON in UTF-8: {e}."
        raise ApiError(400, message, code="invalid_json") from None
    if _MANY_DIGITS.search(body):
        check_whole_numbers(value)
    return value


def check_whole_numbers(value: Any, path: str = "") -> None:
    """Raise ApiError 400 for a whole number that 64 bits cannot hold: it would pass every check that only looks for a number."""
    if isinstance(value, dict):
        for name, one in value.items():
            check_whole_numbers(one, path or name)
    elif isinstance(value, list):
        for one in value:
            check_whole_numbers(one, path)
    elif isinstance(value, int) and not -INT64 <= value < INT64:
        what = f"{path[:64]}: " if path else ""
        raise ApiError(400, f"{what}the whole number {str(value)[:24]}... is out of range: 64 bits are for it.", param=path[:64] or None)


def check_nesting(body: bytes) -> None:
    """Raise ApiError 400 for JSON of too many arrays and objects, or too deep ones; whether it is JSON at all is not looked at."""
    if body.count(b"[") + body.count(b"{") <= MAX_DEPTH:
        return
    depth, count = 0, 0
    for found in _BRACKETS.finditer(body):
        first = body[found.start()]
        if first in b"[{":
            depth, count = depth + 1, count + 1
            if depth > MAX_DEPTH:
                raise ApiError(400, f"the body's JSON is nested more than {MAX_DEPTH} deep: make it flatter.", code="json_too_deep")
            if count > MAX_CONTAINERS:
                raise ApiError(
                    400, f"the body's JSON has more than {MAX_CONTAINERS} arrays and objects: send less at once.", code="json_too_large"
                )
        elif first in b"]}":
            depth -= 1


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
