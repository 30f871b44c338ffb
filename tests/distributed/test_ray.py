"""`distributed_executor_backend="ray"`: what works in one process works on a Ray cluster, and what breaks there is named."""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

import lockstep
from lockstep.config.errors import ConfigError
from lockstep.config.tree import ParallelConfig
from lockstep.executor.contract import ExecutorError
from lockstep.protocol import SamplingParams
from lockstep.testing.executors import decode_plan, fake_executor, wait_for
from lockstep.testing.nodes import pids_by_rank
from lockstep.testing.ray_cluster import ray_cluster
from lockstep.testing.tiny import make_tiny
from lockstep.utils import procs

HOST = re.escape(socket.gethostname())
PARAMS = SamplingParams(temperature=0, max_tokens=12)
PROMPTS = [[1, 2, 3, 4, 5], [7, 8, 9], list(range(10, 60))]
COMMON = {"dtype": "float32", "max_model_len": 128, "num_gpu_blocks_override": 64, "device": "cpu"}
pytestmark = pytest.mark.timeout(240)


@pytest.fixture(scope="module")
def cluster() -> Iterator[str]:
    """The address of a cluster with four CPUs, named by RAY_ADDRESS."""
    with ray_cluster(4) as address:
        yield address


@pytest.fixture(scope="module")
def connected(cluster: str) -> Iterator[None]:
    """This process is connected before an executor is made, and still is afterwards."""
    import ray

    ray.init(address=cluster, configure_logging=False, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("llama"))


@pytest.fixture(scope="module")
def expected(tiny: Path) -> list[list[int]]:
    from lockstep import LLM

    with LLM(str(tiny), **COMMON) as whole:
        return [o.outputs[0].token_ids for o in whole.generate(PROMPTS, PARAMS, use_tqdm=False)]


@pytest.mark.parametrize("sizes", [(2, 1), (1, 2), (2, 2)], ids=["tp2", "pp2", "tp2-pp2"])
def test_tokens_are_those_of_one_process(tiny: Path, expected: list[list[int]], cluster: str, sizes: tuple[int, int]) -> None:
    import ray

    from lockstep import LLM

    split = {"tensor_parallel_size": sizes[0], "pipeline_parallel_size": sizes[1], "distributed_executor_backend": "ray"}
    handler = signal.getsignal(signal.SIGTERM)
    with LLM(str(tiny), cpu_binding=False, startup_timeout_seconds=120, **split, **COMMON) as llm:
        assert [o.outputs[0].token_ids for o in llm.generate(PROMPTS, PARAMS, use_tqdm=False)] == expected
        assert [m.rank for m in llm.memory()] == list(range(sizes[0] * sizes[1]))
    assert not ray.is_initialized(), "what it connected to, it has left"
    assert signal.getsignal(signal.SIGTERM) == handler


def test_two_executors_share_a_connection_and_the_last_one_leaves(cluster: str) -> None:
    import ray

    with fake_executor(1, backend="ray", startup_s=60) as second:
        with fake_executor(1, backend="ray", startup_s=60) as first:
            assert first.collective_rpc("echo") == second.collective_rpc("echo") == [[0, [], {}]]
        first.shutdown()
        assert second.collective_rpc("echo", (2,)) == [[0, [2], {}]]
    assert not ray.is_initialized()


def test_a_killed_driver_leaves_nothing_in_the_cluster(cluster: str, connected: None) -> None:
    code = (
        "from lockstep.testing.executors import *\nimport time\n"
        "with fake_executor(2, backend='ray', startup_s=60) as e:\n"
        "    print(*[w['pid'] for w in e.collective_rpc('who')], flush=True); time.sleep(60)\n"
    )
    driver = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert driver.stdout is not None
    pids = [int(pid) for pid in driver.stdout.readline().split()]
    assert len(pids) == 2
    pids.append(parent_of(pids[0]))
    driver.kill()
    driver.wait()
    driver.stdout.close()
    assert procs.wait_gone(pids, 15) == []
    assert wait_for(lambda: not living_groups() and not busy_cpus(), 15)


@pytest.mark.full
def test_replicas_each_on_the_cluster(tiny: Path, expected: list[list[int]], cluster: str) -> None:
    from lockstep import LLM

    split = {"pipeline_parallel_size": 2, "data_parallel_size": 2, "distributed_executor_backend": "ray"}
    with LLM(str(tiny), cpu_binding=False, startup_timeout_seconds=120, **split, **COMMON) as llm:
        assert [o.outputs[0].token_ids for o in llm.generate(PROMPTS, PARAMS, use_tqdm=False)] == expected


def test_replicas_are_actors_and_outlive_their_deaths(tiny: Path, expected: list[list[int]], connected: None) -> None:
    """Two replicas as Ray actors: the answers of one process, also when a replica is killed, and then a whole actor."""
    from lockstep import LLM

    sizes = {"data_parallel_size": 2, "data_parallel_backend": "ray"}
    with LLM(str(tiny), startup_timeout_seconds=60, **sizes, **COMMON) as llm:
        found = [o.outputs[0].token_ids for o in llm.generate(PROMPTS, PARAMS, use_tqdm=False)]
        assert found == expected
        first, second = llm.collective_rpc("process_id")
        os.kill(first, signal.SIGKILL)
        assert [o.outputs[0].token_ids for o in llm.generate(PROMPTS, PARAMS, use_tqdm=False)] == expected
        os.kill(parent_of(second), signal.SIGKILL)
        assert [o.outputs[0].token_ids for o in llm.generate(PROMPTS, PARAMS, use_tqdm=False)] == expected
        deadline = time.monotonic() + 60
        while not all(load.routable for load in llm._client.book.loads):  # type: ignore[attr-defined]
            assert time.monotonic() < deadline, "a replica did not come back"
            llm._client.step()
        pids = llm.collective_rpc("process_id")
    assert procs.wait_gone(pids, 10) == []
    assert wait_for(lambda: not busy_cpus(), 15)


def test_replicas_come_to_the_address_that_the_environment_names(tiny: Path, connected: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from lockstep import LLM

    monkeypatch.setenv("LOCKSTEP_HOST_IP", "127.0.0.2")
    sizes = {"data_parallel_size": 2, "data_parallel_backend": "ray"}
    with LLM(str(tiny), startup_timeout_seconds=40, **sizes, **COMMON) as llm:
        assert llm._client._fleet._doorman.host == "127.0.0.2"  # type: ignore[attr-defined]
        assert llm.collective_rpc("ping") == [0, 0]
    assert wait_for(lambda: not busy_cpus(), 15)


def test_an_actor_that_fails_at_once_ends_the_wait(tiny: Path, connected: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from lockstep import LLM

    class NoReplica:
        def keep(self, launch: bytes) -> str:
            return "there is no such model here."

    monkeypatch.setattr("lockstep.cluster.ray.ReplicaHost", NoReplica)
    started = time.monotonic()
    with pytest.raises(ExecutorError, match=r"^replica [01], which Ray was to start, did not come: there is no such model here\.$"):
        LLM(str(tiny), startup_timeout_seconds=100, data_parallel_size=2, data_parallel_backend="ray", **COMMON)
    assert time.monotonic() - started < 50
    assert wait_for(lambda: not busy_cpus(), 15)


def test_an_actor_that_ends_later_is_replaced(tiny: Path, connected: None, caplog: pytest.LogCaptureFixture) -> None:
    """It is refused once, and ends; the next one is let in."""
    from lockstep import LLM

    with LLM(str(tiny), startup_timeout_seconds=60, data_parallel_size=2, data_parallel_backend="ray", **COMMON) as llm:
        client = llm._client
        client._fleet._doorman.bar(1, "the test says so")  # type: ignore[attr-defined]
        os.kill(llm.collective_rpc("process_id")[1], signal.SIGKILL)
        deadline = time.monotonic() + 60
        while "which Ray was to start, did not come: the leader at" not in caplog.text:
            assert time.monotonic() < deadline, "its end was not noticed"
            client.step()
        client._fleet._doorman._barred.clear()  # type: ignore[attr-defined]
        while not all(load.routable for load in client.book.loads):  # type: ignore[attr-defined]
            assert time.monotonic() < deadline, "no new actor brought it back"
            client.step()
        assert llm.collective_rpc("ping") == [0, 0]
    assert wait_for(lambda: not busy_cpus(), 15)


def test_only_replicas_that_wait_for_room_are_said_to(tiny: Path, connected: None) -> None:
    from lockstep import LLM

    sizes = {"data_parallel_size": 2, "tensor_parallel_size": 3, "data_parallel_backend": "ray"}
    with pytest.raises(ExecutorError, match=r"the cluster has no room for 1 of them: each replica takes 3 CPU of one node, and 1 are free"):
        LLM(str(tiny), startup_timeout_seconds=12, **sizes, **COMMON)
    assert wait_for(lambda: not busy_cpus(), 15)


def test_replicas_whose_actors_run_do_not_wait_for_room(tiny: Path, connected: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from lockstep import LLM

    class Late:
        def keep(self, launch: bytes) -> str:
            time.sleep(60)
            return ""

    monkeypatch.setattr("lockstep.cluster.ray.ReplicaHost", Late)
    wanted = r"replicas \[0, 1\], which Ray was to start, have not reported in 8 s: their actors run; see that the nodes"
    with pytest.raises(ExecutorError, match=wanted):
        LLM(str(tiny), startup_timeout_seconds=8, data_parallel_size=2, data_parallel_backend="ray", **COMMON)
    assert wait_for(lambda: not busy_cpus(), 15)


def busy_cpus() -> float:
    import ray

    return float(ray.cluster_resources()["CPU"] - ray.available_resources().get("CPU", 0.0))


def living_groups() -> list[str]:
    import ray

    return [g["state"] for g in ray.util.placement_group_table().values() if g["state"] != "REMOVED"]


def test_steps_calls_and_nothing_left_behind(connected: None) -> None:
    import ray

    before = set(os.listdir("/dev/shm"))
    with fake_executor(2, pipeline_parallel_size=2, backend="ray", startup_s=60) as executor:
        futures = [executor.execute_model(decode_plan(step)) for step in range(30)]
        assert [f.result(20).tokens for f in futures] == [[s * 1000, s * 1000 + 3] for s in range(30)]
        assert executor.collective_rpc("echo", (1, "x")) == [[r, [1, "x"], {}] for r in range(4)]
        assert executor.collective_rpc("seen_steps") == [list(range(30))] * 4
        with pytest.raises(ExecutorError, match=rf"rank 2 on node 1 \({HOST}\) raised KeyError in call misbehave_on"):
            executor.collective_rpc("misbehave_on", (2, "raise:here"))
        pids = pids_by_rank(executor)
        actors = {parent_of(pid) for pid in pids}
        assert len(actors) == 2 and os.getpid() not in actors
        assert living_groups() == ["CREATED"] and busy_cpus() == 4
    assert procs.wait_gone([*pids, *actors], 10) == []
    assert wait_for(lambda: not living_groups() and not busy_cpus(), 10), (living_groups(), busy_cpus())
    assert ray.is_initialized(), "it did not connect, so it does not disconnect"
    assert not {name for name in set(os.listdir("/dev/shm")) - before if not name.startswith("plasma")}


def parent_of(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_text(encoding="utf-8").rpartition(")")[2].split()[1])


def test_a_killed_rank_is_named_with_its_node(connected: None) -> None:
    with fake_executor(2, pipeline_parallel_size=2, backend="ray", startup_s=60) as executor:
        pids = pids_by_rank(executor)
        executor.collective_rpc("arm", (2, "sleep:30"))
        future = executor.execute_model(decode_plan(5))
        time.sleep(0.7)  # until a beat has told of the step
        os.kill(pids[3], signal.SIGKILL)
        with pytest.raises(ExecutorError, match=rf"rank 3 on node 1 \({HOST}\) died in .*step 5.*killed by SIGKILL") as caught:
            future.result(20)
        assert (caught.value.kind, caught.value.rank, caught.value.exitcode) == ("died", 3, -9)
        assert procs.wait_gone(pids, 5) == []


def test_a_killed_actor_is_a_lost_node_and_takes_its_ranks_along(connected: None) -> None:
    with fake_executor(2, pipeline_parallel_size=2, backend="ray", startup_s=60) as executor:
        pids = pids_by_rank(executor)
        os.kill(parent_of(pids[0]), signal.SIGKILL)
        with pytest.raises(ExecutorError, match=rf"node 0 \({HOST}, ranks 0, 1\) is lost: the connection was.*[Aa]ctor") as caught:
            executor.collective_rpc("misbehave", ("sleep:8",))
        assert caught.value.kind == "lost"
        assert procs.wait_gone(pids, 5) == []
    assert wait_for(lambda: not living_groups() and not busy_cpus(), 10)


def test_too_few_resources_are_said_with_numbers(connected: None) -> None:
    wanted = (
        r"no room for the ranks in startup_timeout_seconds=1: asked were 6 CPU, each bundle of one node \(bundle 0 \(ranks 0, 1, 2\) 3 "
        r"CPU; bundle 1 \(ranks 3, 4, 5\) 3 CPU\); its 1 node\(s\) have 4 CPU \(.* 4 CPU\), of which 4 are free\. Use fewer ranks"
    )
    with pytest.raises(ExecutorError, match=wanted), fake_executor(3, pipeline_parallel_size=2, backend="ray", startup_s=1):
        pass
    with (
        pytest.raises(ExecutorError, match=r"No node has 5: use a tensor_parallel_size of at most 4"),
        fake_executor(5, backend="ray", startup_s=1),
    ):
        pass
    assert wait_for(lambda: not living_groups(), 10)


def test_another_version_on_a_node_is_refused(connected: None, monkeypatch: pytest.MonkeyPatch) -> None:
    from lockstep.distributed import greeting

    monkeypatch.setattr(greeting, "__version__", "0.0.7")
    wanted = rf"node [01] \({HOST}, pid \d+\) was refused: it runs lockstep {lockstep.__version__} and the leader 0\.0\.7"
    with pytest.raises(ExecutorError, match=wanted), fake_executor(1, pipeline_parallel_size=2, backend="ray", startup_s=60):
        pass


def test_an_actor_that_cannot_be_made_ends_the_wait(connected: None, monkeypatch: pytest.MonkeyPatch) -> None:
    import lockstep.executor.ray as backend

    class NoAgent:
        def __init__(self) -> None:
            raise ModuleNotFoundError("No module named 'lockstep'")

        def serve(self, launch: bytes) -> str:
            return ""

    monkeypatch.setattr(backend, "AgentHost", NoAgent)
    started = time.monotonic()
    wanted = r"node 0 of 1, which Ray was to start, did not: .*No module named 'lockstep'"
    with pytest.raises(ExecutorError, match=wanted), fake_executor(2, backend="ray", startup_s=60):
        pass
    assert time.monotonic() - started < 30


def test_in_a_placement_group_that_one_is_used(connected: None) -> None:
    import ray
    from ray.util.scheduling_strategies import PlacementGroupSchedulingStrategy

    from tests.distributed.ray_jobs import in_a_placement_group

    group = ray.util.placement_group([{"CPU": 1}, {"CPU": 2}])
    try:
        before = len(ray.util.placement_group_table())
        task = ray.remote(in_a_placement_group).options(num_cpus=1, scheduling_strategy=PlacementGroupSchedulingStrategy(group, 0))
        found = ray.get(task.remote({"tensor_parallel_size": 2}), timeout=60)
    finally:
        ray.util.remove_placement_group(group)
    refused = found.pop("refused")
    assert found == {"backend": "ray", "tokens": [1000, 1003], "groups": before, "initialized": True}
    assert "whose bundles have 1 CPU, 2 CPU, and 1 of at least 4 CPU are needed" in refused


@pytest.mark.parametrize(
    ("address", "words"), [("127.0.0.1:1", "no Ray cluster answers there.*refused"), ("ray://10.0.0.1:10001", "is for Ray's client")]
)
def test_an_address_that_cannot_be_used(monkeypatch: pytest.MonkeyPatch, address: str, words: str) -> None:
    import lockstep.executor.ray_actors as backend

    monkeypatch.setenv("RAY_ADDRESS", address)
    with pytest.raises(ConfigError, match=words):
        backend._connect(ParallelConfig(), "CPU")


def test_a_cluster_of_another_version_is_refused_and_not_replaced(monkeypatch: pytest.MonkeyPatch) -> None:
    import ray

    import lockstep.executor.ray_actors as backend

    asked: list[object] = []

    def init(address: str, **options: object) -> None:
        asked.append(address)
        raise RuntimeError("Version mismatch: The cluster was started with:\n    Ray: 2.1.0\n    Python: 3.9.1\nThis process ...")

    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setattr(ray, "init", init)
    monkeypatch.setattr(ray, "shutdown", lambda: None)
    wanted = rf"Version mismatch: .* Ray: 2\.1\.0 Python: 3\.9\.1 .*Install the cluster's versions.*Ray {re.escape(ray.__version__)} and"
    with pytest.raises(ConfigError, match=wanted):
        backend._connect(ParallelConfig(), "CPU")
    assert asked == ["auto"]


def test_replicas_need_a_cluster_that_outlives_them(monkeypatch: pytest.MonkeyPatch) -> None:
    import lockstep.executor.ray_actors as backend

    monkeypatch.setenv("RAY_ADDRESS", "local")
    with pytest.raises(ConfigError, match="start one with `ray start --head`"):
        backend._connect(ParallelConfig(data_parallel_size=2), "CPU")
