"""Several API processes before one engine: one that is stopped is replaced, also while the engine is."""

from __future__ import annotations

import contextlib
import os
import signal
import time

import httpx
import psutil
import pytest

from lockstep.testing.server import RunningServer, running_server


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
