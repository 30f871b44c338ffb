"""Which ranks, replicas and ports each of several nodes has: pure arithmetic, for every number of nodes and replicas that fit."""

from __future__ import annotations

from dataclasses import replace

import pytest

from lockstep.cluster.doorman import Doorman
from lockstep.config.build import build_config
from lockstep.config.endpoint import for_endpoint
from lockstep.config.errors import ConfigError
from lockstep.config.nodes import check_nodes, placed
from lockstep.config.serve import ServeOptions
from lockstep.config.tree import EngineConfig, ParallelConfig

SIZES = [(nodes, size, world) for nodes in (1, 2, 3, 4, 6, 8) for size in (1, 2, 3, 4, 6, 12) for world in (1, 2, 4, 6)]


def fits(nodes: int, size: int, world: int) -> bool:
    return (nodes % size == 0 or size % nodes == 0) and world % max(1, nodes // size) == 0


def at(nodes: int, size: int, world: int, node: int) -> ParallelConfig:
    """A node's configuration, as it is once it is resolved."""
    parallel = ParallelConfig(nnodes=nodes, data_parallel_size=size, tensor_parallel_size=world, node_rank=node)
    headless = node > 0
    check_nodes(parallel, headless=headless)
    return placed(parallel, headless=headless)


@pytest.mark.parametrize(("nodes", "size", "world"), [s for s in SIZES if fits(*s)])
def test_every_rank_of_every_replica_is_on_one_node(nodes: int, size: int, world: int) -> None:
    found: list[tuple[int, int]] = []  # (replica, rank)
    for node in range(nodes):
        there = at(nodes, size, world, node)
        if there.in_groups:
            replicas = range(node // there.nodes_per_replica, node // there.nodes_per_replica + 1)
            led = replace(there, data_parallel_rank=replicas[0])  # as the leader has it
            assert node in led.group and led.report_port == there.master_port + replicas[0]
            assert node == 0 or there.report_port == led.report_port, "where the node knocks is where it is awaited"
            assert there.ranks_here == there.local_world_size and led.first_device == 0, "it has the host to itself"
        else:
            first = there.data_parallel_start_rank or 0
            replicas = range(first, first + there.local_replicas)
        found += [(replica, rank) for replica in replicas for rank in there.local_ranks]
    assert sorted(found) == [(replica, rank) for replica in range(size) for rank in range(world)]


@pytest.mark.parametrize(("nodes", "size", "world"), [(2, 1, 2), (4, 2, 2), (4, 4, 1), (2, 4, 1), (1, 2, 2)])
def test_who_runs_the_engines(nodes: int, size: int, world: int) -> None:
    leader = at(nodes, size, world, 0)
    led = [at(nodes, size, world, node).local_replicas for node in range(nodes)]
    assert leader.replicas_led == (size if nodes > size or nodes == 1 else led[0])
    assert leader.in_groups or nodes == 1 or size == 1 or sum(led) == size


def test_a_start_over_nodes_may_take_both_waits() -> None:
    """For the nodes, and then for their ranks: who waits for the whole must not speak before who knows what is late."""
    one = EngineConfig()
    assert one.start_limit_s == one.runtime.startup_timeout_seconds
    several = build_config(nnodes=4, data_parallel_size=2, tensor_parallel_size=2)
    assert several.start_limit_s > 2 * several.runtime.startup_timeout_seconds
    whole = build_config(nnodes=2, data_parallel_size=2)
    assert whole.start_limit_s == whole.runtime.startup_timeout_seconds


def test_a_node_that_keeps_replicas_is_named_as_it_was_started(capfd: pytest.CaptureFixture[str]) -> None:
    parallel = replace(at(2, 4, 1, 0), data_parallel_rpc_port=0, master_port=29777)
    doorman = Doorman(parallel, {})
    try:
        words = doorman.missing([2, 3], 5.0)
    finally:
        doorman.close()
    said = f"distributed_executor_backend is uni: hosts report at 127.0.0.1:{doorman.port}\n"
    assert capfd.readouterr().err == said, "told at the start, with the port that was found"
    assert "replicas 2, 3 have not reported" in words
    assert "-dp 4 --nnodes 2 --node-rank N --master-addr 127.0.0.1 --master-port 29777` on node N = 1" in words
    assert "give its network address as master_addr" in words


def test_a_server_for_each_host_is_not_one_over_all() -> None:
    config = build_config(nnodes=2, data_parallel_size=2, data_parallel_size_local=1, data_parallel_start_rank=0)
    with pytest.raises(ConfigError, match="data_parallel_hybrid_lb with nnodes=2"):
        for_endpoint(config, ServeOptions(data_parallel_hybrid_lb=True))
