"""Ranks on several nodes: agents on loopback, fake workers. What works on one host works on two, and what breaks is named."""

from __future__ import annotations

import concurrent.futures
import gc
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from lockstep.distributed.greeting import Challenge, Hello, Welcome
from lockstep.executor import gather, node_wire
from lockstep.executor.contract import ExecutorError
from lockstep.executor.link import Link, LinkLost
from lockstep.protocol import NewRequest, SamplingParams, StepPlan
from lockstep.testing.executors import children_of, decode_plan, fake_executor, wait_for
from lockstep.testing.nodes import Agent, fake_agent, fake_nodes, held_port, pids_by_rank, seconds, signal_and_wait
from lockstep.testing.tiny import make_tiny
from lockstep.utils import handshake, procs

HOST = re.escape(socket.gethostname())
NODE_1 = rf"node 1 \({HOST}"


def test_steps_and_calls_reach_all_and_the_output_rank_may_be_elsewhere() -> None:
    before = set(os.listdir("/dev/shm"))
    with fake_nodes(2, 2, pipeline_parallel_size=2) as (executor, (agent,)):
        assert [m.rank for m in executor.memory()] == [0, 1, 2, 3]
        futures = [executor.execute_model(decode_plan(step)) for step in range(30)]
        assert [f.result(20).tokens for f in futures] == [[s * 1000, s * 1000 + 3] for s in range(30)]
        assert executor.collective_rpc("echo", (1, "x")) == [[r, [1, "x"], {}] for r in range(4)]
        assert executor.collective_rpc("seen_steps") == [list(range(30))] * 4, "every rank, in the same order"
        pids = pids_by_rank(executor)
        assert set(pids[2:]) <= set(children_of(agent.pid)) and not set(pids[:2]) & set(children_of(agent.pid))
        long = NewRequest(0, "r", list(range(2_000_000)), 2_000_000, [], SamplingParams(), 0)
        assert executor.execute_model(StepPlan(31, [0], [0], [2_000_000], [True], new=[long])).result(60).tokens == [31000]
        with pytest.raises(TimeoutError, match="no answer from rank 3 after"):
            executor.collective_rpc("misbehave_on", (3, "sleep:0.4"), timeout=0.2)
        assert executor.collective_rpc("echo", ("late",), timeout=20)[3] == [3, ["late"], {}], "a late reply is dropped"
        with pytest.raises(ExecutorError, match=rf"rank 2 on {NODE_1}\) raised KeyError in call misbehave_on"):
            executor.collective_rpc("misbehave_on", (2, "raise:here"))
        executor.check_health()
        executor.shutdown()
        assert agent.wait() == 0, agent.said()
        assert procs.wait_gone(pids, 5) == []
    assert not set(os.listdir("/dev/shm")) - before


def test_three_nodes_and_what_their_ranks_print(capfd: pytest.CaptureFixture[str]) -> None:
    with fake_nodes(3, 3) as (executor, agents):
        executor.collective_rpc("say", ("hello",))
        assert executor.execute_model(decode_plan(1)).result(20).step == 1
        assert len(executor.collective_rpc("who")) == 3
        executor.shutdown()
        assert [agent.wait() for agent in agents] == [0, 0]
    shown = capfd.readouterr().err
    where = r"distributed_executor_backend is mp: .* on node 0, the leader; nodes report at .*, ranks meet at "
    assert len(re.findall(where, shown)) == 1, shown
    assert all(f"[rank {rank}] hello\n" in shown for rank in range(3))


def test_a_killed_rank_of_another_node_is_named_as_one_of_this() -> None:
    with fake_nodes(2, 2, pipeline_parallel_size=2) as (executor, (agent,)):
        pids = pids_by_rank(executor)
        executor.collective_rpc("arm", (2, "sleep:30"))
        future = executor.execute_model(decode_plan(5))
        time.sleep(0.7)  # until a beat has told of the step
        started = time.monotonic()
        os.kill(pids[3], signal.SIGKILL)
        with pytest.raises(ExecutorError, match=rf"rank 3 on {NODE_1}\) died in .*step 5.*killed by SIGKILL") as caught:
            future.result(20)
        assert seconds(started) < 5
        assert (caught.value.kind, caught.value.rank, caught.value.exitcode) == ("died", 3, -9)
        assert "rank 2 at step 5" in str(caught.value)
        assert agent.wait() == 1 and "rank 3" in agent.said()
        assert procs.wait_gone(pids, 5) == []


def test_last_words_of_a_rank_on_another_node_are_in_the_error() -> None:
    with fake_nodes(2, 2) as (executor, (agent,)):
        with pytest.raises(ExecutorError, match=rf"(?s)rank 1 on {NODE_1}\) died in call misbehave_on: exit code 7.*last words") as caught:
            executor.collective_rpc("misbehave_on", (1, "exit:7"))
        assert caught.value.exitcode == 7 and caught.value.log_tail[-1] == "last words"
        assert agent.wait() == 1


def test_a_rank_that_raises_in_a_step_on_another_node() -> None:
    with fake_nodes(2, 2) as (executor, (agent,)):
        executor.collective_rpc("arm", (1, "raise:there"))
        executor.collective_rpc("arm", (0, "sleep:30"))  # as if stuck in the collective that rank 1 never enters
        with pytest.raises(ExecutorError, match=rf"rank 1 on {NODE_1}\) raised KeyError in step 3") as caught:
            executor.execute_model(decode_plan(3)).result(20)
        assert (caught.value.kind, caught.value.error_type) == ("raised", "KeyError")
        assert agent.wait() == 1


def test_a_stopped_and_a_hung_rank_on_another_node() -> None:
    with fake_nodes(2, 2) as (executor, (agent,)):
        os.kill(pids_by_rank(executor)[1], signal.SIGSTOP)
        with pytest.raises(ExecutorError, match=rf"rank 1 on {NODE_1}\) was stopped") as caught:
            executor.collective_rpc("echo")
        assert caught.value.kind == "stopped" and agent.wait() == 1
    with fake_nodes(2, 2, step_s=1.5) as (executor, (agent,)):
        executor.collective_rpc("arm", (1, "sleep:100"))
        with pytest.raises(ExecutorError, match="rank 1 at step 41") as caught:
            executor.execute_model(decode_plan(41))
            executor.collective_rpc("echo")
        assert (caught.value.kind, caught.value.rank) == ("hung", 1)
        assert "in misbehave" in "\n".join(caught.value.log_tail), "the stack of the stuck rank came over"
        assert agent.wait() == 1


def test_a_killed_agent_is_a_lost_node_and_takes_its_ranks_along() -> None:
    with fake_nodes(2, 2, pipeline_parallel_size=2) as (executor, (agent,)):
        pids = pids_by_rank(executor)
        started = time.monotonic()
        os.kill(agent.pid, signal.SIGKILL)
        with pytest.raises(ExecutorError, match=rf"{NODE_1}, ranks 2, 3\) is lost: the connection was") as caught:
            executor.collective_rpc("misbehave", ("sleep:5",))
        assert seconds(started) < 5 and caught.value.kind == "lost"
        assert procs.wait_gone(pids, 5) == []
        with pytest.raises(ExecutorError):
            executor.check_health()


def test_a_stopped_agent_is_lost_within_the_timeout() -> None:
    with fake_nodes(2, 2, node_timeout_seconds=1.5) as (executor, (agent,)):
        pids = pids_by_rank(executor)
        os.kill(agent.pid, signal.SIGSTOP)
        started = time.monotonic()
        with pytest.raises(ExecutorError, match=rf"{NODE_1}, rank 1\) is lost: no sign of life for") as caught:
            executor.collective_rpc("echo")
        assert 0.9 < seconds(started) < 6 and caught.value.kind == "lost"
        assert procs.wait_gone(pids[:1], 5) == []
        os.kill(agent.pid, signal.SIGCONT)
        assert agent.wait() == 1
        assert procs.wait_gone(pids, 5) == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 1)])
def test_ctrl_c_on_an_agent_ends_its_ranks_and_tells_the_leader(number: signal.Signals, code: int) -> None:
    with fake_nodes(2, 2) as (executor, (agent,)):
        pids = pids_by_rank(executor)
        assert signal_and_wait(agent, number) == code, agent.said()
        assert procs.wait_gone(pids[1:], 5) == []
        with pytest.raises(ExecutorError, match=rf"{NODE_1}, rank 1\) is lost: it was interrupted \({number.name}\)"):
            executor.collective_rpc("echo")


def test_agents_of_a_leader_that_is_gone_end_their_ranks(tmp_path: Path) -> None:
    with held_port() as port:
        common = {"tp": 2, "nnodes": 2, "master_port": port, "cpu_binding": False, "startup_s": 30}
        code = (
            "from lockstep.testing.executors import *\nimport json, sys, time\n"
            "with fake_executor(**json.loads(sys.argv[1])) as e:\n"
            "    print(*[w['pid'] for w in e.collective_rpc('who')], flush=True); time.sleep(60)\n"
        )
        with fake_agent(**common, node_rank=1) as agent:
            leader = subprocess.Popen([sys.executable, "-c", code, json.dumps(common)], stdout=subprocess.PIPE, text=True)
            assert leader.stdout is not None
            pids = [int(pid) for pid in leader.stdout.readline().split()]
            assert len(pids) == 2
            leader.kill()
            assert agent.wait() == 1
            assert re.search(r"node 1 of 2 lost the leader at .*connection was (closed|reset).*ended its rank 1", agent.said())
            assert procs.wait_gone(pids, 5) == []
            leader.wait()
            leader.stdout.close()


def test_shutdown_with_a_step_in_flight_ends_all_nodes() -> None:
    with fake_nodes(2, 2) as (executor, (agent,)):
        pids = pids_by_rank(executor)
        executor.collective_rpc("arm", (1, "sleep:100"))
        executor.execute_model(decode_plan(1))
        started = time.monotonic()
        executor.shutdown()
        assert seconds(started) < 12 and agent.wait() == 0
        assert procs.wait_gone(pids, 5) == []


def test_a_node_that_never_comes_is_named_with_what_to_do() -> None:
    with held_port() as port:
        started = time.monotonic()
        wanted = (
            rf"node 1 of 2 has not connected to 127\.0\.0\.1:{port} in 1\.2 s: start it with --nnodes 2 --node-rank 1 --master-addr "
            rf"127\.0\.0\.1 --master-port {port} --headless.*startup_timeout_seconds=1\.2.*can be reached from this host only"
        )
        with pytest.raises(ExecutorError, match=wanted), fake_executor(2, nnodes=2, master_port=port, startup_s=1.2):
            pass
        assert seconds(started) < 6
        with fake_agent(tp=2, nnodes=2, node_rank=1, master_port=port, startup_s=1.0) as agent:
            assert agent.wait() == 1
            assert f"did not reach the leader at 127.0.0.1:{port} in 1 s (Connection refused)" in agent.said()


def refused(leader: str, agent_said: str, environment: dict[str, str] | None = None, startup_s: float = 20.0, **different: object) -> None:
    """A leader and one agent that differs: both end, each saying why."""
    with held_port() as port:
        common = {"tp": 2, "nnodes": 2, "master_port": port, "cpu_binding": False}
        with fake_agent(environment, **{**common, "node_rank": 1, "startup_s": 20, **different}) as agent:
            with pytest.raises(ExecutorError, match=leader), fake_executor(**common, startup_s=startup_s):
                pass
            assert agent.wait() == 1
            assert agent_said in agent.said()


def test_another_version_is_refused_on_both_sides() -> None:
    refused(rf"{NODE_1}, pid \d+\) was refused: it runs lockstep 0\.0\.7 and the leader ", "it runs lockstep 0.0.7 and", version="0.0.7")


def test_another_setting_is_refused_by_its_name() -> None:
    refused(
        r"it has tensor_parallel_size=4 and the leader tensor_parallel_size=2: say the same on every node",
        "it has --tensor-parallel-size=4 and the leader --tensor-parallel-size=2",
        tp=4,
    )


def test_another_key_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCKSTEP_CLUSTER_KEY", "right")
    words = "its LOCKSTEP_CLUSTER_KEY is not the leader's"
    refused(f"node 1 of 2 has not connected.*Meanwhile.*{words}", words, {"LOCKSTEP_CLUSTER_KEY": "wrong"}, startup_s=4.0)


def test_the_right_key_is_let_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCKSTEP_CLUSTER_KEY", "right")
    with fake_nodes(2, 2) as (executor, _):
        assert len(executor.memory()) == 2


def test_a_leader_without_the_key_is_not_obeyed() -> None:
    """It lets everybody in, and cannot prove that it has the key."""
    with socket.create_server(("127.0.0.1", 0)) as impostor:
        settings = {"tp": 2, "nnodes": 2, "node_rank": 1, "master_port": impostor.getsockname()[1], "startup_s": 10}
        with fake_agent({"LOCKSTEP_CLUSTER_KEY": "secret"}, **settings) as agent:
            link, _ = impostor.accept()
            with link:
                link.sendall(node_wire.frame(Challenge(node_wire.PROTOCOL, b"n" * 32)))
                link.recv(1 << 16)
                link.sendall(node_wire.frame(Welcome(b"x" * 32)))
                assert agent.wait() == 1
            assert "does not have this node's LOCKSTEP_CLUSTER_KEY" in agent.said()


def test_a_second_node_of_the_same_rank_is_turned_away_and_noise_is_ignored() -> None:
    with held_port() as port:
        common = {"tp": 3, "nnodes": 3, "master_port": port, "cpu_binding": False, "startup_s": 30}
        agents: list[Agent] = []
        with fake_agent(**common, node_rank=1) as first, fake_agent(**common, node_rank=1) as second:

            def third() -> None:
                """Once one of the two has been turned away, the node that is missing."""
                for _ in range(2):
                    wait_for(lambda: socket.socket().connect_ex(("127.0.0.1", port)) == 0, 10)
                    with socket.create_connection(("127.0.0.1", port)) as stranger:
                        stranger.sendall(b"GET / HTTP/1.1\r\n\r\n")
                wait_for(lambda: first.process.poll() is not None or second.process.poll() is not None, 20)
                agents.append(Agent([sys.executable, "-m", "lockstep.testing.fake_node", json.dumps({**common, "node_rank": 2})]))

            thread = threading.Thread(target=third)
            thread.start()
            try:
                with fake_executor(**common) as executor:
                    assert len(executor.memory()) == 3
                thread.join()
                codes = sorted([first.wait(), second.wait()])
                assert codes == [0, 1] and agents[0].wait() == 0
                assert "node_rank=1 is taken" in (first.said() + second.said()).replace("--node-rank", "node_rank")
            finally:
                thread.join()
                for agent in agents:
                    agent.close()


def test_strangers_who_do_not_hang_up_end_no_node(monkeypatch: pytest.MonkeyPatch) -> None:
    """More of them than are heard at once, with a wrong proof or nothing to say, in the 2 s in which a node must hear its leader."""
    monkeypatch.setenv("LOCKSTEP_CLUSTER_KEY", "right")
    strangers: list[socket.socket] = []
    agents: list[Agent] = []
    with held_port() as port:
        common = {"tp": 3, "nnodes": 3, "master_port": port, "cpu_binding": False, "startup_s": 30, "node_timeout_seconds": 2.0}

        def knock() -> None:
            wait_for(lambda: agents[0].process.poll() is not None or "node 1 is in" in agents[0].said(), 20)
            for number in range(gather.MAX_GUESTS + 40):
                stranger = socket.create_connection(("127.0.0.1", port), 10)
                strangers.append(stranger)
                if number % 2:
                    stranger.sendall(node_wire.frame(Hello(b"n" * 32, b"anybody", b"p" * 32)))
            refused = [stranger for number, stranger in enumerate(strangers) if number % 2]
            said = [text_of(stranger) for stranger in refused[-8:]]
            assert all("LOCKSTEP_CLUSTER_KEY is not the leader's" in text for text in said), said
            agents.append(Agent([sys.executable, "-m", "lockstep.testing.fake_node", json.dumps({**common, "node_rank": 2})]))

        with concurrent.futures.ThreadPoolExecutor(1) as pool, fake_agent(**common, node_rank=1, log_level="info") as first:
            agents.append(first)
            knocking = pool.submit(knock)
            try:
                with fake_executor(**common) as executor:
                    knocking.result(30)
                    assert len(executor.memory()) == 3
                assert [agent.wait() for agent in agents] == [0, 0]
            finally:
                concurrent.futures.wait([knocking], 30)
                for one in [*strangers, *agents]:
                    one.close()


def text_of(stranger: socket.socket) -> str:
    """All that the leader says to it before it ends the connection."""
    found = b""
    while data := stranger.recv(1 << 16):
        found += data
    return found.decode("utf-8", "replace")


def test_nothing_is_left_behind_in_the_leader() -> None:
    def state() -> tuple[int, set[str], set[int]]:
        return len(os.listdir("/proc/self/fd")), set(os.listdir("/dev/shm")), set(children_of(os.getpid()))

    with fake_nodes(2, 2):
        pass
    gc.collect()
    before = state()
    for round_ in range(2):
        with fake_nodes(2, 2) as (executor, (agent,)):
            if round_:
                os.kill(agent.pid, signal.SIGKILL)
                with pytest.raises(ExecutorError):
                    executor.collective_rpc("misbehave", ("sleep:5",))
    del executor, agent
    gc.collect()
    assert wait_for(lambda: state() == before, 5), (state(), before)


def pair(silence_s: float = 5.0) -> tuple[Link, Link]:
    with socket.create_server(("127.0.0.1", 0)) as server:
        one = socket.create_connection(server.getsockname())
        other, _ = server.accept()
    return Link(one, silence_s), Link(other, silence_s)


def test_a_link_keeps_order_while_the_other_side_does_not_read() -> None:
    ours, theirs = pair()
    theirs.frames.limit = node_wire.MESSAGE_BYTES
    wanted = [os.urandom(size) for size in (10, 3_000_000, 0, 5_000_000, 7)]
    for body in wanted:
        ours.send(node_wire.Order(body))
    assert ours.waits, "more than a socket takes"
    found: list[node_wire.Message] = []

    def moved() -> bool:
        ours.flush()
        found.extend(theirs.receive())
        return len(found) == len(wanted)

    assert wait_for(moved, 20)
    assert [message.body for message in found if isinstance(message, node_wire.Order)] == wanted
    ours.close(node_wire.End("bye"))
    assert theirs.receive() == [node_wire.End("bye")]
    with pytest.raises(LinkLost, match="was closed"):
        theirs.receive()
    theirs.close()


def test_a_link_that_is_silent_or_speaks_nonsense_is_lost() -> None:
    ours, theirs = pair(0.6)
    beat = node_wire.Beat(1)
    for _ in range(20):
        time.sleep(0.05)
        try:
            ours.keep(lambda: beat)
        except LinkLost as e:
            assert "no sign of life for 0.6 s" in str(e)
            break
    else:
        raise AssertionError("silence was not noticed")
    assert theirs.receive()[0] == beat
    ours.socket.sendall((node_wire.GREETING_BYTES + 1).to_bytes(4, "little"))
    with pytest.raises(LinkLost, match="a frame of 65537 bytes where at most 65536 are allowed"):
        wait_for(theirs.receive, 5)
    theirs.socket.sendall(b"\x03\x00\x00\x00abc")
    with pytest.raises(LinkLost, match="cannot be decoded"):
        wait_for(ours.receive, 5)
    ours.close()
    theirs.close()


def test_a_proof_is_for_one_key_one_side_and_these_words() -> None:
    proof = handshake.prove("key", "agent", b"a", b"bc")
    assert handshake.proven(proof, "key", "agent", b"a", b"bc")
    for other in (("yek", "agent", b"a", b"bc"), ("key", "leader", b"a", b"bc"), ("key", "agent", b"ab", b"c")):
        assert not handshake.proven(proof, *other)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("llama"))


@pytest.mark.parametrize("split", [{"tensor_parallel_size": 2}, {"pipeline_parallel_size": 2}], ids=["tp", "pp"])
@pytest.mark.parametrize("apart", [True, False], ids=["hosts", "one-host"])
def test_two_nodes_write_what_one_process_does(tiny: Path, split: dict[str, int], apart: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """apart: the ranks are told that they do not share memory."""
    from lockstep import LLM

    params = SamplingParams(temperature=0, max_tokens=12)
    prompts = [[1, 2, 3, 4, 5], [7, 8, 9], list(range(10, 60))]
    common = {"dtype": "float32", "max_model_len": 128, "num_gpu_blocks_override": 64}
    with LLM(str(tiny), **common) as whole:
        expected = [o.outputs[0].token_ids for o in whole.generate(prompts, params, use_tqdm=False)]
    with held_port() as port:
        flags = [f"--{name.replace('_', '-')}={value}" for name, value in split.items()]
        command = [sys.executable, "-m", "lockstep", "generate", str(tiny), "--headless", "--nnodes", "2", "--node-rank", "1"]
        command += ["--dtype", "float32", "--master-port", str(port), "--no-cpu-binding", *flags]
        agent = Agent(command, {"LOCKSTEP_HOST_ID": "second"} if apart else None)
        if apart:
            monkeypatch.setenv("LOCKSTEP_HOST_ID", "first")
        try:
            with LLM(str(tiny), nnodes=2, master_port=port, cpu_binding=False, **split, **common) as llm:
                found = [o.outputs[0].token_ids for o in llm.generate(prompts, params, use_tqdm=False)]
                assert found == expected
            assert agent.wait() == 0, agent.said()
        finally:
            agent.close()
