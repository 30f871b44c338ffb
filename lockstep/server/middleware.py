"""What every request passes between the socket and the routes, from the outside in:

    (counts      of every answer, whoever gives it: see `observe`)
    RequestLog   a request id on every response and log line; one access line; the last resort for exceptions
    CORS         only with --allowed-origins
    KeyCheck     no key, no route: but for liveness, readiness, startup and the page's shell
    Bodies       a body within its bounds, whole, and JSON
    Gate         requests that generate: the drain, admission, deadlines

Pure ASGI: a streamed response passes through without a copy, a queue or a task of its own.
"""

from __future__ import annotations

import hashlib
import hmac
import re
import time
import uuid
from collections.abc import Iterable
from typing import TYPE_CHECKING
from urllib.parse import quote

from fastapi import FastAPI
from starlette._utils import get_route_path
from starlette.middleware.cors import CORSMiddleware
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lockstep.observability.logging import get_logger, request_id
from lockstep.server.errors import ApiError, as_api_error, respond
from lockstep.server.middleware_body import Bodies
from lockstep.server.middleware_gate import Gate
from lockstep.server.schemas.common import GIVEN_ID

if TYPE_CHECKING:
    from lockstep.server.state import ServerState

# For GET and HEAD. /health is /livez by another name, and /ready is /readyz.
OPEN_PATHS = frozenset({"/livez", "/health", "/readyz", "/ready", "/startupz", "/", "/favicon.ico"})
# What pages of other origins may send: all that OpenAI's clients do, which tell of themselves in headers of their own.
SENT_HEADERS = (
    *("Authorization", "Content-Type", "X-Request-Id", "X-Request-Timeout", "OpenAI-Organization", "OpenAI-Project"),
    *("X-Stainless-Lang", "X-Stainless-Package-Version", "X-Stainless-OS", "X-Stainless-Arch", "X-Stainless-Runtime"),
    *("X-Stainless-Runtime-Version", "X-Stainless-Async", "X-Stainless-Retry-Count", "X-Stainless-Read-Timeout", "X-Stainless-Timeout"),
    *("X-Stainless-Helper-Method", "X-Stainless-Stream-Helper", "X-Stainless-Poll-Helper", "X-Stainless-Custom-Poll-Interval"),
    *("X-Stainless-Custom-Event-Handler", "X-Stainless-Raw-Response"),
)
OPEN_FOLDERS = ("/web/",)  # the page's own files
_given = re.compile(GIVEN_ID)
_access = get_logger("lockstep.access")


def install(app: FastAPI, state: ServerState) -> None:
    """Put everything of the table above around the routes of `app`."""
    options = state.options
    app.add_middleware(Gate, state=state)
    app.add_middleware(Bodies, most_bytes=options.max_body_bytes)
    app.add_middleware(KeyCheck, keys=options.api_key)
    if options.allowed_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=options.allowed_origins,
            allow_methods=options.allowed_methods or ("GET", "POST"),
            allow_headers=options.allowed_headers or SENT_HEADERS,
            allow_credentials=options.allow_credentials,
            expose_headers=("X-Request-Id", "Retry-After"),
        )
    app.add_middleware(RequestLog)


class RequestLog:
    """Names each request, says what became of it, and answers for exceptions that nobody else has."""

    def __init__(self, app: ASGIApp) -> None:
        self._app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self._app(scope, receive, send)
            return  # nothing here speaks anything but HTTP
        name = _given_id(scope["headers"]) or uuid.uuid4().hex
        scope.setdefault("state", {})["request_id"] = name
        token, start_s, status = request_id.set(name), time.monotonic(), 0

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                header = (b"x-request-id", scope["state"]["request_id"].encode())  # the body may have named it
                message["headers"] = [*(pair for pair in message.get("headers", ()) if pair[0] != b"x-request-id"), header]
            await send(message)

        try:
            await self._app(scope, receive, named)
        except Exception as e:
            if status:  # too late for another answer: the connection ends
                raise
            await respond(as_api_error(e))(scope, receive, named)
        finally:
            self._say(scope, status, time.monotonic() - start_s)
            request_id.reset(token)

    @staticmethod
    def _say(scope: Scope, status: int, seconds: float) -> None:
        """One line; a status of 0: the client left before there was one. Neither queries, headers nor bodies are in it."""
        method, path = scope["method"], quote(scope["path"], safe="/%:@")[:256]
        client = (scope.get("client") or ("-",))[0]
        known = {"method": method, "path": path, "status": status, "seconds": round(seconds, 4), "client": client}
        _access.info("%s %s %d %.3f s", method, path, status, seconds, extra={"fields": known})


class KeyCheck:
    """Default deny: with keys, whatever is not open needs one of them, whether it exists or not."""

    def __init__(self, app: ASGIApp, keys: Iterable[str]) -> None:
        self._app = app
        self._keys = [_digest(key.encode()) for key in keys]

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http" or not self._keys:
            await self._app(scope, receive, send)
            return
        number = self._number(scope["headers"])
        if number is not None:
            scope["state"]["client_key"] = f"key {number}"
        elif not _is_open(scope):
            await respond(_refusal(scope))(scope, receive, send)
            return
        await self._app(scope, receive, send)

    def _number(self, headers: Iterable[tuple[bytes, bytes]]) -> int | None:
        """Which of the keys was sent, from 1 on; None: none of them. Takes as long for a wrong one as for a right one."""
        sent = [value for name, value in headers if name == b"authorization"]
        scheme, _, key = (sent[0] if len(sent) == 1 else b"").partition(b" ")
        digest, found = _digest(key.strip()), None
        for number, own in enumerate(self._keys, 1):
            if hmac.compare_digest(own, digest):
                found = number
        return found if scheme.lower() == b"bearer" else None


def _digest(key: bytes) -> bytes:
    """Of equal length for all keys: a comparison tells nothing of theirs."""
    return hashlib.sha256(key).digest()


def _is_open(scope: Scope) -> bool:
    path = get_route_path(scope)  # what the router compares
    return scope["method"] in ("GET", "HEAD") and (path in OPEN_PATHS or (path.startswith(OPEN_FOLDERS) and ".." not in path))


def _refusal(scope: Scope) -> ApiError:
    sent = any(name == b"authorization" for name, _ in scope["headers"])
    what = "the API key sent is not one of this server's" if sent else "no API key was sent"
    headers = {"www-authenticate": "Bearer"} | ({} if scope["method"] in ("GET", "HEAD") else {"connection": "close"})
    return ApiError(401, f"{what}: send `Authorization: Bearer KEY`.", code="invalid_api_key", headers=headers)


def _given_id(headers: Iterable[tuple[bytes, bytes]]) -> str | None:
    """The client's own id for its request, where it is one that can be repeated."""
    for name, value in headers:
        if name == b"x-request-id":
            text = value.decode("latin-1")
            return text if _given.fullmatch(text) else None
    return None
