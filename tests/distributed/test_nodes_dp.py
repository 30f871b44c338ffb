"""Replicas over several nodes: a group of nodes for each replica, or replicas on each node. One endpoint, the same tokens."""

from __future__ import annotations

import os
import re
import signal
import socket
import sys
from contextlib import ExitStack
from pathlib import Path

import pytest

from lockstep.config.errors import ConfigError
from lockstep.executor.contract import ExecutorError
from lockstep.llm import LLM
from lockstep.protocol import SamplingParams
from lockstep.testing.executors import decode_plan, fake_executor
from lockstep.testing.nodes import Agent, fake_agent, held_ports, pids_by_rank
from lockstep.testing.tiny import make_tiny
from lockstep.utils import procs

HOST = re.escape(socket.gethostname())
PARAMS = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
PROMPTS = [[1, 2, 3, 4, 5], [7, 8, 9], list(range(10, 60)), [5] * 9]
COMMON = {"dtype": "float32", "max_model_len": 128, "num_gpu_blocks_override": 64, "startup_timeout_seconds": 90.0, "cpu_binding": False}


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("llama"))


def node(model: Path, rank: int, nodes: int, port: int, **settings: object) -> Agent:
    """A headless node, started as on a host."""
    words = {**COMMON, **settings, "nnodes": nodes, "node_rank": rank, "master_port": port}
    words.pop("cpu_binding"), words.pop("num_gpu_blocks_override")
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in words.items()]
    return Agent([sys.executable, "-m", "lockstep", "generate", str(model), "--headless", "--no-cpu-binding", *flags])


def tokens(llm: LLM) -> list[list[int]]:
    return [list(o.outputs[0].token_ids) for o in llm.generate(PROMPTS, PARAMS, use_tqdm=False)]


SPLITS = [
    pytest.param(2, 2, {}, id="a-replica-on-each-node"),
    pytest.param(2, 4, {}, marks=pytest.mark.full, id="two-replicas-on-each-node"),
    pytest.param(4, 2, {"pipeline_parallel_size": 2}, marks=pytest.mark.full, id="two-nodes-for-each-replica-pp"),
    pytest.param(4, 2, {"tensor_parallel_size": 2}, id="two-nodes-for-each-replica-tp"),
]


@pytest.mark.parametrize(("nodes", "size", "split"), SPLITS)
def test_replicas_over_nodes_write_what_one_process_does(tiny: Path, nodes: int, size: int, split: dict[str, int]) -> None:
    with LLM(str(tiny), **COMMON) as whole:
        expected = tokens(whole)
    with held_ports(size) as port, ExitStack() as ended:
        agents = [node(tiny, rank, nodes, port, data_parallel_size=size, **split) for rank in range(1, nodes)]
        for agent in agents:
            ended.callback(agent.close)
        with LLM(str(tiny), nnodes=nodes, data_parallel_size=size, master_port=port, **split, **COMMON) as llm:
            assert tokens(llm) == expected
            for replica in range(size):
                (one,) = llm.generate(PROMPTS[2], PARAMS, use_tqdm=False, data_parallel_rank=replica)
                assert list(one.outputs[0].token_ids) == expected[2], f"replica {replica} differs"
        assert [agent.wait() for agent in agents] == [0] * len(agents), [agent.said() for agent in agents]


def test_a_group_without_a_rank_here_is_led_from_here() -> None:
    """Nodes 2 and 3 of 4 are the second replica's; its leader is node 0, which has ranks of the first one only."""
    with held_ports(2) as port:
        common = {"tp": 2, "nnodes": 4, "data_parallel_size": 2, "data_parallel_rank": 1, "master_port": port, "startup_s": 30}
        common["pipeline_parallel_size"], common["cpu_binding"] = 2, False
        with fake_agent(**common, node_rank=2) as first, fake_agent(**common, node_rank=3) as second, fake_executor(**common) as executor:
            assert [m.rank for m in executor.memory()] == [0, 1, 2, 3]
            futures = [executor.execute_model(decode_plan(step)) for step in range(10)]
            assert [f.result(20).tokens for f in futures] == [[s * 1000, s * 1000 + 3] for s in range(10)]
            pids = pids_by_rank(executor)
            os.kill(pids[3], signal.SIGKILL)
            with pytest.raises(ExecutorError, match=rf"rank 3 on node 3 \({HOST}\) died .*killed by SIGKILL"):
                executor.collective_rpc("misbehave", ("sleep:5",))
            assert (first.wait(), second.wait()) == (1, 1)
            assert procs.wait_gone(pids, 5) == []


def test_nodes_of_a_group_that_do_not_come_are_named_with_the_port_and_the_flags() -> None:
    with held_ports(2) as port:
        common = {"nnodes": 4, "data_parallel_size": 2, "data_parallel_rank": 1, "master_port": port, "startup_s": 1.2}
        wanted = (
            rf"nodes 2, 3 of 4 have not connected to 127\.0\.0\.1:{port + 1} in 1\.2 s: start each with -dp 2 --nnodes 4 --node-rank N "
            rf"--master-addr 127\.0\.0\.1 --master-port {port} --headless"
        )
        with pytest.raises(ExecutorError, match=wanted) as caught, fake_executor(2, **common):
            pass
        assert caught.value.kind == "absent"
        with fake_agent(tp=2, node_rank=3, **common) as agent:
            assert agent.wait() == 1
            assert f"did not reach the leader at 127.0.0.1:{port + 1}" in agent.said()
            assert "one more for each replica before this node's" in agent.said()


def test_a_node_of_another_group_is_told_so() -> None:
    with held_ports(2) as port:
        common = {"tp": 2, "nnodes": 4, "data_parallel_size": 2, "cpu_binding": False}
        second = {**common, "data_parallel_rank": 1, "master_port": port}
        first = {**common, "data_parallel_rank": 0, "master_port": port + 1, "node_rank": 1, "startup_s": 20}
        with fake_agent(**first) as lost:
            refused = pytest.raises(ExecutorError, match=r"Meanwhile.*node_rank=1 is of another replica")
            with refused, fake_executor(**second, startup_s=5.0):
                pass
            assert lost.wait() == 1
            assert "is of another replica, whose nodes report at another port" in lost.said()


def test_a_port_of_a_group_that_is_taken_is_named_with_the_rule() -> None:
    with held_ports(2) as port, socket.create_server(("127.0.0.1", port + 1)):
        common = {"nnodes": 4, "data_parallel_size": 2, "data_parallel_rank": 1, "master_port": port}
        wanted = rf"master_port={port} to {port + 1} \(one for each replica\): .*{port + 1}.*in use"
        with pytest.raises(ConfigError, match=wanted), fake_executor(2, **common):
            pass
