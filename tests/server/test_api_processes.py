"""API processes that are stopped, or hang, and what the others, and /health, say of it; alone before the engine, and several."""

from __future__ import annotations

import contextlib
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from lockstep.testing.executors import wait_for
from lockstep.testing.server import ROOT, RunningServer, running_server
from lockstep.utils import procs

HANGS = """import signal, time
def hang_for_ever(*_):
    while True:
        time.sleep(1)
signal.signal(signal.SIGUSR2, hang_for_ever)
"""
SOON = "import sys; from lockstep.server import processes, watchdog; processes.HUNG_S = watchdog.HUNG_S = 4.0; processes.LATE_S = 2.0"


def processes(server: RunningServer, module: str) -> list[psutil.Process]:
    """The processes right below the server that run this module."""
    found = []
    for process in psutil.Process(server.pid).children():
        with contextlib.suppress(psutil.NoSuchProcess):  # it has just ended
            found += [process] if module in " ".join(process.cmdline()) else []
    return found


@pytest.mark.timeout(180)
def test_one_that_is_stopped_is_replaced() -> None:
    with running_server("--api-server-count", "2", tp=1) as server:
        (first, second), (engine,) = processes(server, "processes_child"), processes(server, "engine_process")
        long = {"prompt": "def f(", "max_tokens": 1500, "ignore_eos": True, "stream": True, "n": 2}
        with httpx.stream("POST", server.url + "/v1/completions", json=long, timeout=60) as stream:
            lines = stream.iter_lines()  # kept: a stream whose iterator is gone is closed
            next(lines)
            loads = {httpx.get(server.url + "/load").json()["server_load"] for _ in range(8)}
            assert loads == {1}, "each process knows of the other's"
        os.kill(first.pid, signal.SIGSTOP)
        os.kill(engine.pid, signal.SIGKILL)
        give_up_s = time.monotonic() + 60
        while "API process 0" not in server.said() or len(processes(server, "processes_child")) < 2:
            assert time.monotonic() < give_up_s, server.said()
            time.sleep(0.05)
        assert first.pid not in [process.pid for process in processes(server, "processes_child")]
        body = {"prompt": "def f(", "max_tokens": 4}
        for _ in range(8):  # each on a connection of its own: whichever process is free takes it
            assert httpx.post(server.url + "/v1/completions", json=body, timeout=60).status_code == 200, server.said()
        assert second.is_running() and server.process.poll() is None
        lost = f"API process 0 (pid {first.pid}) was stopped (SIGSTOP, or a debugger); its connections are lost"
        assert lost in server.said() and f"API process 0 (pid {first.pid}) died" not in server.said()


@contextlib.contextmanager
def hanging(folder: Path, *flags: str) -> Iterator[RunningServer]:
    """A server whose processes hang, in Python, on SIGUSR2: all of them read `sitecustomize`. It looks for that sooner than others."""
    (folder / "sitecustomize.py").write_text(HANGS)
    words = ["serve", "--port", "0", "--no-cpu-binding", "--shutdown-timeout", "2", *flags]
    command = [sys.executable, "-c", f"{SOON}; from lockstep.cli.main import main; sys.exit(main({words!r}))"]
    server = RunningServer(command, {"PYTHONPATH": f"{folder}{os.pathsep}{ROOT}"})
    try:
        server.wait_ready()
        yield server
    finally:
        server.close()


def problem(server: RunningServer, true: Callable[[int, dict[str, Any]], bool], limit_s: float = 60) -> dict[str, Any]:
    """The first problem that /health tells and that is the one meant."""
    give_up_s = time.monotonic() + limit_s
    while True:
        answer = httpx.get(server.url + "/health", timeout=60)
        for one in answer.json().get("problems", []):
            if true(answer.status_code, one):
                return one
        assert time.monotonic() < give_up_s, (answer.text, server.said())
        time.sleep(0.02)


def well(server: RunningServer) -> bool:
    return httpx.get(server.url + "/health", timeout=60).json() == {"status": "ok"}


@pytest.mark.timeout(240)
@pytest.mark.parametrize("count", ["1", "2"])
def test_an_engine_that_was_stopped_did_not_die(count: str) -> None:
    with running_server("--api-server-count", count, tp=1) as server:
        (engine,) = processes(server, "engine_process")
        os.kill(engine.pid, signal.SIGSTOP)
        found = problem(server, lambda status, one: status == 503 and one["process"] == "engine" and "was stopped" in one["why"])
        assert found["state"] == "starting" and str(engine.pid) in found["why"] and "another starts" in found["why"]
        assert wait_for(lambda: well(server), 60), server.said()


@pytest.mark.timeout(240)
def test_one_that_is_missing_is_named_by_the_others_and_one_that_hangs_is_replaced(tmp_path: Path) -> None:
    with hanging(tmp_path, "--api-server-count", "2") as server:
        first, second = processes(server, "processes_child")
        os.kill(first.pid, signal.SIGSTOP)
        found = problem(server, lambda status, one: status == 200 and one["state"] == "stopped")
        assert found["pid"] == first.pid and found["process"] in ("api-0", "api-1") and found["for_s"] >= 0
        found = problem(server, lambda status, one: status == 200 and one["state"] == "starting")
        assert found["why"] == "it was stopped (SIGSTOP, or a debugger): another one starts"
        assert wait_for(lambda: well(server), 60), server.said()

        os.kill(second.pid, signal.SIGUSR2)
        assert problem(server, lambda status, one: status == 200 and one["state"] == "silent")["pid"] == second.pid
        found = problem(server, lambda status, one: status == 200 and one["state"] == "starting")
        assert found["why"].startswith("it hung: its event loop did not turn for"), found
        assert "hang_for_ever" in server.said(), "its stack is not in the log"
        assert wait_for(lambda: well(server), 60), server.said()
        assert len(processes(server, "processes_child")) == 2 and not second.is_running()
        assert httpx.get(server.url + "/readyz", timeout=60).status_code == 200 and server.stop() == 0


@pytest.mark.timeout(120)
def test_the_only_one_that_hangs_ends_with_its_stack(tmp_path: Path) -> None:
    with hanging(tmp_path) as server:
        below = [process.pid for process in psutil.Process(server.pid).children(recursive=True)]
        os.kill(server.pid, signal.SIGUSR2)
        assert server.wait(60) == 1, server.said()
        assert "its event loop has not turned for" in server.said() and "hang_for_ever" in server.said()
        assert procs.wait_gone(below, 30) == []
