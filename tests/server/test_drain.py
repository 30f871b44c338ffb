"""How a real server ends: told once, told twice, its engine killed, its parent killed; with one HTTP process and with two."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from lockstep.testing.executors import wait_for
from lockstep.testing.server import RunningServer, running_server
from lockstep.utils import procs

ENDLESS = {"prompt": "def f(", "max_tokens": 2000, "stream": True, "ignore_eos": True, "temperature": 0}


def below(pid: int, word: str) -> list[int]:
    """Processes under `pid` with `word` in their command."""
    found = []
    for child in psutil.Process(pid).children(recursive=True):
        try:
            if word in " ".join(child.cmdline()):
                found.append(child.pid)
        except psutil.NoSuchProcess:
            continue
    return found


class Reader(threading.Thread):
    """Reads one stream to its end."""

    def __init__(self, url: str, body: dict[str, Any]) -> None:
        super().__init__(daemon=True)
        self._url, self._body = url, body
        self.events: list[str] = []
        self.status, self.broken = 0, ""
        self.start()

    def run(self) -> None:
        try:
            with httpx.stream("POST", f"{self._url}/v1/completions", json=self._body, timeout=60) as response:
                self.status = response.status_code
                self.events += [line[6:] for line in response.iter_lines() if line.startswith("data: ")]
        except httpx.TransportError as e:
            self.broken = repr(e)

    def text_has_begun(self) -> bool:
        return self.status == 200

    @property
    def reasons(self) -> list[str]:
        """Every finish reason that came."""
        chunks = [json.loads(event) for event in self.events if event != "[DONE]"]
        return [c["finish_reason"] for chunk in chunks for c in chunk.get("choices", []) if c.get("finish_reason")]

    @property
    def errors(self) -> list[str]:
        """The code of every error that came."""
        chunks = [json.loads(event) for event in self.events if event != "[DONE]"]
        return [chunk["error"]["code"] for chunk in chunks if "error" in chunk]


@pytest.fixture(params=["1", "2"], ids=["one process", "two processes"])
def server(request: pytest.FixtureRequest) -> Iterator[RunningServer]:
    with running_server("-asc", request.param, tp=1) as found:
        yield found


def tree(server: RunningServer) -> list[int]:
    return [p.pid for p in psutil.Process(server.pid).children(recursive=True)]


def test_told_once_what_runs_finishes_and_the_code_is_0() -> None:
    with running_server("-asc", "2", "--shutdown-timeout", "60", tp=1) as server:
        alone = httpx.post(f"{server.url}/v1/completions", json=ENDLESS | {"stream": False, "max_tokens": 200}, timeout=60).json()
        readers = [Reader(server.url, ENDLESS | {"max_tokens": 200}) for _ in range(4)]
        assert wait_for(lambda: all(r.text_has_begun() for r in readers))
        processes = tree(server)
        server.process.send_signal(signal.SIGTERM)
        assert server.wait(60) == 0, server.said()
        for reader in readers:
            reader.join(20)
            assert not reader.broken and reader.reasons == ["length"]
            text = "".join(c["text"] for e in reader.events if e != "[DONE]" for c in json.loads(e)["choices"])
            assert text == alone["choices"][0]["text"]
        assert procs.wait_gone(processes, 15) == []


def test_told_once_nothing_new_is_taken_and_what_takes_too_long_is_ended(server: RunningServer) -> None:
    reader = Reader(server.url, ENDLESS)
    assert wait_for(reader.text_has_begun)
    processes = tree(server)
    server.process.send_signal(signal.SIGTERM)  # --shutdown-timeout is 2 s here
    refused = []

    def is_refused() -> bool:
        try:
            refused[:] = [httpx.post(f"{server.url}/v1/completions", json={"prompt": "x", "max_tokens": 1}, timeout=10)]
        except httpx.TransportError:
            return True  # it was faster than we
        return refused[0].status_code == 503

    assert wait_for(is_refused)
    if refused and refused[0].status_code == 503:
        assert int(refused[0].headers["retry-after"]) > 0 and refused[0].json()["error"]["code"] == "draining"
    assert server.wait(30) == 0, server.said()
    reader.join(10)
    assert not reader.broken and reader.events[-1] == "[DONE]"
    assert (reader.reasons, reader.errors) in (([], ["draining"]), (["length"], []))
    assert procs.wait_gone(processes, 15) == []


def test_told_twice_it_ends_at_once(server: RunningServer) -> None:
    reader = Reader(server.url, ENDLESS)
    assert wait_for(reader.text_has_begun)
    processes = tree(server)
    server.process.send_signal(signal.SIGTERM)
    time.sleep(0.3)
    server.process.send_signal(signal.SIGTERM)
    assert server.wait(20) == 128 + signal.SIGTERM, server.said()
    assert procs.wait_gone(processes, 15) == []


def test_an_engine_that_is_back_is_said_to_be() -> None:
    with running_server(tp=1) as server:
        (engine,) = below(server.pid, "frontend.engine_process")
        os.kill(engine, signal.SIGKILL)
        assert wait_for(lambda: re.search(r"the engine is back, \d+\.\d s after it was lost", server.said()) is not None, 60), server.said()


def test_when_the_engine_dies_requests_are_told_and_the_code_is_not_0(server: RunningServer) -> None:
    readers = [Reader(server.url, ENDLESS) for _ in range(3)]
    assert wait_for(lambda: all(r.text_has_begun() for r in readers))
    processes = tree(server)
    deadline = time.monotonic() + 60
    while server.process.poll() is None and time.monotonic() < deadline:  # until it is not started again any more
        for engine in below(server.pid, "frontend.engine_process"):
            with contextlib.suppress(ProcessLookupError):
                os.kill(engine, signal.SIGKILL)
        time.sleep(0.05)
    assert server.wait(40) == 1, server.said()
    assert "SIGKILL" in server.said()
    for reader in readers:
        reader.join(10)
        assert not reader.broken, reader.broken  # a last event, not a cut connection
        assert reader.reasons in (["error"], ["length"], []) and reader.events
    assert procs.wait_gone(processes, 15) == []


def test_when_the_parent_is_killed_nothing_is_left(server: RunningServer) -> None:
    processes = tree(server)
    assert processes
    server.process.kill()
    server.process.wait()
    assert procs.wait_gone(processes, 15) == []


def test_an_http_process_that_dies_is_replaced_and_what_it_ran_is_aborted(tmp_path: Path) -> None:
    with running_server("-asc", "2", tp=1) as server:
        first = sorted(below(server.pid, "processes_child"))
        assert len(first) == 2
        os.kill(first[0], signal.SIGKILL)
        assert wait_for(lambda: len(below(server.pid, "processes_child")) == 2 and first[0] not in below(server.pid, "processes_child"))
        answers = [httpx.post(f"{server.url}/v1/completions", json={"prompt": "x", "max_tokens": 2}, timeout=60) for _ in range(20)]
        assert {a.status_code for a in answers} == {200}
        assert first[1] in below(server.pid, "processes_child")  # the other one has not noticed
        assert "died: killed by SIGKILL" in server.said()
        assert wait_for(lambda: re.search(r"API process \d is back, [\d.]+ s after it was lost", server.said()) is not None)
        assert server.stop() == 0
        assert "no request is under way" in server.said() and "0 requests" not in server.said()
