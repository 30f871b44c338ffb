"""torchrun over hosts that are network namespaces: the demo model in two stages, a cable pulled, healed, started again."""

from __future__ import annotations

import re
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from lockstep.testing.executors import children_of, wait_for
from lockstep.testing.nodes import Agent
from lockstep.utils import procs
from tests.distributed.test_netns import Net, network

__all__ = ["network"]  # the fixture

TIMEOUT_S = 4.0  # of a collective
SLACK_S = 16.0  # to ask who is there and to end, and again for torchrun to notice, on a busy machine
SCRIPT = f"""
import sys
from lockstep.llm import LLM
from lockstep.protocol import SamplingParams
stages = int(sys.argv[1])
settings = dict(distributed_executor_backend="external_launcher", pipeline_parallel_size=stages, distributed_timeout_seconds={TIMEOUT_S})
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


def lose(net: Net, script: Path, lost: int) -> None:
    """Pull the cable of a host while all decode: everything ends in time, and every rank that can know says which one was lost."""
    programs = torchrun(net, script, 2000)
    assert wait_for(lambda: "decoding" in programs[0].said() or programs[0].process.poll() is not None, 60)
    assert programs[0].process.poll() is None, programs[0].said()
    ranks = [pid for program in programs for pid in children_of(program.pid)]
    assert len(ranks) >= len(programs)
    net.pull(lost)
    left = procs.wait_gone(ranks, TIMEOUT_S + SLACK_S)
    assert left == [], "\n".join(program.said() for program in programs)
    for rank, program in enumerate(programs):
        assert program.wait(SLACK_S) != 0
        found = re.findall(r"ExecutorError: (rank .*)", program.said())
        wanted = rf"rank {lost} \(\S+\) is lost: it did not answer when rank \d asked who is there" if rank != lost else ""
        assert found and re.match(wanted or rf"rank {lost} is cut off: it cannot reach the store of all ranks", found[-1]), program.said()


def test_a_cable_is_pulled_and_the_rank_behind_it_is_named(network: Callable[[int], Net], tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT)
    lose(network(2), script, 1)


@pytest.mark.full
@pytest.mark.timeout(300)
@pytest.mark.parametrize(("hosts", "lost"), [(2, 1), (3, 1), (3, 2)])
def test_a_pipeline_over_hosts_loses_one_and_starts_again(hosts: int, lost: int, network: Callable[[int], Net], tmp_path: Path) -> None:
    net, script = network(hosts), tmp_path / "script.py"
    script.write_text(SCRIPT)
    first = tokens_of(torchrun(net, script, 40))
    assert len(first) == 1, "every rank has the same tokens"
    lose(net, script, lost)
    net.plug(lost)
    assert tokens_of(torchrun(net, script, 40)) == first
