"""What operators do with a server that runs: hold it, put it to sleep, look at its requests, record what it does.

All of it is for every replica. There is no route that calls arbitrary methods of ranks.
"""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, Literal

import msgspec
from fastapi import APIRouter, Query

from lockstep.cluster.health import RequestInfo
from lockstep.frontend.streams import CallLate, CallRefused, EngineDeadError
from lockstep.observability.flight_recorder import default_folder
from lockstep.server.errors import ApiError
from lockstep.server.routes.parsed import ParsedRoute
from lockstep.server.schemas.common import Body, Few, Name
from lockstep.server.state import ServerState, State

router = APIRouter(tags=["operators"], route_class=ParsedRoute)
LONG_S = 600.0  # weights may have to be read again
AT_ONCE_S = 1.0  # a balancer asks often, and waits for nothing


async def _call(state: ServerState, method: str, *args: Any, type: Any = Any) -> Any:
    """A call of the engine. Raises ApiError 409 when what is asked cannot be in the state that it is in."""
    try:
        return await state.engine.call(method, *args, type=type, timeout_s=LONG_S)
    except ValueError as e:
        raise ApiError(409, str(e), code="conflict") from None


@router.post("/pause")
async def pause(state: State, mode: Literal["abort", "keep"] = "keep") -> dict[str, bool]:
    """Plan no more steps. mode keep: requests keep what they have and wait; abort: they end. New ones wait either way."""
    await _call(state, "pause", mode)
    return {"is_paused": True}


@router.post("/resume")
async def resume(state: State) -> dict[str, bool]:
    """Go on after /pause. 409 while it sleeps."""
    await _call(state, "resume")
    return {"is_paused": False}


@router.get("/is_paused")
async def is_paused(state: State) -> dict[str, bool]:
    return {"is_paused": (await _mode(state))[0]}


@router.post("/sleep")
async def sleep(state: State, level: Annotated[int, Query(ge=1, le=2)] = 1) -> dict[str, Any]:
    """Pause and give memory back: of the KV cache (level 1), of the weights too (level 2). Requests wait until /wake_up."""
    await _call(state, "sleep", level)
    return {"is_sleeping": True, "level": level}


@router.post("/wake_up")
async def wake_up(state: State) -> dict[str, bool]:
    """Take the memory again and go on; after level 2 the weights are read anew."""
    await _call(state, "wake_up")
    return {"is_sleeping": False}


@router.get("/is_sleeping")
async def is_sleeping(state: State) -> dict[str, Any]:
    level = (await _mode(state))[1]
    return {"is_sleeping": bool(level), "level": level}


async def _mode(state: ServerState) -> tuple[bool, int]:
    found: tuple[bool, int] = await _call(state, "mode", type=tuple[bool, int])
    return found


@router.post("/reset_prefix_cache")
async def reset_prefix_cache(state: State) -> dict[str, bool]:
    """Forget every cached prefix. Running requests keep theirs."""
    await _call(state, "reset_prefix_cache")
    return {"success": True}


@router.post("/start_profile")
async def start_profile(state: State) -> dict[str, str]:
    """Record what the engine and every rank do, until /stop_profile. Costs a few per cent of speed."""
    await _call(state, "start_profile")
    return {"status": "recording"}


@router.post("/stop_profile")
async def stop_profile(state: State) -> dict[str, str]:
    """Write what was recorded as a Chrome trace into --profile-dir; its path, on the server's machine."""
    folder = state.options.profile_dir or str(default_folder().parent / "profiles")
    return {"path": await _call(state, "write_profile", str(Path(folder).absolute()))}


class AbortRequest(Body):
    """request_ids: of responses, of HTTP requests (X-Request-Id), or the engine's, of /v1/requests. Without them all are meant."""

    request_ids: Annotated[list[Name], Few(4096)] | None = None


@router.post("/abort_requests")
async def abort_requests(body: AbortRequest, state: State) -> dict[str, list[str]]:
    """End requests, of any client. Their streams end with finish_reason "abort"."""
    return {"aborted": await _call(state, "abort_requests", body.request_ids)}


@router.get("/load")
async def load(state: State) -> dict[str, Any]:
    """How much there is to do: server_load is of this moment, the rest of the engine's last report, up to half a second ago."""
    stats, unfinished = state.stats, await _unfinished(state)
    if stats is None:
        return {"server_load": unfinished, "running": 0, "waiting": unfinished, "kv_cache_usage": 0.0}
    return {
        "server_load": unfinished,
        "running": stats.running,
        "waiting": stats.waiting,
        "kv_cache_usage": round(stats.kv_usage, 4),
    }


async def _unfinished(state: ServerState) -> int:
    """Requests of all API processes. The others' are of the engine's last report where it cannot say at once."""
    own = state.engine.unfinished
    if state.options.api_server_count == 1:
        return own
    try:
        everyones: int = await state.engine.call("unfinished", type=int, timeout_s=AT_ONCE_S)
        return max(own, everyones)
    except (EngineDeadError, CallRefused, CallLate):
        return max(own, state.stats.running + state.stats.waiting if state.stats else 0)


@router.get("/v1/requests")
async def requests(state: State) -> dict[str, Any]:
    """The requests that have not ended, of all API processes, oldest first."""
    found = await _call(state, "requests", type=list[RequestInfo])
    return {"object": "list", "data": [msgspec.to_builtins(info) for info in found]}
