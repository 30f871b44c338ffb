"""What the tests of replicas on other hosts share: a leader in this process, and keepers that are processes like a host's."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

from lockstep.cluster.router import DataParallelClient
from lockstep.llm import LLM
from lockstep.utils.net import Listener
from tests.chaos.replica_jobs import SMALL, processes

ROOT = Path(__file__).parents[2]
FLAGS = [word for name, value in SMALL.items() for word in ("--" + name.replace("_", "-"), str(value))]
KEY = "a key that only these tests know"


def free_port() -> int:
    """A port that nobody has now; the leader takes it a moment later."""
    with Listener() as listener:
        return listener.port


class KeeperProcess:
    """`lockstep generate --headless ...` with what it says on standard error in a file."""

    def __init__(
        self,
        port: int,
        *flags: str,
        host: str = "127.0.0.1",
        key: str = KEY,
        netns: str = "",
        start: int = 1,
        size: int = 2,
        place: tuple[str, ...] | None = None,
    ) -> None:
        """place: flags that say which replicas it keeps; None: one, number `start`."""
        place = ("-dpl", "1", "-dpr", str(start)) if place is None else place
        self._said = tempfile.TemporaryFile()  # noqa: SIM115 (open as long as this lives)
        command = [sys.executable, "-m", "lockstep", "generate", "--headless", "-dp", str(size), *place]
        command += ["-dpa", host, "-dpp", str(port), "--startup-timeout-seconds", "90", "--log-level", "info", *FLAGS, *flags]
        self.process = subprocess.Popen(
            [*(["ip", "netns", "exec", netns] if netns else []), *command],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=self._said,
            cwd=ROOT,
            env={**os.environ, "LOCKSTEP_CLUSTER_KEY": key, "PYTHONPATH": str(ROOT)},
        )

    def said(self) -> str:
        self._said.seek(0)
        return self._said.read().decode(errors="replace")

    def replica(self) -> int:
        """The pid of its replica's process."""
        for child in psutil.Process(self.process.pid).children():
            if any("replica_main" in word for word in child.cmdline()):
                return child.pid
        raise AssertionError(f"no replica runs: {self.said()}")

    def everyone(self) -> list[int]:
        return [self.process.pid, *processes(self.replica())]

    def end(self, timeout_s: float = 40.0) -> int:
        """Wait for its end; the exit code."""
        try:
            return self.process.wait(timeout_s)
        except subprocess.TimeoutExpired:
            raise AssertionError(f"the keeper did not end: {self.said()}") from None

    def kill(self) -> None:
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGKILL)
            self.process.wait(10)


def leader(port: int, **settings: Any) -> LLM:
    given = {"data_parallel_size": 2, "data_parallel_size_local": 1, "data_parallel_rpc_port": port, "startup_timeout_seconds": 90.0}
    return LLM(**{**SMALL, **given, **settings})


def client(llm: LLM) -> DataParallelClient:
    assert isinstance(llm._client, DataParallelClient)
    return llm._client


def all_ready(llm: LLM, timeout_s: float = 60.0) -> None:
    """Wait until every replica takes requests."""
    deadline = time.monotonic() + timeout_s
    while not all(load.routable for load in client(llm).book.loads):
        assert time.monotonic() < deadline, "a replica did not come back"
        client(llm).step()


def plain(text: str) -> str:
    """Without line breaks and runs of spaces."""
    return re.sub(r"\s+", " ", text)
