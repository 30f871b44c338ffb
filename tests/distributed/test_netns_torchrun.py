"""torchrun over hosts that are network namespaces: the demo model in two stages, a cable pulled, healed, started again."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from lockstep.testing.executors import children_of
from lockstep.testing.nodes import Agent
from lockstep.utils import procs
from tests.distributed.test_netns import Net, network

__all__ = ["network"]  # the fixture

SCRIPT = """
import os, sys
from lockstep.llm import LLM
from lockstep.protocol import SamplingParams
settings = dict(distributed_executor_backend="external_launcher", pipeline_parallel_size=int(sys.argv[1]), distributed_timeout_seconds=5.0)
with LLM(max_model_len=2048, kv_cache_memory_bytes=64 << 20, threads_per_rank=1, cpu_binding=False, **settings) as llm:
    for output in llm.stream("def add(a, b):", SamplingParams(temperature=0, max_tokens=int(sys.argv[2]), ignore_eos=True)):
        if len(output.outputs[0].token_ids) == 10:
            print("decoding", flush=True)
    print("TOKENS", list(output.outputs[0].token_ids), flush=True)
"""


def torchrun(net: Net, script: Path, tokens: int) -> list[Agent]:
    """The script on every host, a rank each."""
    hosts = len(net.hosts)
    found = []
    for i, host in enumerate(net.hosts):
        command = ["ip", "netns", "exec", host, sys.executable, "-m", "torch.distributed.run", f"--nnodes={hosts}", "--nproc-per-node=1"]
        command += [f"--node-rank={i}", f"--master-addr={net.address(0)}", "--master-port=29500", str(script), str(hosts), str(tokens)]
        program = Agent(command, {"LOCKSTEP_HOST_ID": host, "PYTHONPATH": str(Path(__file__).parents[2]), "GLOO_SOCKET_IFNAME": "eth0"})
        net.running.append(program)
        found.append(program)
    return found


def tokens_of(programs: list[Agent]) -> set[str]:
    codes = [program.wait(90) for program in programs]
    assert codes == [0] * len(codes), "\n".join(program.said() for program in programs)
    return {line for program in programs for line in program.said().splitlines() if line.startswith("TOKENS")}


@pytest.mark.full
@pytest.mark.timeout(300)
@pytest.mark.parametrize("hosts", [2, 3])
def test_a_pipeline_over_hosts_loses_one_and_starts_again(hosts: int, network: Callable[[int], Net], tmp_path: Path) -> None:
    net, script = network(hosts), tmp_path / "script.py"
    script.write_text(SCRIPT)
    first = tokens_of(torchrun(net, script, 40))
    assert len(first) == 1, "every rank has the same tokens"
    programs = torchrun(net, script, 2000)
    deadline = time.monotonic() + 60
    while "decoding" not in programs[0].said():
        assert time.monotonic() < deadline and programs[0].process.poll() is None, programs[0].said()
        time.sleep(0.02)
    ranks = [pid for program in programs for pid in children_of(program.pid)]
    assert len(ranks) >= hosts
    net.pull(hosts - 1)
    assert procs.wait_gone(ranks, 40) == [], "\n".join(program.said() for program in programs)
    for program in programs:
        assert program.wait(30) != 0
        assert "ExecutorError: rank" in program.said(), program.said()
    net.plug(hosts - 1)
    assert tokens_of(torchrun(net, script, 40)) == first
