"""A server that says what the page's tests need: the real page, and an API whose answers follow from the prompt's first word."""

from __future__ import annotations

import asyncio
import json
import threading
from collections.abc import AsyncIterator, Iterator
from contextlib import contextmanager
from typing import Any

import uvicorn
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from lockstep.server.errors import ApiError, respond
from lockstep.server.routes import web

HOSTILE = '<img src=x onerror="document.title=\'owned\'"> **bold** `code`\n\n```html\n<script>document.title="owned"</script>\n```\nafter'
KEY = "right-key"


class FakeServer:
    """What was asked of it last, and how many of its streams were hung up on."""

    def __init__(self) -> None:
        self.last: dict[str, Any] = {}
        self.hung_up = 0
        self.url = ""

    def app(self) -> FastAPI:
        app = FastAPI()

        async def refused(request: Request, error: Exception) -> Response:
            assert isinstance(error, ApiError)
            return respond(error)

        app.add_exception_handler(ApiError, refused)
        app.include_router(web.router)
        app.add_api_route("/v1/models", self.models)
        app.add_api_route("/v1/cluster", self.cluster)
        app.add_api_route("/v1/chat/completions", self.chat, methods=["POST"], response_model=None)
        app.add_api_route("/v1/completions", self.complete, methods=["POST"], response_model=None)
        app.add_api_route("/fake", lambda: {"last": self.last, "hung_up": self.hung_up})
        return app

    async def models(self, request: Request) -> dict[str, Any]:
        self._guard(request)
        return {"object": "list", "data": [{"id": "tiny", "object": "model"}]}

    async def cluster(self, request: Request) -> dict[str, Any]:
        self._guard(request)
        return cluster()

    async def chat(self, request: Request) -> Response:
        self._guard(request)
        body = self.last = await request.json()
        text = body["messages"][-1]["content"]
        if text.startswith("plain"):
            return respond(ApiError(400, "this model has no chat template: give chat_template=..., or use a prompt."))
        if text.startswith("busy"):
            return respond(ApiError(429, "the queue is full.", headers={"Retry-After": "3"}))
        if text.startswith("wrong"):
            return JSONResponse({"detail": [{"msg": "x"}]}, 422)
        return self._events(request, text, lambda piece, end: {"delta": {"content": piece}, "finish_reason": end})

    async def complete(self, request: Request) -> Response:
        self._guard(request)
        self.last = await request.json()
        return self._events(request, self.last["prompt"], lambda piece, end: {"text": piece, "finish_reason": end})

    def _guard(self, request: Request) -> None:
        if "needs-key" in request.headers.get("user-agent", "") and request.headers.get("authorization") != f"Bearer {KEY}":
            raise ApiError(401, "the API key is missing or wrong.", code="invalid_api_key")

    def _events(self, request: Request, text: str, choice: Any) -> Response:
        async def events() -> AsyncIterator[bytes]:
            pieces = [HOSTILE[i : i + 7] for i in range(0, len(HOSTILE), 7)] if text.startswith("hostile") else self._words(text)
            tokens = 0
            try:
                for tokens, piece in enumerate(pieces, 1):
                    yield _event({"choices": [{"index": 0, **choice(piece, None)}]})
                    await asyncio.sleep(0.02 if text.startswith("slow") else 0.005)
                    if text.startswith("break") and tokens == 5:
                        return
                    if text.startswith("fail") and tokens == 5:
                        yield _event({"error": {"message": "rank 1 died and did not come back.", "type": "server_error", "code": None}})
                        return
                yield _event({"choices": [{"index": 0, **choice("", "length")}]})
                yield _event({"choices": [], "usage": {"prompt_tokens": 3, "completion_tokens": tokens}})
                yield b"data: [DONE]\n\n"
            except asyncio.CancelledError:
                self.hung_up += 1
                raise

        return StreamingResponse(events(), media_type="text/event-stream")

    def _words(self, text: str) -> list[str]:
        count = 5000 if text.startswith("slow") else min(int(self.last.get("max_tokens") or 20), 200)
        return [f"word{i} " for i in range(count)]


def _event(data: dict[str, Any]) -> bytes:
    return b"data: " + json.dumps(data).encode() + b"\n\n"


def cluster() -> dict[str, Any]:
    """Two replicas of 2 stages by 2 tensor ranks: one with a slow rank, one that is being started again."""
    ranks = [
        {
            **{"rank": i, "dp": 0, "pp": i // 2, "tp": i % 2, "pid": 4000 + i, "phase": f"step {900 + i}"},
            **{"step_ms": 12.5, "wait_ms": 0.4 if i == 2 else 5.0, "stage_wait_ms": 0.5, "memory_bytes": 512 << 20},
            **{"heartbeat_age_s": 0.1, "slow": i == 2},
        }
        for i in range(4)
    ]
    first = {"replica": 0, "state": "ready", "restarts": 0, "running": 3, "waiting": 1, "kv_usage": 0.42, "tokens_per_s": 210.5}
    second = {"replica": 1, "state": "waiting", "restarts": 2, "running": 0, "waiting": 0, "kv_usage": 0.0, "tokens_per_s": 0.0}
    return {
        "model": "tiny",
        "parallel": {"tp": 2, "pp": 2, "dp": 2},
        "replicas": [{**first, "ranks": ranks}, {**second, "ranks": []}],
        "totals": {"running": 3, "waiting": 1, "kv_usage": 0.21, "tokens_per_s": 210.5, "ttft_ms": {"p50": 12.1}, "itl_ms": {"p50": 4.2}},
    }


@contextmanager
def fake_server() -> Iterator[FakeServer]:
    """It, listening on a port that the system chose, in a thread of this process."""
    fake = FakeServer()
    server = uvicorn.Server(uvicorn.Config(fake.app(), host="127.0.0.1", port=0, log_level="warning", lifespan="off"))
    thread = threading.Thread(target=server.run)
    thread.start()
    try:
        started = threading.Event()
        for _ in range(1000):
            if server.started or started.wait(0.02):
                break
        assert server.started, "the fake server did not start in 20 s"
        fake.url = f"http://127.0.0.1:{server.servers[0].sockets[0].getsockname()[1]}"
        yield fake
    finally:
        server.should_exit = server.force_exit = True
        thread.join(20)
