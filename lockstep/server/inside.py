"""A request to the application from within its own process: no socket, no client, but all that a request passes otherwise."""

from __future__ import annotations

import asyncio
from typing import NamedTuple

from starlette.types import ASGIApp, Message


class Answer(NamedTuple):
    """What the application answered. request_id: the one name that it has in log lines and spans."""

    status: int
    request_id: str
    body: bytes


async def post(app: ASGIApp, path: str, body: bytes) -> Answer:
    """POST a JSON body; the whole answer. Cancelled, it ends the request."""
    sent, status, names = bytearray(), 0, dict[bytes, bytes]()
    waiting = [{"type": "http.request", "body": body, "more_body": False}]

    async def receive() -> Message:
        if waiting:
            return waiting.pop()
        await asyncio.get_running_loop().create_future()  # who asks stays until the end
        raise AssertionError("nobody sets this future")

    async def send(message: Message) -> None:
        nonlocal status, names
        if message["type"] == "http.response.start":
            status, names = message["status"], dict(message["headers"])
        else:
            sent.extend(message.get("body", b""))

    await app(
        {
            "type": "http",
            "asgi": {"version": "3.0"},
            "http_version": "1.1",
            "method": "POST",
            "scheme": "http",
            "path": path,
            "raw_path": path.encode(),
            "root_path": "",
            "query_string": b"",
            "headers": [(b"content-type", b"application/json"), (b"content-length", str(len(body)).encode())],
            "client": None,
            "server": None,
        },
        receive,
        send,
    )
    return Answer(status, names.get(b"x-request-id", b"").decode(), bytes(sent))
