"""The FastAPI application of one API process."""

from __future__ import annotations

from fastapi import FastAPI

from lockstep.server import errors
from lockstep.server.routes import completions, embeddings, health, models
from lockstep.server.state import ServerState
from lockstep.version import __version__

ROUTERS = (health.router, models.router, completions.router, embeddings.router)


def create_app(state: ServerState) -> FastAPI:
    """All routes over `state`, whose engine is connected."""
    app = FastAPI(title="lockstep", version=__version__, root_path=state.options.root_path)
    app.state.server = state
    errors.install(app)
    for router in ROUTERS:
        app.include_router(router)
    return app
