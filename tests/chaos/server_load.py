"""A server under load while its processes are killed and stopped: `python -m tests.chaos.server_load --minutes 30 --out FILE`.

64 clients ask without pause, streaming or not, with prompts and answers of mixed length; a tenth of them hang up in the middle.
At every strike one process of the server (the engine's, a replica's or a rank's, chosen at random) is killed or stopped. Asked of it:

    every request ends once: with the tokens of the undisturbed run, or because its client hung up
    at the end: nothing runs, no KV block is held, memory is what it was, and nothing is left of the server when it has ended
"""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import random
import signal
import tempfile
import time
from collections import Counter
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx
import psutil

from lockstep.testing.server import RunningServer, running_server

CLIENTS, KINDS, CANCELLED = 64, 24, 0.1
PROMPTS = [f"def function_{i}(a, b):\n    " * (1 + i % 7 * 3) for i in range(KINDS)]
TOKENS = [8 + i * 37 % 90 for i in range(KINDS)]
RECOVER_S, CLIENT_S = 120.0, 240.0
ROLES = {"engine": "lockstep.frontend.engine_process", "replica": "lockstep.cluster.replica_main", "rank": "lockstep.executor.worker_main"}


@dataclass
class Score:
    """What became of the requests, and of the server."""

    outcomes: Counter[str] = field(default_factory=Counter)
    wrong: list[str] = field(default_factory=list)
    strikes: Counter[str] = field(default_factory=Counter)
    recoveries_s: list[float] = field(default_factory=list)
    memory_mb: list[float] = field(default_factory=list)  # of all processes, whenever all were well
    slowest_s: float = 0.0


def body(kind: int, stream: bool) -> dict[str, Any]:
    return {"prompt": PROMPTS[kind], "max_tokens": TOKENS[kind], "temperature": 0, "stream": stream}


async def ask(client: httpx.AsyncClient, url: str, kind: int, stream: bool, leave_after: int | None = None) -> tuple[str, str]:
    """(finish reason, text) of one request. leave_after: hang up after so many chunks ("cancelled")."""
    if not stream:
        if leave_after is not None:
            with contextlib.suppress(httpx.TimeoutException):
                await client.post(f"{url}/v1/completions", json=body(kind, False), timeout=0.02 * leave_after)
            return "cancelled", ""
        answer = await client.post(f"{url}/v1/completions", json=body(kind, False))
        if answer.status_code != 200:
            return f"status {answer.status_code}", answer.text
        (choice,) = answer.json()["choices"]
        return choice["finish_reason"], choice["text"]
    text, reasons, chunks, done = "", [], 0, False
    async with client.stream("POST", f"{url}/v1/completions", json=body(kind, True)) as answer:
        if answer.status_code != 200:
            return f"status {answer.status_code}", (await answer.aread()).decode()
        async for line in answer.aiter_lines():
            done = done or line == "data: [DONE]"
            if line.startswith("data: {"):
                data = json.loads(line[6:])
                if "error" in data:
                    return "error", str(data["error"])
                for choice in data["choices"]:
                    text += choice["text"]
                    reasons += [choice["finish_reason"]] if choice["finish_reason"] else []
                chunks += 1
                if leave_after is not None and chunks >= leave_after:
                    return "cancelled", text
    return (reasons[0] if done and len(reasons) == 1 else f"lost: {reasons}, done: {done}"), text


def below(server: RunningServer) -> dict[str, list[psutil.Process]]:
    """The server's processes by what they are."""
    found: dict[str, list[psutil.Process]] = {role: [] for role in ROLES}
    for process in psutil.Process(server.pid).children(recursive=True):
        with contextlib.suppress(psutil.Error):
            line = process.cmdline()
            for role, module in ROLES.items():
                if module in line:
                    found[role].append(process)
    return found


def memory_mb(server: RunningServer) -> float:
    """Of all processes together, each shared page by its share. One that ends meanwhile (a stuck rank that was replaced) has none."""
    total = 0
    for process in (psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)):
        with contextlib.suppress(psutil.NoSuchProcess):
            total += process.memory_full_info().pss
    return total / 1e6


class Load:
    """Clients, and somebody who strikes."""

    def __init__(self, server: RunningServer, want: list[tuple[str, str]], until_s: float, every_s: float, seed: int) -> None:
        self.server, self.want, self.until_s, self.every_s = server, want, until_s, every_s
        self.score, self.random = Score(), random.Random(seed)

    async def run(self) -> Score:
        limits = httpx.Limits(max_connections=2 * CLIENTS)
        async with httpx.AsyncClient(timeout=CLIENT_S, limits=limits) as client:
            await asyncio.gather(self.strike(client), *(self.client(client, random.Random(i)) for i in range(CLIENTS)))
        return self.score

    async def client(self, client: httpx.AsyncClient, source: random.Random) -> None:
        while time.monotonic() < self.until_s:
            kind, stream = source.randrange(KINDS), source.random() < 0.5
            leave = source.randrange(1, 6) if source.random() < CANCELLED else None
            began_s = time.monotonic()
            try:
                reason, text = await ask(client, self.server.url, kind, stream, leave)
            except httpx.HTTPError as e:
                reason, text = f"lost: {e!r}", ""
            self.score.outcomes[reason.partition(":")[0]] += 1
            self.score.slowest_s = max(self.score.slowest_s, time.monotonic() - began_s)
            right = self.want[kind][1].startswith(text) if leave is not None else (reason, text) == self.want[kind]
            if not right:
                self.score.wrong.append(f"{reason}, kind {kind}, stream {stream}: {text[:200]!r}")

    async def strike(self, client: httpx.AsyncClient) -> None:
        while time.monotonic() + self.every_s < self.until_s:
            await asyncio.sleep(self.every_s)
            found = below(self.server)
            role = self.random.choice([role for role, processes in found.items() if processes])
            victim, how = self.random.choice(found[role]), self.random.choice([signal.SIGKILL, signal.SIGSTOP])
            began_s = time.monotonic()
            with contextlib.suppress(psutil.NoSuchProcess):
                victim.send_signal(how)
            self.score.strikes[f"{how.name} {role}"] += 1
            await asyncio.sleep(1.0)
            await self.well(client)
            self.score.recoveries_s.append(time.monotonic() - began_s)
            self.score.memory_mb.append(memory_mb(self.server))

    async def well(self, client: httpx.AsyncClient) -> None:
        """Until every rank answers."""
        give_up_s = time.monotonic() + RECOVER_S
        while (answer := await client.get(f"{self.server.url}/health")).status_code != 200:
            assert time.monotonic() < give_up_s, f"it did not recover: {answer.text}\n{self.server.said()[-5000:]}"
            await asyncio.sleep(0.1)


async def undisturbed(server: RunningServer) -> list[tuple[str, str]]:
    async with httpx.AsyncClient(timeout=CLIENT_S) as client:
        return await asyncio.gather(*(ask(client, server.url, kind, stream=False) for kind in range(KINDS)))


def shared_memory() -> set[str]:
    folder = Path("/dev/shm")
    return {path.name for path in folder.iterdir()} if folder.is_dir() else set()


def settled(server: RunningServer) -> dict[str, Any]:
    """The server's load once nothing runs any more."""
    give_up_s = time.monotonic() + 20
    while True:
        load: dict[str, Any] = httpx.get(f"{server.url}/load").json()
        if not load["server_load"] and not load["kv_cache_usage"]:
            return load
        assert time.monotonic() < give_up_s, f"requests or KV blocks are left: {load}"
        time.sleep(0.2)


def chaos(minutes: float, *, every_s: float = 60.0, tp: int = 2, dp: int = 1, seed: int = 0) -> dict[str, Any]:
    """Run it; the summary. Raises AssertionError when anything is lost, wrong or left over."""
    before = shared_memory()
    with tempfile.TemporaryDirectory() as incidents:
        flags = ["--incident-dir", incidents, "--kv-cache-memory-bytes", "64M", "-dp", str(dp), "--max-num-seqs", "32"]
        with running_server(*flags, tp=tp) as server:
            want = asyncio.run(undisturbed(server))
            assert all(reason in ("length", "stop") for reason, _ in want), want
            began_s = time.monotonic()
            score = asyncio.run(Load(server, want, began_s + 60 * minutes, every_s, seed).run())
            seconds = time.monotonic() - began_s
            assert not score.wrong, f"{len(score.wrong)} of {score.outcomes}: {score.wrong[:5]}\n{server.said()[-5000:]}"
            settled(server)
            score.memory_mb.append(memory_mb(server))
            everyone = [psutil.Process(server.pid), *psutil.Process(server.pid).children(recursive=True)]
            port, code, files = server.port, server.stop(), len(list(Path(incidents).glob("*.json")))
        assert code == 0, f"exit code {code}"
    alive = [process for process in everyone if process.is_running() and process.status() != psutil.STATUS_ZOMBIE]
    assert not alive, f"left running: {alive}"
    assert not {name for name in shared_memory() - before if "lockstep" in name}, "shared memory is left"
    assert port not in {one.laddr.port for one in psutil.net_connections("tcp") if one.status == psutil.CONN_LISTEN}, "the port is held"
    first, last = score.memory_mb[0], score.memory_mb[-1]
    longest = sorted(score.recoveries_s)
    return {
        "minutes": round(seconds / 60, 2),
        "clients": CLIENTS,
        "tp": tp,
        "dp": dp,
        "requests": score.outcomes.total(),
        "outcomes": dict(score.outcomes),
        "lost": score.outcomes["lost"],
        "wrong": len(score.wrong),
        "strikes": dict(score.strikes),
        "incident_files": files,
        "recovery_s": {"median": round(longest[len(longest) // 2], 2), "longest": round(longest[-1], 2)},
        "slowest_request_s": round(score.slowest_s, 2),
        "memory_mb": {"after_first_strike": round(first, 1), "at_the_end": round(last, 1)},
        "cores": os.cpu_count(),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--every", type=float, default=60.0, help="seconds between strikes")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--dp", type=int, default=1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--out", type=Path)
    given = parser.parse_args()
    line = json.dumps(chaos(given.minutes, every_s=given.every, tp=given.tp, dp=given.dp, seed=given.seed))
    print(line)
    if given.out is not None:
        given.out.write_text(line + "\n")


if __name__ == "__main__":
    main()
