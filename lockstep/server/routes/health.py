"""Whether the server lives, whether it is ready, and how each rank is. Answered from what is known here: nobody is asked.

/livez             503: restart this process. It restarts its engine and replicas itself, so that is when it has given up
/readyz, /ready    503: send requests elsewhere for now (draining, paused, asleep, or no replica is ready)
/startupz          200: it has started (until then `starting` answers)
/health            503 unless every rank of every replica gives signs of life; says which do not, since when, and at what.
                   200 and "degraded" where only API processes beside this one do not serve: all that is asked is answered still
"""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse

from lockstep.server.state import ServerState, State
from lockstep.version import __version__

NAMES = ("process", "replica", "rank", "state")  # what strangers may read of a problem: no pid, no path, no exception's text

router = APIRouter(tags=["server"])


UNWELL: dict[int | str, dict[str, Any]] = {503: {"description": "It does not: status and problems"}}


def _answer(fine: bool, status: str, state: ServerState, request: Request) -> JSONResponse:
    """With problems where it is not fine. Without a key that is asked for: no more of them than who has one."""
    body: dict[str, Any] = {"status": status}
    if not fine or status == "degraded":
        known = not state.options.api_key or "client_key" in request.scope["state"]
        problems = state.engine.problems() + [one.problem() for one in state.beside]
        body["problems"] = problems if known else [{name: one[name] for name in NAMES if name in one} for one in problems]
    return JSONResponse(body, 200 if fine else 503)


@router.get("/livez", responses=UNWELL)
async def livez(state: State, request: Request) -> JSONResponse:
    """200 as long as this process can serve, or will again by itself."""
    alive = state.engine.failure is None
    return _answer(alive, "alive" if alive else "dead", state, request)


@router.get("/startupz")
async def startupz() -> dict[str, str]:
    """200: before that the port itself says 503."""
    return {"status": "started"}


@router.get("/ready", responses=UNWELL)
@router.get("/readyz", responses=UNWELL)
async def ready(state: State, request: Request) -> JSONResponse:
    """200 when a request would be run now."""
    health = state.engine.health
    if state.draining:
        return _answer(False, "draining", state, request)
    if health is not None and health.sleep_level:
        return _answer(False, "asleep", state, request)
    if health is not None and health.paused:
        return _answer(False, "paused", state, request)
    fine = state.engine.takes_requests
    return _answer(fine, "ready" if fine else "unready", state, request)


@router.get("/health", responses=UNWELL)
async def health(state: State, request: Request) -> JSONResponse:
    """200 when every rank of every replica gave a sign of life lately."""
    fine = not state.engine.problems()
    return _answer(fine, "unhealthy" if not fine else "degraded" if state.beside else "ok", state, request)


@router.get("/version")
async def version() -> dict[str, str]:
    return {"version": __version__}
