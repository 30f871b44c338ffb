"""What ends on several nodes and is started again: agents join the leader's next start, and a server's streams do not notice."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import httpx
import pytest

from lockstep.config.errors import ConfigError
from lockstep.engine.core import EngineCore
from lockstep.executor.contract import ExecutorError
from lockstep.protocol import EngineRequest, SamplingParams
from lockstep.testing.executors import SPEC, children_of, decode_plan, fake_config, fake_executor, wait_for
from lockstep.testing.nodes import Agent, fake_agent, held_port, held_ports, pids_by_rank, seconds
from lockstep.testing.server import RunningServer, running_server
from lockstep.utils import procs


def steps(executor: Any) -> None:
    for step in range(3):
        assert executor.execute_model(decode_plan(step)).result(20).step == step


def test_an_agent_joins_the_next_start_after_any_rank_was_killed() -> None:
    with held_port() as port:
        common = {"tp": 2, "nnodes": 2, "master_port": port, "cpu_binding": False, "startup_s": 30}
        with fake_agent(**common, node_rank=1) as agent:
            for victim in (1, 0):
                with fake_executor(**common, again=True) as executor:
                    steps(executor)
                    pids = pids_by_rank(executor)
                    os.kill(pids[victim], signal.SIGKILL)
                    with pytest.raises(ExecutorError, match=f"rank {victim}.* died"):
                        executor.collective_rpc("misbehave", ("sleep:5",))
                    assert procs.wait_gone(pids, 5) == []
                assert agent.process.poll() is None, agent.said()
            with fake_executor(**common, again=True) as executor:
                steps(executor)
            assert agent.wait() == 0, agent.said()
            assert agent.said().count("looks for the leader") == 2


LEADER = (
    "from lockstep.testing.executors import *\nimport json, sys, time\n"
    "with fake_executor(**json.loads(sys.argv[1])) as e:\n"
    "    print(*[w['pid'] for w in e.collective_rpc('who')], flush=True); time.sleep(60)\n"
)


def test_an_agent_whose_leader_was_killed_joins_the_next_one() -> None:
    with held_port() as port:
        common = {"tp": 2, "nnodes": 2, "master_port": port, "cpu_binding": False, "startup_s": 30}
        with fake_agent(**common, node_rank=1) as agent:
            leader = subprocess.Popen([sys.executable, "-c", LEADER, json.dumps({**common, "again": True})], stdout=subprocess.PIPE)
            assert leader.stdout is not None
            with leader.stdout as said:
                pids = [int(pid) for pid in said.readline().split()]
                assert len(pids) == 2
                leader.kill()
                leader.wait(10)
            assert procs.wait_gone(pids, 5) == [], "nothing of the former start is left"
            with fake_executor(**common) as executor:
                steps(executor)
                os.kill(pids_by_rank(executor)[1], signal.SIGKILL)
                with pytest.raises(ExecutorError, match=r"rank 1.* died"):
                    executor.collective_rpc("misbehave", ("sleep:5",))
            assert agent.wait() == 1, "this leader did not say that it comes again"
            assert "lost the leader" in agent.said() and "ended with its leader" in agent.said()


def test_a_leader_that_says_later_that_it_comes_again_is_joined_again() -> None:
    """As a first start does, once it is past."""
    with held_port() as port:
        common = {"tp": 2, "nnodes": 2, "master_port": port, "cpu_binding": False, "startup_s": 30}
        with fake_agent(**common, node_rank=1) as agent:
            with fake_executor(**common) as executor:
                executor.say_again()
                steps(executor)
                os.kill(pids_by_rank(executor)[1], signal.SIGKILL)
                with pytest.raises(ExecutorError, match=r"rank 1.* died"):
                    executor.collective_rpc("misbehave", ("sleep:5",))
            with fake_executor(**common) as executor:
                steps(executor)
                executor.give_up(ConfigError("the model does not fit.\nMore of it"))
            assert agent.wait() == 1, "this one did not get so far, and says why"
            assert "ended with its leader: the model does not fit." in agent.said() and "More of it" not in agent.said()
            assert agent.said().count("looks for the leader") == 1


def test_an_engine_that_failed_above_its_ranks_is_joined_again() -> None:
    """As when a rank of it died: its next start waits for this node."""
    with held_port() as port:
        common = {"tp": 2, "nnodes": 2, "master_port": port, "cpu_binding": False, "startup_s": 30}
        with fake_agent(**common, node_rank=1) as agent:
            with fake_executor(**common) as executor:
                core = EngineCore(fake_config(**common), SPEC, executor, just_in_time=True)
                executor.say_again()
                core.scheduler.schedule = Mock(side_effect=KeyError("a block that is not there"))
                core.add_request(EngineRequest(request_id="x", prompt_token_ids=[1, 2], seed=0, sampling=SamplingParams(max_tokens=3)))
                with pytest.raises(KeyError) as found:
                    core.step()
                executor.give_up(found.value)  # as the replica's process does
                core.shutdown()
            with fake_executor(**common) as executor:
                steps(executor)
            assert agent.wait() == 0, agent.said()
            assert "KeyError: 'a block that is not there'" in agent.said() and agent.said().count("looks for the leader") == 1


def test_what_failed_by_itself_has_told_its_own_reason() -> None:
    with held_port() as port:
        common = {"tp": 2, "nnodes": 2, "master_port": port, "cpu_binding": False, "startup_s": 30}
        with fake_agent(**common, node_rank=1) as agent:
            with fake_executor(**common) as executor:
                executor.say_again()
                os.kill(pids_by_rank(executor)[0], signal.SIGKILL)
                with pytest.raises(ExecutorError, match="rank 0 died"):
                    executor.collective_rpc("misbehave", ("sleep:5",))
                executor.give_up(KeyError("what came of it"))
            with fake_executor(**common) as executor:
                steps(executor)
            assert agent.wait() == 0, agent.said()
            assert "rank 0 died" in agent.said() and "what came of it" not in agent.said()


def test_nodes_start_where_nobody_reads_standard_error_any_more() -> None:
    with held_port() as port:
        common = {"tp": 2, "nnodes": 2, "master_port": port, "cpu_binding": False, "startup_s": 30}
        with fake_agent(**common, node_rank=1), pytest.MonkeyPatch.context() as patch:
            patch.setattr(sys, "stderr", Mock(write=Mock(side_effect=BrokenPipeError)))
            with fake_executor(**common) as executor:
                steps(executor)


def test_an_agent_looks_for_its_leader_for_as_long_as_a_start_may_take() -> None:
    with held_port() as port:
        common = {"tp": 2, "nnodes": 2, "master_port": port, "cpu_binding": False}
        with fake_agent(**common, node_rank=1, startup_s=3.0) as agent:
            with fake_executor(**common, again=True, startup_s=30) as executor:
                os.kill(pids_by_rank(executor)[0], signal.SIGKILL)
                with pytest.raises(ExecutorError, match="rank 0 died"):
                    executor.collective_rpc("misbehave", ("sleep:5",))
                started = time.monotonic()
            assert agent.wait() == 1
            assert 2.0 < seconds(started) < 15
            assert f"node 1 of 2 did not reach the leader at 127.0.0.1:{port} in 3 s" in agent.said()


def test_ctrl_c_ends_an_agent_that_looks_for_its_leader() -> None:
    with held_port() as port:
        common = {"tp": 2, "nnodes": 2, "master_port": port, "cpu_binding": False, "startup_s": 30}
        with fake_agent(**common, node_rank=1) as agent:
            with fake_executor(**common, again=True) as executor:
                os.kill(pids_by_rank(executor)[0], signal.SIGKILL)
                with pytest.raises(ExecutorError, match="rank 0 died"):
                    executor.collective_rpc("misbehave", ("sleep:5",))
            assert wait_for(lambda: "looks for the leader" in agent.said(), 10)
            agent.process.send_signal(signal.SIGINT)
            assert agent.wait() == 130


# --- a server ---

TOKENS = 120
SMALL = ("--max-model-len", "256", "--kv-cache-memory-bytes", "32M", "--threads-per-rank", "1", "--device", "cpu")


def node(rank: int, port: int, *flags: str, nodes: int = 2) -> Agent:
    """A headless node of a server, started as on a host."""
    place = ("--nnodes", str(nodes), "--node-rank", str(rank), "--master-port", str(port))
    return Agent([sys.executable, "-m", "lockstep", "serve", "--headless", "--no-cpu-binding", *SMALL, *place, *flags])


class Site:
    """A server over two nodes, or more, and the agents of the others."""

    def __init__(self, port: int, nodes: int, flags: tuple[str, ...]) -> None:
        self.port, self.nodes, self.flags = port, nodes, flags
        self.agents = [node(rank, port, *flags, nodes=nodes) for rank in range(1, nodes)]
        self.server: RunningServer  # set once it runs

    def rank(self, number: int = 1) -> int:
        """The pid of the rank of a node."""
        found: list[int] = []

        def there() -> bool:
            found[:] = [pid for pid in children_of(self.agents[number - 1].pid) if "worker_main" in words_of(pid)]
            return bool(found)

        assert wait_for(there, 60), self.agents[number - 1].said()
        return found[0]

    def again(self, number: int = 1) -> None:
        """Kill a node's agent, and start another one."""
        self.agents[number - 1].close()
        self.agents[number - 1] = node(number, self.port, *self.flags, nodes=self.nodes)


def words_of(pid: int) -> str:
    try:
        return Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return ""


@contextmanager
def site(folder: Path, *flags: str, nodes: int = 2, tp: int = 2, dp: int = 1) -> Iterator[Site]:
    with held_ports(dp) as port:
        words = ("-tp", str(tp), *(("-dp", str(dp)) if dp > 1 else ()), *flags)
        made = Site(port, nodes, words)
        try:
            place = ("--nnodes", str(nodes), "--master-port", str(port), "--incident-dir", str(folder))
            with running_server(*SMALL, *place, *words, tp=tp) as made.server:
                yield made
        finally:
            for agent in made.agents:
                agent.close()


class Streams:
    """Streams of one server, each read on a thread."""

    def __init__(self, server: RunningServer, count: int = 4) -> None:
        self.server = server
        self.text = [""] * count
        self.reasons: list[list[str]] = [[] for _ in range(count)]
        self.errors = [""] * count
        self.threads = [threading.Thread(target=self._read, args=(i,), daemon=True) for i in range(count)]
        for thread in self.threads:
            thread.start()

    def _read(self, i: int) -> None:
        body = {"prompt": f"def f{i}(a):", "max_tokens": TOKENS, "temperature": 0, "ignore_eos": True, "stream": True}
        with httpx.stream("POST", self.server.url + "/v1/completions", json=body, timeout=120) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    word = json.loads(line[6:])
                    if "error" in word:
                        self.errors[i] = str(word["error"])
                        continue
                    (choice,) = word["choices"]
                    self.text[i] += choice["text"]
                    self.reasons[i] += [choice["finish_reason"]] if choice["finish_reason"] else []

    def began(self) -> None:
        """Until each of them has something."""
        assert wait_for(lambda: all(self.text), 60), self.server.said()

    def results(self) -> list[str]:
        for thread in self.threads:
            thread.join(150)
        assert self.reasons == [["length"]] * len(self.text), (self.reasons, self.errors, self.server.said())
        return self.text


@pytest.mark.timeout(400)
def test_a_servers_streams_outlive_a_rank_and_an_agent_of_another_node(tmp_path: Path) -> None:
    with site(tmp_path) as there:
        want = Streams(there.server).results()

        hit = Streams(there.server)
        hit.began()
        victim = there.rank()
        os.kill(victim, signal.SIGKILL)
        assert hit.results() == want, "the rank was killed"
        assert there.agents[0].process.poll() is None and there.rank() != victim

        hit = Streams(there.server)
        hit.began()
        there.again()
        assert hit.results() == want, "the agent was killed, and started again"

        hit = Streams(there.server)
        hit.began()
        (engine,) = (pid for pid in children_of(there.server.pid) if "engine_process" in words_of(pid))
        os.kill(engine, signal.SIGKILL)
        assert hit.results() == want, "the engine's process was killed, with all replicas"

        assert there.server.stop() == 0
        assert there.agents[0].wait() == 0, there.agents[0].said()
        assert re.search(r"(?s)replica 0: rank 1 on node 1 \(.*\) died in .*4 requests wait for a replica", there.server.said())


def starting(port: int, folder: Path, *flags: str) -> RunningServer:
    """A server over two nodes that is not waited for."""
    place = ("--nnodes", "2", "-tp", "2", "--master-port", str(port), "--incident-dir", str(folder))
    return RunningServer([sys.executable, "-m", "lockstep", "serve", "--port", "0", "--no-cpu-binding", *SMALL, *place, *flags], {})


@pytest.mark.timeout(200)
def test_a_first_start_that_fails_ends_the_agents_at_once_and_they_say_why(tmp_path: Path) -> None:
    """Nobody comes again: there is nothing to wait startup_timeout_seconds for."""
    with held_port() as port:
        server, agent = starting(port, tmp_path, "--kv-cache-memory-bytes", "4096"), node(1, port, "-tp", "2")
        try:
            assert server.wait(90) == 2, server.said()
            assert agent.wait() == 1, agent.said()
            assert "max-model-len=256 does not fit" in server.said()
            assert re.search(r"node 1 of 2 ended with its leader: .*max-model-len=256 does not fit", agent.said()), agent.said()
            assert "looks for the leader" not in agent.said()
        finally:
            server.close()
            agent.close()


def test_a_server_that_waits_for_its_nodes_can_be_told_to_stop(tmp_path: Path) -> None:
    with held_port() as port:
        server = starting(port, tmp_path)
        try:
            assert wait_for(lambda: "waiting for node 1 of 2" in server.said(), 60), server.said()
            below = children_of(server.pid)
            server.process.send_signal(signal.SIGINT)
            assert server.wait() == 130, server.said()
            assert procs.wait_gone(below, 5) == []
        finally:
            server.close()


@pytest.mark.full
@pytest.mark.timeout(400)
def test_a_node_that_stays_away_ends_every_request_and_the_server_by_name(tmp_path: Path) -> None:
    with site(tmp_path, "--startup-timeout-seconds", "25") as there:
        hit = Streams(there.server)
        hit.began()
        there.agents[0].close()
        code = there.server.wait(90)
        for thread in hit.threads:
            thread.join(20)
        assert code not in (0, None)
        assert all("node 1 of 2 has not connected" in error for error in hit.errors), hit.errors
        assert "replica 0: node 1 of 2 has not connected" in there.server.said()


@pytest.mark.full
@pytest.mark.timeout(400)
def test_replicas_that_are_each_on_one_node(tmp_path: Path) -> None:
    with site(tmp_path, dp=2, tp=1) as there:
        loses_a_node_and_takes_it_back(there, 1, Streams(there.server).results())


@pytest.mark.full
@pytest.mark.timeout(400)
def test_of_two_replicas_over_nodes_one_is_lost_and_taken_back(tmp_path: Path) -> None:
    with site(tmp_path, nodes=4, dp=2) as there:
        want = Streams(there.server).results()
        hit = Streams(there.server)
        hit.began()
        os.kill(there.rank(3), signal.SIGKILL)
        assert hit.results() == want, "a rank of the second replica was killed"
        assert ELSEWHERE.search(there.server.said()), there.server.said()
        assert wait_for(lambda: BACK in there.server.said(), 90), there.server.said()
        loses_a_node_and_takes_it_back(there, 2, want)


BACK = "replica 1 is back"
ELSEWHERE = re.compile(r"replica 1\b(?:(?!replica 1\b).)* requests? goe?s? on elsewhere", re.DOTALL)


def loses_a_node_and_takes_it_back(there: Site, number: int, want: list[str]) -> None:
    """The second replica's requests go on in the first one while a node of it stays away. It comes, and all end in good order."""
    heard = len(there.server.said())
    hit = Streams(there.server)
    hit.began()
    there.agents[number - 1].close()
    assert hit.results() == want, "the agent was killed"
    said = there.server.said()[heard:]
    assert ELSEWHERE.search(said) and BACK not in said, said
    there.again(number)
    assert wait_for(lambda: BACK in there.server.said()[heard:], 90), there.server.said()
    assert Streams(there.server).results() == want
    assert there.server.stop() == 0
    assert [agent.wait() for agent in there.agents] == [0] * len(there.agents)
