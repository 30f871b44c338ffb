"""`/ping` and `/server_info`: that it lives, and how it was started."""

from __future__ import annotations

import dataclasses
from typing import Any

import msgspec
from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from lockstep.server.routes import health
from lockstep.server.state import State
from lockstep.version import __version__

router = APIRouter(tags=["server"])


@router.get("/ping", responses=health.UNWELL)
@router.post("/ping", responses=health.UNWELL)
async def ping(state: State, request: Request) -> JSONResponse:
    """What load balancers of some platforms ask; the same as /health."""
    return await health.health(state, request)


@router.get("/server_info")
async def server_info(state: State) -> dict[str, Any]:
    """The engine's settings (no keys among them) and its numbers as of a moment ago; null while no replica is ready."""
    stats = state.stats
    return {
        "version": __version__,
        "model": state.model,
        "architecture": state.engine.spec.architecture,
        "config": dataclasses.asdict(state.engine.config),
        "stats": stats and msgspec.to_builtins(stats) | {"kv_usage": stats.kv_usage},
    }
