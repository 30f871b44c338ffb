"""What operators do with a server that runs: hold it, put it to sleep, look into it, record it. One server, two ranks."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx
import psutil
import pytest

from lockstep.testing.server import RunningServer, running_server

PROMPT = "def add(a, b):\n    " * 12


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RunningServer]:
    folder = tmp_path_factory.mktemp("ops")
    with running_server("--profile-dir", str(folder), "--incident-dir", str(folder), "--kv-cache-memory-bytes", "64M") as found:
        yield found


def post(server: RunningServer, path: str, status: int = 200, **options: Any) -> Any:
    answer = httpx.post(server.url + path, timeout=60, **options)
    assert answer.status_code == status, answer.text
    return answer.json()


def get(server: RunningServer, path: str, status: int = 200) -> Any:
    answer = httpx.get(server.url + path, timeout=30)
    assert answer.status_code == status, answer.text
    return answer.json()


def complete(server: RunningServer, tokens: int = 24, prompt: str = PROMPT) -> str:
    body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0}
    text: str = post(server, "/v1/completions", json=body)["choices"][0]["text"]
    return text


def until(true: Callable[[], bool], limit_s: float = 20.0) -> None:
    give_up_s = time.monotonic() + limit_s
    while not true():
        assert time.monotonic() < give_up_s, "it did not become true"
        time.sleep(0.05)


class Streaming:
    """A stream read on a thread."""

    def __init__(self, server: RunningServer, tokens: int = 600, prompt: str = "def f(a):", n: int = 1) -> None:
        self.text, self.reason = "", None
        self._body = {"prompt": prompt, "max_tokens": tokens, "temperature": 0 if n == 1 else 1, "stream": True, "n": n}
        self._url = server.url + "/v1/completions"
        self.thread = threading.Thread(target=self._read, daemon=True)
        self.thread.start()

    def _read(self) -> None:
        with httpx.stream("POST", self._url, json=self._body, timeout=60) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    for choice in json.loads(line[6:])["choices"]:
                        self.text += choice["text"]
                        self.reason = choice["finish_reason"] or self.reason


def rank_memory(server: RunningServer) -> int:
    """Bytes of memory that the ranks have, each shared page by its share."""
    below = psutil.Process(server.pid).children(recursive=True)
    ranks = [process for process in below if "lockstep.executor.worker_main" in process.cmdline()]
    assert len(ranks) == 2
    return sum(process.memory_full_info().pss for process in ranks)


def test_all_is_well(server: RunningServer) -> None:
    for path in ("/health", "/livez", "/readyz", "/ready", "/startupz"):
        get(server, path)
    assert get(server, "/load")["kv_cache_usage"] == 0


def test_load_is_of_this_moment(server: RunningServer) -> None:
    assert get(server, "/load")["server_load"] == 0
    streams = [Streaming(server) for _ in range(2)]
    until(lambda: all(stream.text for stream in streams))
    assert get(server, "/load")["server_load"] == 2
    for stream in streams:
        stream.thread.join(60)
    assert get(server, "/load")["server_load"] == 0
    several = Streaming(server, n=2)
    until(lambda: bool(several.text))
    assert get(server, "/load")["server_load"] == 1, "a request, of two completions"
    several.thread.join(60)


def test_a_pause_keeps_requests(server: RunningServer) -> None:
    want = Streaming(server)
    want.thread.join(60)
    stream = Streaming(server)
    until(lambda: len(stream.text) > 20)
    assert post(server, "/pause") == get(server, "/is_paused") == {"is_paused": True}
    time.sleep(0.3)  # what was on its way has come
    held = stream.text
    until(lambda: httpx.get(server.url + "/readyz").status_code == 503)
    assert get(server, "/readyz", 503)["status"] == "paused"
    get(server, "/livez"), get(server, "/health")
    (info,) = get(server, "/v1/requests")["data"]
    assert (info["replica"], info["state"]) == (0, "running") and info["output_tokens"] > 3 and info["age_s"] > 0
    assert stream.text == held, "it ran on"
    post(server, "/resume")
    stream.thread.join(60)
    assert stream.text == want.text and stream.reason == "length"
    until(lambda: httpx.get(server.url + "/readyz").status_code == 200)


def test_a_pause_may_abort(server: RunningServer) -> None:
    stream = Streaming(server)
    until(lambda: len(stream.text) > 20)
    post(server, "/pause?mode=abort")
    stream.thread.join(30)
    assert stream.reason == "abort"
    post(server, "/resume")
    assert httpx.post(server.url + "/pause?mode=later").status_code in (400, 422)
    assert get(server, "/is_paused") == {"is_paused": False}


def test_requests_of_any_client_can_be_aborted(server: RunningServer) -> None:
    streams = [Streaming(server) for _ in range(3)]
    until(lambda: all(len(stream.text) > 20 for stream in streams))
    names = [info["request_id"] for info in get(server, "/v1/requests")["data"]]
    assert post(server, "/abort_requests", json={"request_ids": [f"cmpl-{names[0]}", names[1][1:], "unknown"]}) == {"aborted": []}
    assert post(server, "/abort_requests", json={"request_ids": [names[0], "unknown"]}) == {"aborted": names[:1]}
    assert sorted(post(server, "/abort_requests", json={})["aborted"]) == sorted(names[1:])
    for stream in streams:
        stream.thread.join(30)
        assert stream.reason == "abort"
    until(lambda: get(server, "/load")["kv_cache_usage"] == 0)


@pytest.mark.parametrize("level", [1, 2])
def test_memory_of_a_sleeper_goes_back(server: RunningServer, level: int) -> None:
    """Running requests and cached prefixes are computed again: tokens are the same."""
    want = Streaming(server)
    want.thread.join(60)
    for i in range(40):
        complete(server, 2, f"{i} {PROMPT * 4}")  # pages of the cache are written
    stream = Streaming(server)
    until(lambda: len(stream.text) > 20)
    awake = rank_memory(server)
    assert post(server, f"/sleep?level={level}") == get(server, "/is_sleeping") == {"is_sleeping": True, "level": level}
    asleep = rank_memory(server)
    assert asleep < awake - (4 << 20) * level, f"{awake} bytes awake, {asleep} asleep"
    until(lambda: httpx.get(server.url + "/readyz").json()["status"] == "asleep")
    get(server, "/health")
    post(server, "/resume", 409)
    post(server, f"/sleep?level={3 - level}", 409)
    post(server, f"/sleep?level={level}")
    late = Streaming(server)
    time.sleep(0.2)
    assert not late.text
    assert post(server, "/wake_up") == {"is_sleeping": False} and get(server, "/is_sleeping") == {"is_sleeping": False, "level": 0}
    for one in (stream, late):
        one.thread.join(60)
        assert one.text == want.text and one.reason == "length"
    if level == 2:
        assert rank_memory(server) > asleep + (4 << 20)


def test_prefixes_are_forgotten(server: RunningServer) -> None:
    want = complete(server)
    assert post(server, "/reset_prefix_cache") == {"success": True}
    assert complete(server) == want


def test_a_profile_is_written(server: RunningServer) -> None:
    post(server, "/start_profile")
    complete(server, 4)
    trace = json.loads(Path(post(server, "/stop_profile")["path"]).read_text())
    names = {event["args"]["name"] for event in trace["traceEvents"] if event["name"] == "process_name"}
    assert names == {"replica 0 engine", "replica 0 rank 0", "replica 0 rank 1"}


def test_methods_of_ranks_are_not_for_everybody(server: RunningServer) -> None:
    assert httpx.post(server.url + "/collective_rpc", json={"method": "ping"}).status_code == 404
