"""An application with routes of its own behind the real middleware, for tests of what is before the routes."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from types import SimpleNamespace
from typing import Any

import httpx
from fastapi import FastAPI, Request
from fastapi.responses import JSONResponse, StreamingResponse

from lockstep.config.serve import ServeOptions
from lockstep.config.tree import EngineConfig, ModelConfig, SchedulerConfig
from lockstep.frontend.streams import submitted
from lockstep.server import errors, middleware
from lockstep.server.app import App
from lockstep.server.state import ServerState
from lockstep.testing.fakes import ByteTokenizer


class EdgeEngine:
    """Runs nothing. A job ends when it is aborted."""

    def __init__(self, max_num_seqs: int = 2, max_model_len: int = 100) -> None:
        self.config = EngineConfig(model=ModelConfig(max_model_len=max_model_len), scheduler=SchedulerConfig(max_num_seqs=max_num_seqs))
        self.tokenizer: Any = ByteTokenizer()
        self.failure, self.index, self.observer = None, 0, None
        self.aborted: dict[str, asyncio.Event] = {}

    def submit(self, name: str) -> asyncio.Event:
        noted = submitted.get()
        assert noted is not None, "a request that generates is not behind the gate"
        noted.append(name)
        self.aborted[name] = asyncio.Event()
        return self.aborted[name]

    async def abort(self, names: list[str]) -> None:
        for name in names:
            self.aborted[name].set()


def make_state(engine: EdgeEngine | None = None, **options: Any) -> ServerState:
    return ServerState(ServeOptions(**options), engine or EdgeEngine(), ["m"])  # type: ignore[arg-type]


def make_app(state: ServerState) -> FastAPI:
    """POST /v1/completions: {"do": "echo" | "wait" | "stream" | "raise"}."""
    app = App(state.options.root_path)
    app.state.server = state
    errors.install(app)
    middleware.install(app, state)
    engine: Any = state.engine
    app.state.entered = asyncio.Event()

    @app.post("/v1/completions")
    async def completions(request: Request) -> Any:
        body = await request.json()
        app.state.entered.set()
        if body.get("do") == "raise":
            raise RuntimeError("secret of the server")
        if body.get("do") == "wait":
            await engine.submit("waiting").wait()
        if body.get("do") == "stream":
            return StreamingResponse(stream(engine.submit("streaming")), media_type="text/event-stream")
        return JSONResponse({"got": body})

    @app.post("/tokenize")
    async def tokenize(request: Request) -> Any:
        return {"bytes": len(await request.body())}

    @app.get("/livez")
    @app.get("/readyz")
    async def live() -> dict[str, bool]:
        return {"ok": True}

    return app


async def stream(aborted: asyncio.Event) -> AsyncIterator[bytes]:
    yield b"data: first\n\n"
    await aborted.wait()
    yield b"data: abort\n\n"


def client_of(app: Any, **headers: str) -> httpx.AsyncClient:
    transport = httpx.ASGITransport(app=app, raise_app_exceptions=False)
    return httpx.AsyncClient(transport=transport, base_url="http://server", headers=headers, timeout=20)


BUSY = SimpleNamespace(wait={"do": "wait", "prompt": "x"}, stream={"do": "stream", "prompt": "x"}, echo={"do": "echo", "prompt": "x"})
