"""What /health says of the engine, and of API processes beside the one that answers."""

from __future__ import annotations

import time
from typing import Any

import pytest
from fastapi import FastAPI
from starlette.testclient import TestClient

from lockstep.executor.contract import ExecutorError
from lockstep.frontend.problems import problems_of
from lockstep.server import middleware
from lockstep.server.missing import Missing
from lockstep.server.routes import health
from tests.server.edge_app import EdgeEngine, make_state

STOPPED = "the engine's process (pid 7) was stopped (SIGSTOP, or a debugger): no sign of life for 1.3 s"


def test_between_two_engines_it_says_what_became_of_the_former_one() -> None:
    (problem,) = problems_of(None, None, 2.0, STOPPED)
    assert problem["why"] == f"{STOPPED}: another starts" and problem["state"] == "starting" and problem["for_s"] == 2.0
    (problem,) = problems_of(None, None, 2.0)
    assert problem["why"] == "the engine's process died: another starts"
    (problem,) = problems_of(ExecutorError("gone for good\nat length"), None, 2.0, STOPPED)
    assert problem == {"process": "engine", "state": "dead", "why": "gone for good"}


class Engine(EdgeEngine):
    """Has the problems that the test gives it."""

    found: list[dict[str, Any]] = []

    def problems(self) -> list[dict[str, Any]]:
        return self.found


@pytest.mark.parametrize("sick", [False, True])
def test_health_is_of_ranks_and_names_missing_processes_too(sick: bool) -> None:
    engine = Engine()
    state = make_state(engine, api_key=["k"])
    app = FastAPI()
    app.state.server = state
    middleware.install(app, state)
    app.include_router(health.router)
    client, key = TestClient(app), {"Authorization": "Bearer k"}
    rank = {"replica": 0, "rank": 1, "state": "ready", "why": "no sign of life for 20 s", "pid": 9}
    engine.found = [rank] if sick else []
    assert client.get("/health").json()["status"] == ("unhealthy" if sick else "ok")
    state.beside = [Missing(1, 4711, "stopped", time.monotonic() - 3, "it was stopped (SIGSTOP, or a debugger)")]
    answer = client.get("/health")
    assert answer.status_code == (503 if sick else 200) and answer.json()["status"] == ("unhealthy" if sick else "degraded")
    short = [{"replica": 0, "rank": 1, "state": "ready"}] if sick else []
    assert answer.json()["problems"] == [*short, {"process": "api-1", "state": "stopped"}], "pids and reasons are for those with a key"
    *_, told = client.get("/health", headers=key).json()["problems"]
    assert told["pid"] == 4711 and told["for_s"] >= 3 and told["why"] == "it was stopped (SIGSTOP, or a debugger)"
