"""Whether the server lives, and what it is."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from lockstep.server.errors import ApiError
from lockstep.server.state import State
from lockstep.version import __version__

router = APIRouter(tags=["server"])


@router.get("/health")
@router.get("/livez")
async def health(state: State) -> dict[str, Any]:
    """200 while the engine answers."""
    if state.engine.failure is not None:
        raise ApiError(503, str(state.engine.failure), code="engine_dead")
    await state.engine.call("ping", timeout_s=5.0)
    return {"status": "ok"}


@router.get("/version")
async def version() -> dict[str, str]:
    return {"version": __version__}
