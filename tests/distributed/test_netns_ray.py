"""A Ray cluster over hosts that are network namespaces: a stage on each, a cable pulled, healed, started again."""

from __future__ import annotations

import contextlib
import os
import re
import secrets
import signal
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from lockstep.testing.executors import wait_for
from lockstep.testing.nodes import Agent
from lockstep.utils import procs
from tests.distributed.test_netns import Net, network, tokens_of

__all__ = ["network"]  # the fixture

PORT = 6379
DEMO = ["--temperature", "0", "--prompt", "def add(a, b):", "--max-model-len", "2048", "--ignore-eos"]


class Cluster:
    """`ray start` on every host of a network, host 0 the head."""

    def __init__(self, net: Net, folder: str) -> None:
        self.net, self.folder = net, folder
        self.environment = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "PYTHONPATH": str(Path(__file__).parents[2])}
        for host in range(len(net.hosts)):
            self.start(host)

    def start(self, host: int) -> None:
        more = ["--address", f"{self.net.address(0)}:{PORT}"]
        if host == 0:
            more = ["--head", "--port", str(PORT), "--include-dashboard=false", "--temp-dir", self.folder]
        more += ["--node-ip-address", self.net.address(host), "--num-cpus", "1", "--object-store-memory", str(100 << 20)]
        command = [str(Path(sys.executable).with_name("ray")), "start", "--block", *more]
        # They do share memory, and are told that they do not.
        node = self.exec(host, command, LOCKSTEP_HOST_ID=self.net.hosts[host])
        assert wait_for(lambda: "Ray runtime started" in node.said() or node.process.poll() is not None, 90), node.said()
        assert node.process.poll() is None, node.said()

    def exec(self, host: int, command: list[str], **environment: str) -> Agent:
        found = Agent(["ip", "netns", "exec", self.net.hosts[host], *command], {**self.environment, **environment})
        self.net.running.append(found)
        return found

    def generate(self, *words: str) -> Agent:
        """The demo model on all hosts, started on the head's."""
        command = [sys.executable, "-m", "lockstep", "generate", *DEMO, "-pp", str(len(self.net.hosts)), *words]
        command += ["--distributed-executor-backend", "ray", "--node-timeout-seconds", "3", "--log-level", "info"]
        return self.exec(0, command, RAY_ADDRESS=f"{self.net.address(0)}:{PORT}", LOCKSTEP_HOST_ID=self.net.hosts[0])

    def pids(self, host: int) -> list[int]:
        listed = subprocess.run(["ip", "netns", "pids", self.net.hosts[host]], capture_output=True, text=True, timeout=20).stdout
        return [int(pid) for pid in listed.split()]

    def end(self, host: int) -> None:
        """Ray's processes too: `ray stop` would end those of other clusters of this machine."""
        inside = self.pids(host)
        for pid in inside:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        procs.wait_gone(inside, 10)


@pytest.fixture
def cluster(network: Callable[[int], Net], request: pytest.FixtureRequest) -> Iterator[Cluster]:
    net = network(request.param)
    with tempfile.TemporaryDirectory(prefix="lsray", dir="/tmp") as folder:
        made = None
        try:
            made = Cluster(net, folder)
            yield made
        finally:
            for host in range(len(net.hosts)):
                if made is not None:
                    made.end(host)


def ranks_in(pids: list[int]) -> list[int]:
    """Those that are agents of lockstep, or their ranks."""
    found = []
    for pid in pids:
        with contextlib.suppress(OSError):
            words = Path(f"/proc/{pid}/cmdline").read_bytes()
            if b"lockstep" in words or b"AgentHost" in words:
                found.append(pid)
    return found


@pytest.mark.full
@pytest.mark.timeout(400)
@pytest.mark.parametrize("cluster", [2, 3], indirect=True)
def test_a_pipeline_over_hosts_loses_one_and_starts_again(cluster: Cluster) -> None:
    hosts = len(cluster.net.hosts)
    words = [sys.executable, "-m", "lockstep", "generate", *DEMO, "--json", "--max-tokens", "12"]
    alone = subprocess.run(words, capture_output=True, text=True, timeout=100, check=True).stdout
    first = cluster.generate("--json", "--max-tokens", "12")
    assert first.wait(150) == 0, first.said()
    assert tokens_of(first.said()) == tokens_of(alone)
    addresses = [cluster.net.address(host) for host in range(hosts)]
    assert all(re.search(rf"node \d .* has connected from {re.escape(a)}", first.said()) for a in addresses), first.said()

    program = cluster.generate("--max-tokens", "2000")
    begun = lambda: len(program.said().rpartition("rank  weights")[2].splitlines()) > 4  # noqa: E731
    assert wait_for(lambda: begun() or program.process.poll() is not None, 100)
    assert program.process.poll() is None, program.said()
    ranks = [pid for host in range(hosts) for pid in ranks_in(cluster.pids(host))]
    assert len(ranks) > hosts
    lost = hosts - 1
    cluster.net.pull(lost)
    assert program.wait(40) == 1, program.said()
    assert re.search(rf"error: node \d \({re.escape(cluster.net.address(lost))}|error: node \d \(\S+, rank", program.said()), program.said()
    assert [Path(f"/proc/{pid}/cmdline").read_text() for pid in procs.wait_gone(ranks, 30)] == []

    cluster.net.plug(lost)
    cluster.end(lost)  # a node that Ray gave up ends by itself, sooner or later
    cluster.start(lost)
    again = cluster.generate("--json", "--max-tokens", "12")
    assert again.wait(150) == 0, again.said()
    assert tokens_of(again.said()) == tokens_of(alone)
