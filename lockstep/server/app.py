"""The FastAPI application of one API process."""

from __future__ import annotations

from typing import Any

from fastapi import FastAPI
from starlette.types import Receive, Scope, Send

from lockstep.server import errors, middleware
from lockstep.server.observe import count, observe
from lockstep.server.routes import (
    admin,
    chat,
    completions,
    docs,
    embeddings,
    generate,
    health,
    info,
    metrics,
    models,
    responses,
    tokenize,
    web,
)
from lockstep.server.sse import DIRECT
from lockstep.server.state import ServerState
from lockstep.version import __version__

ROUTERS = (
    health.router,
    info.router,
    metrics.router,
    admin.router,
    models.router,
    completions.router,
    chat.router,
    responses.router,
    embeddings.router,
    tokenize.router,
    generate.router,
    docs.router,
    web.router,
)


class App(FastAPI):
    """FastAPI that leaves the server's own `send` where streams find it, and knows where a proxy serves it.

    The latter is said with each request, as a server would: FastAPI warns on standard error where it is told itself.
    """

    def __init__(self, under: str = "", **about: Any) -> None:
        """under: the path of --root-path."""
        super().__init__(**about)
        self._under = under

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        scope[DIRECT] = send
        if self._under:
            scope["root_path"] = self._under
        await super().__call__(scope, receive, send)


def create_app(state: ServerState) -> FastAPI:
    """All routes over `state`, whose engine is connected."""
    about: dict[str, Any] = {"title": "lockstep", "version": __version__, "responses": errors.DOCUMENTED}
    app = App(state.options.root_path, docs_url=None, redoc_url=None, **about)  # those pages would ask other hosts
    app.state.server = state
    observe(app, state)
    errors.install(app)
    middleware.install(app, state)
    count(app, state)
    for router in ROUTERS:
        app.include_router(router)
    return app
