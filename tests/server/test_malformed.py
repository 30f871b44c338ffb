"""Thousands of requests that are wrong in every way, and good ones beside them: no crash, no 500, and every good one exactly right."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import json
import random
import subprocess
import sys
from collections.abc import Iterator

import httpx
import psutil
import pytest

from lockstep.testing.server import RunningServer, running_server
from tests.server import malformed

READ_S = 2.0  # what the server waits for the rest of a request here
AT_ONCE = 8
ALONE, ALONE_SHARE = 60, 10  # good requests before the wrong ones: at least so many, and one for so many of those
GOOD_S = 10.0  # nothing that is sent beside holds a good request up for longer, on any machine
ELSEWHERE_SHARE = 3  # of the wrong ones, one in so many goes elsewhere first
HUGE_EVERY, RAW_EVERY = 60, 5  # of all requests


class Storm:
    """Sends wrong requests and, beside them, good ones."""

    def __init__(self, server: RunningServer, count: int, seed: int) -> None:
        self._url, self._port, self._count, self._seed = server.url, server.port, count, seed
        self.statuses: collections.Counter[int] = collections.Counter()
        self.faults: list[str] = []
        self.alone_s: list[float] = []  # how long good requests take when nothing else is asked
        self.elsewhere_s: list[float] = []  # while the wrong ones are made on this machine, and go to nobody
        self.beside_s: list[float] = []  # and beside them

    def run(self, right: str) -> None:
        with good_requests(self._url, right, max(ALONE, self._count // ALONE_SHARE)) as alone:
            self.alone_s = took_s(alone)
        with sink() as port, good_requests(self._url, right) as elsewhere:
            asyncio.run(self._wrong(port, self._count // ELSEWHERE_SHARE))
            self.elsewhere_s = took_s(elsewhere)
        self.statuses.clear()
        self.faults.clear()
        with good_requests(self._url, right) as beside:
            asyncio.run(self._wrong(self._port, self._count))
            self.beside_s = took_s(beside)

    async def _wrong(self, port: int, count: int) -> None:
        limits = httpx.Limits(max_connections=AT_ONCE)
        async with httpx.AsyncClient(base_url=f"http://127.0.0.1:{port}", timeout=100, limits=limits) as client:
            places = asyncio.Semaphore(AT_ONCE)
            await asyncio.gather(*(self._one(number, client, places) for number in range(count)))

    async def _one(self, number: int, client: httpx.AsyncClient, places: asyncio.Semaphore) -> None:
        rng = random.Random(self._seed * 1_000_003 + number)
        async with places:
            if number % RAW_EVERY == 0:
                status = await self._raw(client.base_url.port or 0, malformed.raw(rng))
                what, asked = "raw", False
            else:
                path = rng.choice(malformed.PATHS)
                body = malformed.huge(rng) if number % HUGE_EVERY == 1 else malformed.bytes_of(rng)
                what, asked = f"{path} {body[:300]!r}", b'"timeout"' in body
                status = await self._post(client, path, body, rng)
        self.statuses[status] += 1
        if status >= 500 and not (status == 504 and asked):  # a time limit of 1e-300 s is one
            self.faults.append(f"request {number} of seed {self._seed}: {status} for {what}")

    async def _post(self, client: httpx.AsyncClient, path: str, body: bytes, rng: random.Random) -> int:
        kind = rng.choice(("application/json", "application/json", "application/json", "text/plain", ""))
        headers = {"X-Request-Timeout": "20"} | ({"Content-Type": kind} if kind else {})
        try:
            return (await client.post(path, content=body, headers=headers)).status_code
        except httpx.TimeoutException:
            return 599  # nothing may take so long
        except httpx.TransportError:
            return 0  # hung up on

    async def _raw(self, port: int, data: bytes) -> int:
        reader, writer = await asyncio.open_connection("127.0.0.1", port)
        try:
            writer.write(data)
            await writer.drain()
            answer = await asyncio.wait_for(reader.read(1 << 16), READ_S + 20)
        except ConnectionError:
            return 0
        except TimeoutError:
            return 598  # it keeps who says nothing more
        finally:
            writer.close()
        parts = answer.split(b" ", 2)
        return int(parts[1]) if len(parts) > 1 and parts[1].isdigit() else 0

    def latency(self) -> dict[str, float]:
        """Of good requests alone, while the wrong ones are sent elsewhere, and beside them, in ms.

        The machine that serves makes the wrong ones too: the second says what that costs alone.
        """
        found: dict[str, float] = {"requests": self._count, "good_alone": len(self.alone_s), "good_beside": len(self.beside_s)}
        for name, unsorted_s in (("alone", self.alone_s), ("elsewhere", self.elsewhere_s), ("beside", self.beside_s)):
            each_s = sorted(unsorted_s)
            at = {"p50": len(each_s) // 2, "p99": int(0.99 * (len(each_s) - 1)), "max": -1}
            found |= {f"{name}_{what}_ms": round(1e3 * each_s[i], 2) for what, i in at.items()}
        for other in ("alone", "elsewhere"):
            found |= {f"{what}_by_{other}": round(found[f"beside_{what}_ms"] / found[f"{other}_{what}_ms"], 2) for what in ("p50", "p99")}
        return found


@contextlib.contextmanager
def sink() -> Iterator[int]:
    """The port of a process that answers every request with 400 at once (see that module)."""
    with subprocess.Popen([sys.executable, "-m", "tests.server.sink"], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        try:
            yield int(process.stdout.readline())
        finally:
            process.kill()


@contextlib.contextmanager
def good_requests(url: str, right: str, count: int = 0) -> Iterator[subprocess.Popen[str]]:
    """A process that makes them (see that module)."""
    command = [sys.executable, "-m", "tests.server.good_requests", url, right, str(count)]
    process = subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    try:
        yield process
    finally:
        process.kill()
        process.communicate()


def took_s(process: subprocess.Popen[str]) -> list[float]:
    """How long each good request took, once those under way are done."""
    out, err = process.communicate(timeout=100)
    assert process.returncode == 0, err
    found: list[float] = json.loads(out)
    return found


def ask(server: RunningServer) -> str:
    text: str = httpx.post(f"{server.url}/v1/completions", json=malformed.GOOD, timeout=60).json()["choices"][0]["text"]
    return text


def storm(count: int, seed: int) -> None:
    with running_server("--request-read-timeout", str(READ_S), tp=1) as server:
        right, before = ask(server), [p.pid for p in psutil.Process(server.pid).children(recursive=True)]
        found = Storm(server, count, seed)
        found.run(right)
        assert not found.faults, "\n".join(found.faults[:10]) + f"\n{found.statuses}\n{server.said()[-3000:]}"
        assert found.beside_s, "no good request was made beside"
        print(json.dumps(found.latency()))  # figures to look at, with -s: no test fails for them
        assert max(found.beside_s) < GOOD_S, found.latency()
        assert len(found.beside_s) >= count // 100 and found.statuses[400] > count // 10, found.statuses
        assert server.process.poll() is None and ask(server) == right
        assert [p.pid for p in psutil.Process(server.pid).children(recursive=True)] == before, "something was restarted"
        assert server.stop() == 0


def test_300_wrong_requests() -> None:
    storm(300, seed=1)


@pytest.mark.full
@pytest.mark.timeout(3000)
def test_10_000_wrong_requests() -> None:
    for seed in range(4):
        storm(2500, seed=10 + seed)
