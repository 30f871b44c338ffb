"""A server whose processes are killed and stopped: its streams do not notice, its health tells the truth, and what happened is on file."""

from __future__ import annotations

import json
import os
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from lockstep.testing.server import RunningServer, running_server
from tests.chaos.server_load import below, chaos

pytestmark = pytest.mark.chaos
STREAMS, TOKENS = 8, 200


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("incidents")


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[RunningServer]:
    with running_server("--incident-dir", str(folder), "--kv-cache-memory-bytes", "64M") as found:
        yield found


@pytest.fixture(scope="module")
def want(server: RunningServer) -> dict[int, tuple[str, str]]:
    return Streams(server).results()


class Streams:
    """Eight streams at once, each read on a thread."""

    def __init__(self, server: RunningServer) -> None:
        self.server = server
        self.text = [""] * STREAMS
        self.reasons: list[list[str]] = [[] for _ in range(STREAMS)]
        self.threads = [threading.Thread(target=self._read, args=(i,), daemon=True) for i in range(STREAMS)]
        for thread in self.threads:
            thread.start()

    def _read(self, i: int) -> None:
        body = {"prompt": f"def f{i}(a):", "max_tokens": TOKENS, "temperature": 0, "stream": True}
        with httpx.stream("POST", self.server.url + "/v1/completions", json=body, timeout=120) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    (choice,) = json.loads(line[6:])["choices"]
                    self.text[i] += choice["text"]
                    self.reasons[i] += [choice["finish_reason"]] if choice["finish_reason"] else []

    def wait_for(self, characters: int) -> None:
        """Until so much has come, of all together."""
        give_up_s = time.monotonic() + 30
        while sum(map(len, self.text)) < characters:
            assert time.monotonic() < give_up_s
            time.sleep(0.01)

    def results(self) -> dict[int, tuple[str, str]]:
        """(text, the only finish reason) of each."""
        for thread in self.threads:
            thread.join(120)
            assert not thread.is_alive()
        assert all(len(reasons) == 1 for reasons in self.reasons), self.reasons
        return {i: (self.text[i], self.reasons[i][0]) for i in range(STREAMS)}


def well(server: RunningServer) -> None:
    """Wait until every rank answers."""
    give_up_s = time.monotonic() + 60
    while httpx.get(server.url + "/health").status_code != 200:
        assert time.monotonic() < give_up_s, server.said()
        time.sleep(0.05)


def unready(server: RunningServer, since_s: float, limit_s: float) -> dict[str, Any]:
    """What /readyz says of the trouble, once it does."""
    while True:
        answer = httpx.get(server.url + "/readyz")
        if answer.status_code == 503:
            problem: dict[str, Any] = answer.json()["problems"][0]
            return problem
        assert time.monotonic() < since_s + limit_s, "it still says that all is well"
        time.sleep(0.02)


def incidents(folder: Path) -> dict[str, dict[str, Any]]:
    for path in folder.glob("*.json"):
        assert path.stat().st_mode & 0o777 == 0o600
    return {str(path): json.loads(path.read_text()) for path in folder.glob("*.json")}


@pytest.mark.timeout(180)
@pytest.mark.parametrize("role", ["engine", "replica", "rank"])
@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGSTOP])
def test_streams_go_on(server: RunningServer, want: dict[int, tuple[str, str]], folder: Path, role: str, how: signal.Signals) -> None:
    well(server)
    before = incidents(folder).keys()
    old = [process.pid for processes in below(server).values() for process in processes]
    streams = Streams(server)
    streams.wait_for(sum(len(text) for text, _ in want.values()) // 3)
    struck_s = time.monotonic()
    os.kill(below(server)[role][-1].pid, how)
    problem = unready(server, struck_s, 10.0)  # 2 s where the machine has nothing else to do
    assert httpx.get(server.url + "/livez").status_code == 200, "it restarts what is below it by itself"
    assert streams.results() == want
    well(server)
    if role == "engine":
        assert not [pid for pid in old if psutil.pid_exists(pid) and psutil.Process(pid).status() != psutil.STATUS_ZOMBIE]
    fresh = incidents(folder)
    (path,) = fresh.keys() - before
    incident = fresh[path]
    assert path in server.said(), "the log names the file"
    assert (incident["culprit"], incident["kind"]) == (role, "died" if how == signal.SIGKILL else "stopped")
    assert incident["signal"] == how.name and not incident["oom_kill"]
    assert "def f" not in json.dumps(incident), "a prompt is in the file"
    if role == "rank":
        assert incident["culprit_rank"] == problem["rank"] == 1 and problem["replica"] == 0
        assert incident["phase"] and incident["phase"] == problem["phase"]
        assert [rank["rank"] for rank in incident["ranks"]] == [0, 1] and incident["steps"]
    if role == "engine":
        assert incident["phase"] == "engine"
    if how == signal.SIGSTOP:
        frames = [line for stack in incident["stacks"].values() for line in stack]
        module = {"engine": "engine_process.py", "replica": "replica_main.py", "rank": "worker_main.py"}[role]
        assert any(module in frame for frame in frames), "no Python stack"


@pytest.mark.timeout(120)
def test_a_rank_that_dies_while_idle_is_missed_at_once(server: RunningServer) -> None:
    well(server)
    os.kill(below(server)["rank"][0].pid, signal.SIGKILL)
    problem = unready(server, time.monotonic(), 10.0)
    assert problem["rank"] == 0 and "SIGKILL" in problem["why"]
    well(server)


@pytest.mark.timeout(120)
def test_a_sleeper_that_is_restarted_sleeps(server: RunningServer, want: dict[int, tuple[str, str]]) -> None:
    well(server)
    assert httpx.post(server.url + "/sleep?level=2", timeout=60).status_code == 200
    os.kill(below(server)["replica"][0].pid, signal.SIGKILL)
    streams = Streams(server)
    time.sleep(1.0)
    well(server)
    time.sleep(1.0)
    assert not any(streams.text) and httpx.get(server.url + "/is_sleeping").json()["level"] == 2
    assert httpx.post(server.url + "/wake_up", timeout=60).status_code == 200
    assert streams.results() == want


@pytest.mark.timeout(120)
def test_a_rank_that_hangs_is_named_with_its_stack(tmp_path: Path) -> None:
    """It is not dead and not stopped: it makes no progress. Each new one hangs again, until the request is given up."""
    flags = ["--incident-dir", str(tmp_path), "--execute-model-timeout-seconds", "1"]
    with running_server(*flags, environment={"LOCKSTEP_FAULT": "decode:1:sleep=1000"}) as server:
        body = {"prompt": "def f(a):", "max_tokens": 5, "temperature": 0, "stream": True}
        with httpx.stream("POST", server.url + "/v1/completions", json=body, timeout=100) as answer:
            assert answer.status_code == 200
            give_up_s = time.monotonic() + 60
            while not (found := incidents(tmp_path)):
                assert time.monotonic() < give_up_s
                time.sleep(0.1)
    incident = next(iter(found.values()))
    assert (incident["kind"], incident["culprit_rank"], incident["phase"]) == ("hung", 1, "step 1")
    assert any("fault.py" in line for line in incident["stacks"]["1"])
    assert incident["stacks"]["0"], "the stacks of all ranks"


@pytest.mark.full
@pytest.mark.timeout(3000)
def test_load_under_chaos() -> None:
    """`make chaos`, for CHAOS_MINUTES (default 1): nothing is lost, wrong or left over."""
    minutes = float(os.environ.get("CHAOS_MINUTES", "1"))
    summary = chaos(minutes, every_s=min(60.0, 12 * minutes), seed=int(os.environ.get("CHAOS_SEED", "0")))
    print(f"\n{json.dumps(summary)}")
    assert summary["lost"] == summary["wrong"] == 0 and sum(summary["strikes"].values()) >= 2
    assert summary["memory_mb"]["at_the_end"] < 1.25 * summary["memory_mb"]["after_first_strike"], "memory grew"
