"""`/ping` and `/server_info`: that it lives, and how it was started."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec
from fastapi import APIRouter
from fastapi.responses import JSONResponse

from lockstep.server.routes import health
from lockstep.server.state import State
from lockstep.version import __version__

router = APIRouter(tags=["server"])


@router.get("/ping", responses=health.UNWELL)
@router.post("/ping", responses=health.UNWELL)
async def ping(state: State) -> JSONResponse:
    """What load balancers of some platforms ask; the same as /health."""
    return await health.health(state)


@router.get("/server_info")
async def server_info(state: State) -> dict[str, Any]:
    """The engine's settings (no keys among them) and its numbers at this moment."""
    stats = await state.engine.stats()
    return {
        "version": __version__,
        "model": state.model,
        "architecture": state.engine.spec.architecture,
        "config": dataclasses.asdict(state.engine.config),
        "stats": msgspec.to_builtins(stats) | {"kv_usage": stats.kv_usage},
    }
