"""Several nodes on one machine for tests: this process is the leader, agents are subprocesses on loopback."""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

from lockstep.executor.contract import Executor
from lockstep.testing.executors import children_of, fake_executor
from lockstep.utils import procs


class Agent:
    """One node's program. Its output goes to a file, so that it never waits for a reader."""

    def __init__(self, command: Sequence[str], environment: dict[str, str] | None = None) -> None:
        self._log = tempfile.TemporaryFile("w+")  # noqa: SIM115 - closed by `close`
        self.process = subprocess.Popen(
            command, stdout=self._log, stderr=self._log, stdin=subprocess.DEVNULL, env={**os.environ, **(environment or {})}
        )
        self.ranks: list[int] = []

    @property
    def pid(self) -> int:
        return self.process.pid

    def wait(self, timeout_s: float = 20.0) -> int:
        """Its exit code."""
        return self.process.wait(timeout_s)

    def said(self) -> str:
        self._log.seek(0)
        return self._log.read()

    def close(self) -> None:
        """End it, if it has not ended, and its ranks."""
        below = children_of(self.pid) if self.process.poll() is None else []
        self.process.kill()
        self.process.wait()
        for pid in below:
            procs.kill_group(pid)
        self._log.close()


@contextmanager
def held_port(host: str = "127.0.0.1") -> Iterator[int]:
    """A port that only who asks for it by number gets: bound here without listening."""
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind((host, 0))
        yield int(holder.getsockname()[1])


@contextmanager
def held_ports(count: int, host: str = "127.0.0.1") -> Iterator[int]:
    """As `held_port`: the first of so many in a row."""
    for _ in range(100):
        with ExitStack() as held:
            first = held.enter_context(held_port(host))
            try:
                for port in range(first + 1, first + count):
                    holder = held.enter_context(socket.socket())
                    holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
                    holder.bind((host, port))
            except (OSError, OverflowError):
                continue
            yield first
            return
    raise AssertionError(f"there are no {count} free ports in a row")


@contextmanager
def fake_agent(environment: dict[str, str] | None = None, **settings: Any) -> Iterator[Agent]:
    """A node of fake workers; ended at the end."""
    agent = Agent([sys.executable, "-m", "lockstep.testing.fake_node", json.dumps({"cpu_binding": False, **settings})], environment)
    try:
        yield agent
    finally:
        agent.close()


@contextmanager
def fake_nodes(
    nnodes: int = 2, tp: int = 2, environment: dict[str, str] | None = None, **settings: Any
) -> Iterator[tuple[Executor, list[Agent]]]:
    """An executor of fake workers over several nodes, and the agents, by node rank from 1 on. Ended at the end."""
    agents: list[Agent] = []
    common = {"tp": tp, "nnodes": nnodes, "cpu_binding": False, "startup_s": 30.0, **settings}
    with held_port() as port:
        common["master_port"] = port
        try:
            for rank in range(1, nnodes):
                words = json.dumps({**common, "node_rank": rank})
                agents.append(Agent([sys.executable, "-m", "lockstep.testing.fake_node", words], environment))
            with fake_executor(**common) as executor:
                yield executor, agents
        finally:
            for agent in agents:
                agent.close()


def pids_by_rank(executor: Executor) -> list[int]:
    return [who["pid"] for who in executor.collective_rpc("who")]


def signal_and_wait(agent: Agent, number: signal.Signals, timeout_s: float = 20.0) -> int:
    """Signal the agent; its exit code."""
    os.kill(agent.pid, number)
    return agent.wait(timeout_s)


def seconds(since: float) -> float:
    return time.monotonic() - since
