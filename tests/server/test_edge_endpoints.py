"""Who is behind a server: one replica, supervised; this host's replicas; and ranks that are not this server's."""

from __future__ import annotations

import os
import re
import signal

import httpx
import psutil
import pytest

from lockstep.testing.executors import wait_for
from lockstep.testing.server import RunningServer, running_server

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


def check_numbers(server: RunningServer, numbers: list[int]) -> None:
    """Whatever the server shows or takes has the numbers that its replicas have over all hosts."""
    assert {word for _, words in replicas_of(server.pid) for word in words if word.startswith("replica=")} == {
        f"replica={number}" for number in numbers
    }
    for number in range(max(numbers) + 2):
        answer = httpx.post(f"{server.url}/v1/completions", json=ASK, headers={"X-data-parallel-rank": str(number)}, timeout=60)
        assert answer.status_code == (200 if number in numbers else 400), (number, answer.text)
    assert "does not exist" in answer.json()["error"]["message"]
    below = httpx.post(f"{server.url}/v1/completions", json=ASK, headers={"X-data-parallel-rank": "-1"}, timeout=60)
    assert below.status_code == 400 and "a whole number from 0" in below.text
    engines: dict[str, set[str]] = {}
    for name, labels in re.findall(r"^([\w:]+)\{(.*)\}", httpx.get(f"{server.url}/metrics").text, re.MULTILINE):
        if found := re.search(r'\bengine="(\d+)"', labels):
            engines.setdefault(name, set()).add(found[1])
    assert len(engines) > 20 and {frozenset(found) for found in engines.values()} == {frozenset(map(str, numbers))}, engines
    cluster = httpx.get(f"{server.url}/v1/cluster").json()["replicas"]
    assert [one["replica"] for one in cluster] == numbers
    assert sorted({rank["dp"] for one in cluster for rank in one["ranks"]}) == numbers


def unwell(server: RunningServer) -> set[int]:
    """The replicas of which /health says that they are not well."""
    return {one["replica"] for one in httpx.get(f"{server.url}/health").json().get("problems", [])}


@pytest.mark.parametrize(
    ("flags", "numbers"),
    [
        (("-dp", "4", "-dpn", "3"), [3]),
        (("-dp", "4", "-dpn", "3", "-dpe", "-dpl", "2"), [3]),
        (("-dp", "4", "-dph", "-dpl", "2", "-dpr", "2"), [2, 3]),
    ],
    ids=["external", "external, two a host", "hybrid"],
)
def test_a_server_has_its_own_replicas_and_they_are_started_again(flags: tuple[str, ...], numbers: list[int]) -> None:
    count = len(numbers)
    with running_server(*flags, tp=1) as server:
        running = replicas_of(server.pid)
        assert len(running) == count
        first = httpx.post(f"{server.url}/v1/completions", json=ASK, timeout=60).json()["choices"][0]["text"]
        check_numbers(server, numbers)
        long = ASK | {"max_tokens": 1500, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", f"{server.url}/v1/completions", json=long, timeout=60) as stream:
            next(stream.iter_lines())
        assert wait_for(lambda: re.search('finished_reason="abort".*} 1.0', httpx.get(f"{server.url}/metrics").text) is not None)
        engines = set(re.findall(r'engine="(\d+)"', httpx.get(f"{server.url}/metrics").text))
        assert engines == {str(number) for number in numbers}, "what a client ended counts for the replica that ran it"
        for pid, _ in running:
            os.kill(pid, signal.SIGKILL)
        assert wait_for(lambda: unwell(server) == set(numbers)), "the replicas are named as anywhere else"
        again = httpx.post(f"{server.url}/v1/completions", json=ASK, timeout=60)
        assert again.status_code == 200 and again.json()["choices"][0]["text"] == first
        assert wait_for(
            lambda: len(replicas_of(server.pid)) == count and not {p for p, _ in replicas_of(server.pid)} & {p for p, _ in running}
        )
        said = {int(number) for number in re.findall(r"\breplica (\d+)", server.said())}
        assert said == set(numbers), server.said()
        assert server.stop() == 0
