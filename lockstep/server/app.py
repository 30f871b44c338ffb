"""The FastAPI application of one API process."""

from __future__ import annotations

from fastapi import FastAPI

from lockstep.server import errors, middleware
from lockstep.server.observe import count, observe
from lockstep.server.routes import admin, chat, completions, embeddings, generate, health, info, metrics, models, responses, tokenize, web
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
    web.router,
)


def create_app(state: ServerState) -> FastAPI:
    """All routes over `state`, whose engine is connected."""
    app = FastAPI(title="lockstep", version=__version__, root_path=state.options.root_path, responses=errors.DOCUMENTED)
    app.state.server = state
    observe(app, state)
    errors.install(app)
    middleware.install(app, state)
    count(app, state)
    for router in ROUTERS:
        app.include_router(router)
    return app
