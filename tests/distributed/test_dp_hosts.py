"""Replicas that another "host" keeps: a process of its own on loopback, or in a network namespace of its own."""

from __future__ import annotations

import contextlib
import logging
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from functools import cache

import msgspec
import pytest

from lockstep.cluster import greeting
from lockstep.cluster.greeting import Identity, RefusedError
from lockstep.cluster.supervisor import RestartPolicy
from lockstep.config.errors import ConfigError
from lockstep.engine.stats import EngineStats
from lockstep.executor.contract import ExecutorError
from lockstep.llm import LLM
from lockstep.protocol import SamplingParams
from lockstep.utils import procs
from tests.chaos.replica_jobs import PARAMS, PROMPTS, SMALL, once, streamed
from tests.distributed.dp_hosts_jobs import KEY, ROOT, KeeperProcess, all_ready, client, free_port, leader, plain

pytestmark = pytest.mark.timeout(180)


@cache
def undisturbed() -> list[list[int]]:
    with LLM(**SMALL) as llm:
        return streamed(llm)


class Hosts:
    """A leader and the keeper of its replica 1, which tests may replace."""

    def __init__(self) -> None:
        self.port = free_port()
        self.keeper = KeeperProcess(self.port)
        self.llm = leader(self.port)

    def again(self) -> None:
        """A new keeper in place of one that is gone."""
        self.keeper.kill()
        self.keeper = KeeperProcess(self.port)


@pytest.fixture(scope="module")
def hosts() -> Iterator[Hosts]:
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LOCKSTEP_CLUSTER_KEY", KEY)
        made = Hosts()
        with made.llm:
            yield made
        made.keeper.kill()


def finished(llm: LLM) -> list[int]:
    """How many requests each replica has finished."""
    return [msgspec.msgpack.decode(v, type=EngineStats).finished for _, v in client(llm)._call("stats")]


def test_answers_are_those_of_one_engine(hosts: Hosts) -> None:
    all_ready(hosts.llm)
    assert streamed(hosts.llm) == undisturbed()
    assert all(finished(hosts.llm)), "both hosts had requests"
    assert client(hosts.llm).pids()[1] == 0, "its process is not this host's"


def test_requests_go_where_they_ask_to(hosts: Hosts) -> None:
    all_ready(hosts.llm)
    few, before = SamplingParams(max_tokens=2), finished(hosts.llm)
    hosts.llm.generate(PROMPTS[:4], few, use_tqdm=False, data_parallel_rank=1)
    hosts.llm.generate(PROMPTS[:3], few, use_tqdm=False, data_parallel_rank=[0, 1, 0])
    assert [a - b for a, b in zip(finished(hosts.llm), before, strict=True)] == [2, 5]
    before = finished(hosts.llm)
    for _ in range(4):
        hosts.llm.generate(PROMPTS[:2], few, use_tqdm=False, session_id="talk")
    assert sorted(a - b for a, b in zip(finished(hosts.llm), before, strict=True)) == [0, 8]
    with pytest.raises(ValueError, match="data_parallel_rank=2 does not exist"):
        hosts.llm.generate(PROMPTS[:2], few, use_tqdm=False, data_parallel_rank=2)


def test_kill_9_of_the_remote_replica_is_not_seen(hosts: Hosts, caplog: pytest.LogCaptureFixture) -> None:
    all_ready(hosts.llm)
    victim = hosts.keeper.replica()
    assert streamed(hosts.llm, once(200, lambda: os.kill(victim, signal.SIGKILL))) == undisturbed()
    assert f"replica 1 on host {socket.gethostname()} is lost" in caplog.text
    all_ready(hosts.llm)
    assert hosts.keeper.replica() != victim and "replica 1 ended (killed by SIGKILL)" in hosts.keeper.said()
    assert streamed(hosts.llm) == undisturbed(), "the new replica answers as the old one"


def test_kill_9_of_the_keeper_is_not_seen(hosts: Hosts) -> None:
    all_ready(hosts.llm)
    everyone = hosts.keeper.everyone()
    assert streamed(hosts.llm, once(200, hosts.keeper.kill)) == undisturbed()
    assert procs.wait_gone(everyone, 10) == [], "a replica outlived its keeper"
    (there,) = hosts.llm.generate(PROMPTS[0], PARAMS[0], use_tqdm=False, data_parallel_rank=1)
    assert list(there.outputs[0].token_ids) == undisturbed()[0], "what asks for it meanwhile runs elsewhere"
    hosts.again()
    all_ready(hosts.llm)
    assert streamed(hosts.llm) == undisturbed()


@pytest.mark.full
@pytest.mark.timeout(400)
def test_a_remote_replica_that_works_is_never_given_up(hosts: Hosts) -> None:
    """More deaths than a replica may have in a row without work, and both hosts answer after each."""
    few = SamplingParams(max_tokens=2)
    for number in range(RestartPolicy().most_failures + 1):
        all_ready(hosts.llm)
        for replica in (0, 1):
            hosts.llm.generate(PROMPTS[0], few, use_tqdm=False, data_parallel_rank=replica)
        os.kill(hosts.keeper.replica(), signal.SIGKILL)
        deadline = time.monotonic() + 10
        while client(hosts.llm).book.loads[1].routable:
            assert time.monotonic() < deadline, f"death {number} was not noticed"
            client(hosts.llm).step()
    all_ready(hosts.llm)
    assert "given up" not in hosts.keeper.said()


def test_ctrl_c_on_the_keeper_is_not_seen(hosts: Hosts) -> None:
    all_ready(hosts.llm)
    everyone = hosts.keeper.everyone()
    tokens = streamed(hosts.llm, once(200, lambda: hosts.keeper.process.send_signal(signal.SIGINT)))
    assert tokens == undisturbed()
    assert hosts.keeper.end() == 130 and procs.wait_gone(everyone, 10) == []
    hosts.again()
    all_ready(hosts.llm)


def offered(port: int, settings: dict[str, str], key: str = KEY, **changes: object) -> str:
    """What the leader says to a replica that is offered with these words."""
    lockstep, torch = greeting.versions()
    who = Identity(1, os.urandom(16), "elsewhere", 7, lockstep, torch, settings)
    with socket.create_connection(("127.0.0.1", port), 5) as connection, pytest.raises(RefusedError) as found:
        greeting.greet(connection, key, msgspec.structs.replace(who, **changes), time.monotonic() + 5)
    return str(found.value)


def test_who_does_not_fit_is_refused_by_name(hosts: Hosts, caplog: pytest.LogCaptureFixture) -> None:
    all_ready(hosts.llm)
    config = client(hosts.llm)._config
    ours = greeting.agreed_settings(config, hosts.llm.spec, hosts.llm.folder)
    refusals = [
        offered(hosts.port, ours, key="wrong"),
        offered(hosts.port, ours, lockstep="0.0.0"),
        offered(hosts.port, ours, torch="1.0"),
        offered(hosts.port, {**ours, "dtype": "float16"}),
        offered(hosts.port, {**ours, "model": "0123"}),
        offered(hosts.port, ours, number=0),
        offered(hosts.port, ours, number=9),
        offered(hosts.port, ours),
    ]
    words = ["LOCKSTEP_CLUSTER_KEY", "lockstep 0.0.0", "torch 1.0", "dtype=float16", "its model is another one"]
    words += ["replica 0 is not one that another host may keep", "replica 9 is not one", "replica 1 is taken by host"]
    for refusal, word in zip(refusals, words, strict=True):
        assert word in refusal and word in caplog.text
    with socket.create_connection(("127.0.0.1", hosts.port), 5) as stranger:
        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
        with contextlib.suppress(ConnectionResetError):
            while stranger.recv(1000):
                pass
    assert "did not greet as a keeper of replicas does" in caplog.text
    assert streamed(hosts.llm) == undisturbed(), "and nobody else noticed"


def test_a_keeper_that_is_refused_says_why_and_ends(hosts: Hosts) -> None:
    all_ready(hosts.llm)
    wrong_key, wrong_seed = KeeperProcess(hosts.port, key="wrong"), KeeperProcess(hosts.port, "--seed", "5")
    assert (wrong_key.end(), wrong_seed.end()) == (2, 2)
    assert "refused replica 1: its LOCKSTEP_CLUSTER_KEY is not the leader's" in plain(wrong_key.said())
    assert "has --seed=5 and the leader --seed=0" in plain(wrong_seed.said())


def test_the_leaders_end_is_the_keepers(hosts: Hosts) -> None:
    """The last of the module: it ends the leader."""
    all_ready(hosts.llm)
    everyone = hosts.keeper.everyone()
    hosts.llm.shutdown()
    assert hosts.keeper.end() == 0, hosts.keeper.said()
    assert procs.wait_gone(everyone, 10) == []
    with socket.socket() as probe:
        assert probe.connect_ex(("127.0.0.1", hosts.port)) != 0, "the port is still held"


def test_a_leader_that_is_killed_is_named() -> None:
    port = free_port()
    words = f"LLM(data_parallel_size=2, data_parallel_size_local=1, data_parallel_rpc_port={port}, **{SMALL!r})"
    code = f"from lockstep.llm import LLM; import time; llm = {words}; print('up', flush=True); time.sleep(600)"
    keeper = KeeperProcess(port)
    environment = {**os.environ, "LOCKSTEP_CLUSTER_KEY": KEY, "PYTHONPATH": str(ROOT)}
    other = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, env=environment, cwd=ROOT)
    try:
        assert other.stdout is not None and other.stdout.readline() == b"up\n"
        everyone = keeper.everyone()
        other.kill()
        assert keeper.end() == 1
        assert f"the leader at 127.0.0.1:{port} is gone" in plain(keeper.said())
        assert procs.wait_gone(everyone, 10) == []
    finally:
        other.kill()
        other.wait(10)
        keeper.kill()


def test_a_port_that_is_taken_and_hosts_that_do_not_come(monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with pytest.raises(ConfigError, match=f"data_parallel_rpc_port={port}: .*in use"):
            leader(port)
    port = free_port()
    with pytest.raises(
        ExecutorError, match=rf"replica 1 has not reported at 127\.0\.0\.1:{port} in 8 s: start `lockstep generate MODEL --headless"
    ):
        leader(port, startup_timeout_seconds=8.0)
    keeper = KeeperProcess(port, "--startup-timeout-seconds", "1")
    assert keeper.end() == 1 and "was not reached in --startup-timeout-seconds=1" in plain(keeper.said())


def test_a_leader_without_replicas_takes_requests_for_a_host_that_has_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCKSTEP_CLUSTER_KEY", KEY)
    port = free_port()
    keeper = KeeperProcess(port, place=())
    try:
        with leader(port, data_parallel_size_local=0) as llm:
            assert client(llm).pids() == [0, 0], "both replicas are the other host's"
            assert streamed(llm) == undisturbed() and all(finished(llm))
        assert keeper.end() == 0, keeper.said()
    finally:
        keeper.kill()


# --- two network namespaces ---


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True, capture_output=True, timeout=20)


@pytest.fixture
def other_host() -> Iterator[tuple[str, str]]:
    """(name of a network namespace, this side's interface): 10.231.x.1 is here, 10.231.x.2 there."""
    name, number = f"ls{os.getpid() % 100000}", os.getpid() % 250
    here, there = f"{name}a", f"{name}b"
    try:
        _ip("netns", "add", name)
    except (OSError, subprocess.SubprocessError) as e:
        pytest.skip(f"the kernel gives no network namespace here: {e}")
    try:
        try:
            _ip("link", "add", here, "type", "veth", "peer", "name", there, "netns", name)
        except subprocess.SubprocessError as e:
            pytest.skip(f"the kernel gives no veth pair here: {e}")
        _ip("addr", "add", f"10.231.{number}.1/24", "dev", here)
        _ip("link", "set", here, "up")
        _ip("-n", name, "addr", "add", f"10.231.{number}.2/24", "dev", there)
        _ip("-n", name, "link", "set", there, "up")
        _ip("-n", name, "link", "set", "lo", "up")
        yield name, here
    finally:
        with contextlib.suppress(subprocess.SubprocessError):
            _ip("link", "del", here)
        _ip("netns", "del", name)


@pytest.mark.full
def test_a_partition_in_the_middle(other_host: tuple[str, str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setenv("LOCKSTEP_CLUSTER_KEY", KEY)
    caplog.set_level(logging.INFO, "lockstep")
    netns, interface = other_host
    address, port = f"10.231.{os.getpid() % 250}.1", free_port()
    keeper = KeeperProcess(port, host=address, netns=netns)
    try:
        with leader(port, data_parallel_address=address) as llm:
            cut_s: list[float] = []

            def disturb(number: int) -> None:
                if number >= 200 and not cut_s:
                    _ip("-n", netns, "link", "set", interface[:-1] + "b", "down")
                    cut_s.append(time.monotonic())

            assert streamed(llm, disturb) == undisturbed()
            took_s = time.monotonic() - cut_s[0]
            assert took_s < 25, "the partition was noticed too late"
            assert f"replica 1 on host {socket.gethostname()} is lost: its host does not answer any more (" in caplog.text
            print(f"\nfrom the cut to the last token {took_s:.1f} s: {[r.message for r in caplog.records if 'is lost' in r.message]}")
            _ip("-n", netns, "link", "set", interface[:-1] + "b", "up")
            all_ready(llm)
            assert streamed(llm) == undisturbed()
            everyone = keeper.everyone()
        assert keeper.end() == 0 and procs.wait_gone(everyone, 10) == []
    finally:
        keeper.kill()
