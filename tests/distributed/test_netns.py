"""Hosts as network namespaces: a cable each to one switch, addresses of their own, and cables that can be pulled.

All namespaces of a machine share its memory. That ranks of two of them find out and use it is right; here they are told
that they do not (LOCKSTEP_HOST_ID), so that everything between them goes over the wire.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx
import pytest

from lockstep.testing.executors import children_of, wait_for
from lockstep.testing.nodes import Agent, seconds
from lockstep.testing.tiny import make_tiny
from lockstep.utils import procs

PORT = 29501  # free: every host has ports of its own
PROMPT = "abc def ghi jkl"


def ip(*words: str) -> None:
    """Run iproute2. Raises RuntimeError with what it said."""
    done = subprocess.run(["ip", *words], capture_output=True, text=True, timeout=20)
    if done.returncode:
        raise RuntimeError(f"ip {' '.join(words)}: {done.stderr.strip()}")


class Net:
    """Hosts 0, 1, ... at 10.83.0.1, 10.83.0.2, ..., their cables in a switch that is a namespace too."""

    def __init__(self, hosts: int) -> None:
        self.tag = f"ls{secrets.token_hex(3)}"
        self.switch, self.hosts = f"{self.tag}-sw", [f"{self.tag}-h{i}" for i in range(hosts)]
        self.running: list[Agent] = []

    def build(self) -> None:
        """Raises RuntimeError where that is not allowed here."""
        ip("netns", "add", self.switch)
        ip("-n", self.switch, "link", "add", "sw", "type", "bridge")
        ip("-n", self.switch, "link", "set", "sw", "up")
        for i, host in enumerate(self.hosts):
            ip("netns", "add", host)
            ip("-n", host, "link", "add", "eth0", "type", "veth", "peer", "name", f"port{i}", "netns", self.switch)
            ip("-n", self.switch, "link", "set", f"port{i}", "master", "sw", "up")
            # A second interface that leads nowhere, like docker0 on many a host; it comes first by name and number.
            ip("-n", host, "link", "add", "docker0", "type", "bridge")
            ip("-n", host, "addr", "add", "172.17.0.1/16", "dev", "docker0")
            ip("-n", host, "link", "set", "docker0", "up")
            ip("-n", host, "addr", "add", f"{self.address(i)}/24", "dev", "eth0")
            ip("-n", host, "link", "set", "eth0", "up")
            ip("-n", host, "link", "set", "lo", "up")

    def address(self, host: int) -> str:
        return f"10.83.0.{host + 1}"

    def pull(self, host: int) -> None:
        """Pull the cable of a host at the switch: nothing arrives any more, and neither side is told."""
        ip("-n", self.switch, "link", "set", f"port{host}", "down")

    def plug(self, host: int) -> None:
        ip("-n", self.switch, "link", "set", f"port{host}", "up")

    def drop(self, host: int, peer: int) -> None:
        """What `host` sends to `peer` vanishes."""
        ip("-n", self.hosts[host], "route", "add", "blackhole", f"{self.address(peer)}/32")

    def run(self, host: int, *words: str, **environment: str) -> Agent:
        """`lockstep WORDS...` on a host."""
        command = ["ip", "netns", "exec", self.hosts[host], sys.executable, "-m", "lockstep", *words]
        found = Agent(command, {"LOCKSTEP_HOST_ID": self.hosts[host], "PYTHONPATH": str(Path(__file__).parents[2]), **environment})
        self.running.append(found)
        return found

    def remove(self) -> None:
        for program in self.running:
            program.close()
        for name in [*self.hosts, self.switch]:
            subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=20)
            shutil.rmtree(f"/etc/netns/{name}", ignore_errors=True)


@pytest.fixture
def network() -> Iterator[Callable[[int], Net]]:
    made: list[Net] = []

    def make(hosts: int) -> Net:
        net = Net(hosts)
        made.append(net)
        try:
            net.build()
        except (OSError, RuntimeError) as e:
            pytest.skip(f"no network namespaces here: {e}")
        return net

    yield make
    for net in made:
        net.remove()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny("llama", tmp_path_factory.mktemp("llama"), max_position_embeddings=65536))


def start(net: Net, model: str, split: list[str], *leader: str, master: str = "") -> list[Agent]:
    """A leader on host 0 that completes PROMPT, and the agents of all other hosts."""
    common = ["generate", model, "--nnodes", str(len(net.hosts)), "--master-addr", master or net.address(0), "--dtype", "float32"]
    common += ["--no-cpu-binding", "--node-timeout-seconds", "2", "--startup-timeout-seconds", "60", *split]
    agents = [net.run(i, *common, "--node-rank", str(i), "--headless") for i in range(1, len(net.hosts))]
    sizes = ["--max-model-len", "60000", "--num-gpu-blocks-override", "4000", "--temperature", "0", "--ignore-eos", "--prompt", PROMPT]
    return [net.run(0, *common, *sizes, *leader), *agents]


def tokens_of(text: str) -> list[int]:
    line = next(line for line in text.splitlines() if line.startswith("{"))
    found: list[int] = json.loads(line)["outputs"][0]["token_ids"]
    return found


def alone(model: str) -> list[int]:
    """What one process writes."""
    words = ["generate", model, "--dtype", "float32", "--max-model-len", "60000", "--num-gpu-blocks-override", "4000", "--quiet"]
    words += ["--temperature", "0", "--ignore-eos", "--prompt", PROMPT, "--json", "--max-tokens", "16"]
    done = subprocess.run([sys.executable, "-m", "lockstep", *words], capture_output=True, text=True, timeout=60, check=True)
    return tokens_of(done.stdout)


def complete(net: Net, model: str, split: list[str], **more: str) -> list[int]:
    """The tokens of a run that ends well everywhere."""
    programs = start(net, model, split, "--json", "--max-tokens", "16", **more)
    codes = [program.wait(60) for program in programs]
    assert codes == [0] * len(codes), "\n".join(program.said() for program in programs)
    return tokens_of(programs[0].said())


def cut_in_mid_decode(net: Net, model: str, split: list[str], cut: Callable[[], None]) -> list[Agent]:
    """Start something long, and cut once it writes. All have ended, and all their processes."""
    programs = start(net, model, split, "--max-tokens", "59000")
    begun = lambda: (text := programs[0].said().rpartition("rank  weights")[2]) and len(text.splitlines()) > 4  # noqa: E731
    assert wait_for(lambda: begun() or programs[0].process.poll() is not None, 60)
    below = [pid for program in programs for pid in children_of(program.pid)]
    assert all(program.process.poll() is None for program in programs), "\n".join(program.said() for program in programs)
    assert len(below) >= len(programs)
    started = time.monotonic()
    cut()
    codes = [program.wait(30) for program in programs]
    assert seconds(started) < 15
    assert codes == [1] * len(codes), "\n".join(program.said() for program in programs)
    assert procs.wait_gone(below, 5) == []
    return programs


def errors(program: Agent) -> str:
    return program.said().rpartition("error: ")[2]


def test_two_hosts_lose_each_other_and_start_again(network: Callable[[int], Net], tiny: str) -> None:
    net = network(2)
    before = set(os.listdir("/dev/shm"))
    leader, agent = cut_in_mid_decode(net, tiny, ["-tp", "2"], lambda: net.pull(1))
    assert re.match(r"node 1 \(\S+, rank 1\) is lost: (no sign of life for [2-4]|it cannot be reached)", errors(leader)), leader.said()
    assert re.match(r"node 1 of 2 lost the leader at 10\.83\.0\.1:29501: .* and ended its rank 1", errors(agent)), agent.said()
    net.plug(1)
    assert complete(net, tiny, ["-tp", "2"]) == alone(tiny)
    assert not set(os.listdir("/dev/shm")) - before


@pytest.mark.full
@pytest.mark.timeout(300)
def test_a_server_over_two_hosts_outlives_a_cable_that_is_pulled_and_plugged(network: Callable[[int], Net], tmp_path: Path) -> None:
    """Its Unix socket is the same in all namespaces."""
    net, uds = network(2), str(tmp_path / "socket")
    common = ["serve", "--nnodes", "2", "--master-addr", net.address(0), "-tp", "2", "--no-cpu-binding", "--node-timeout-seconds", "2"]
    common += ["--max-model-len", "1024", "--kv-cache-memory-bytes", "32M", "--startup-timeout-seconds", "60"]
    agent = net.run(1, *common, "--node-rank", "1", "--headless")
    leader = net.run(0, *common, "--uds", uds, "--incident-dir", str(tmp_path))
    assert wait_for(lambda: "lockstep serves" in leader.said() or leader.process.poll() is not None, 60)

    def stream(cut: Callable[[], None]) -> str:
        body = {"prompt": "def f(a):", "max_tokens": 500, "temperature": 0, "ignore_eos": True, "stream": True}
        text, parts, reasons = "", 0, []
        transport = httpx.HTTPTransport(uds=uds)
        with httpx.Client(transport=transport, timeout=90) as client, client.stream("POST", "http://a/v1/completions", json=body) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    (choice,) = json.loads(line[6:])["choices"]
                    text, parts, reasons = text + choice["text"], parts + 1, [*reasons, choice["finish_reason"]]
                    if parts == 20:
                        cut()
        assert reasons[-1] == "length" and set(reasons[:-1]) <= {None}, leader.said()
        return text

    def cut() -> None:
        net.pull(1)
        assert wait_for(lambda: "is lost" in leader.said() and "looks for the leader" in agent.said(), 20), leader.said() + agent.said()
        net.plug(1)

    undisturbed = stream(lambda: None)
    assert stream(cut) == undisturbed
    leader.process.terminate()
    assert (leader.wait(40), agent.wait(20)) == (0, 0), leader.said() + agent.said()


@pytest.mark.full
@pytest.mark.parametrize("split", [["-pp", "3"], ["-tp", "3"], ["-tp", "2", "-pp", "3"]], ids=" ".join)
def test_three_hosts_write_what_one_does(network: Callable[[int], Net], tiny: str, split: list[str]) -> None:
    assert complete(network(3), tiny, split) == alone(tiny)


@pytest.mark.full
@pytest.mark.parametrize(("victim", "how"), [(1, "pull"), (2, "pull"), (2, "drop"), (1, "back")])
def test_a_partition_of_three_hosts_names_the_one(network: Callable[[int], Net], tiny: str, victim: int, how: str) -> None:
    """drop: what the leader sends there vanishes; back: what the victim sends to the leader does."""
    net = network(3)
    cut = {"pull": lambda: net.pull(victim), "drop": lambda: net.drop(0, victim), "back": lambda: net.drop(victim, 0)}[how]
    leader, *agents = cut_in_mid_decode(net, tiny, ["-pp", "3"], cut)
    assert re.match(rf"node {victim} \(\S+, rank {victim}\) is lost: ", errors(leader)), leader.said()
    other = agents[2 - victim]
    assert re.match(rf"node {3 - victim} of 3 ended with its leader: node {victim} \(", errors(other)), other.said()


@pytest.mark.full
def test_two_ranks_on_each_of_two_hosts(network: Callable[[int], Net], tiny: str) -> None:
    net = network(2)
    assert complete(net, tiny, ["-tp", "4"]) == complete(net, tiny, ["-tp", "2", "-pp", "2"]) == alone(tiny)


@pytest.mark.full
def test_the_demo_over_two_hosts_that_share_memory(network: Callable[[int], Net], tiny: str) -> None:
    """Two namespaces of one machine are one host to the ranks, which is right: they do share its memory."""
    net = network(2)
    common = ["generate", "--nnodes", "2", "--master-addr", net.address(0), "-tp", "2", "--no-cpu-binding", "--log-level", "debug"]
    agent = net.run(1, *common, "-r", "1", "--headless", LOCKSTEP_HOST_ID="")
    leader = net.run(0, *common, "--prompt", "def f(", "--max-tokens", "8", LOCKSTEP_HOST_ID="")
    assert (leader.wait(60), agent.wait(60)) == (0, 0), leader.said() + agent.said()
    assert "communicator: shm: 2 ranks on one host" in leader.said()
    assert "at 10.83.0.2 (eth0)" in agent.said()
    assert "of 10.83.0.1 (eth0)" in leader.said()


@pytest.mark.full
def test_a_name_that_means_loopback_on_the_leader_is_refused(network: Callable[[int], Net], tiny: str) -> None:
    """Debian's installer maps a host's own name to 127.0.1.1."""
    net = network(2)
    folder = Path("/etc/netns") / net.hosts[0]
    folder.mkdir(parents=True)
    (folder / "hosts").write_text("127.0.0.1 localhost\n127.0.1.1 box0\n")
    (leader,) = [net.run(0, "generate", tiny, "--nnodes", "2", "-tp", "2", "--master-addr", "box0", "--prompt", "x")]
    assert leader.wait(30) == 2
    assert "--master-addr='box0' is 127.0.1.1 on this host, which no other host can reach" in leader.said()
    elsewhere = net.run(0, "generate", tiny, "--nnodes", "2", "-tp", "2", "--master-addr", "10.83.0.9", "--prompt", "x")
    assert elsewhere.wait(30) == 2
    assert "cannot listen on 10.83.0.9:29501" in elsewhere.said() and "LOCKSTEP_HOST_IP" in elsewhere.said()
