"""Who is behind a server: one replica, supervised; this host's replicas; and ranks that are not this server's."""

from __future__ import annotations

import os
import signal

import httpx
import psutil
import pytest

from lockstep.testing.executors import wait_for
from lockstep.testing.server import running_server

ASK = {"prompt": "def f(", "max_tokens": 8, "temperature": 0}


def replicas_of(pid: int) -> list[tuple[int, list[str]]]:
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        try:
            words = child.cmdline()
        except psutil.NoSuchProcess:
            continue
        if "lockstep.cluster.replica_main" in words:
            found.append((child.pid, words))
    return found


@pytest.mark.parametrize(
    ("flags", "count"),
    [
        (("-dp", "4", "-dpn", "3"), 1),
        (("-dp", "4", "-dpn", "3", "-dpe", "-dpl", "2"), 1),
        (("-dp", "4", "-dph", "-dpl", "2", "-dpr", "2"), 2),
    ],
    ids=["external", "external, two a host", "hybrid"],
)
def test_a_server_has_its_own_replicas_and_they_are_started_again(flags: tuple[str, ...], count: int) -> None:
    with running_server(*flags, tp=1) as server:
        running = replicas_of(server.pid)
        assert len(running) == count
        first = httpx.post(f"{server.url}/v1/completions", json=ASK, timeout=60).json()["choices"][0]["text"]
        for pid, _ in running:
            os.kill(pid, signal.SIGKILL)
        again = httpx.post(f"{server.url}/v1/completions", json=ASK, timeout=60)
        assert again.status_code == 200 and again.json()["choices"][0]["text"] == first
        assert wait_for(
            lambda: len(replicas_of(server.pid)) == count and not {p for p, _ in replicas_of(server.pid)} & {p for p, _ in running}
        )
        assert server.stop() == 0
