"""The rules of replicas over hosts: what breaks them, and that the message names setting, value, rule and remedy."""

from __future__ import annotations

import pytest

from lockstep.cli.refused import UNAVAILABLE
from lockstep.config import devices
from lockstep.config.build import build_config
from lockstep.config.errors import ConfigError
from lockstep.config.replicas import check_replicas
from lockstep.config.tree import ParallelConfig, RuntimeConfig
from lockstep.config.validate import pick_device, resolve
from lockstep.executor import affinity
from lockstep.utils.cores import PhysicalCore


def parallel(**settings: object) -> ParallelConfig:
    return build_config(**settings).parallel


LEADER = {"data_parallel_size": 4, "data_parallel_size_local": 2}
KEPT = {**LEADER, "data_parallel_start_rank": 2}

BROKEN = [
    (False, {"data_parallel_size_local": 2}, ["data_parallel_size_local=2", "data_parallel_size=1", "at most 1"]),
    (False, {**LEADER, "data_parallel_start_rank": 2}, ["data_parallel_start_rank=2 without headless", "lockstep serve"]),
    (False, {"data_parallel_backend": "ray"}, ["data_parallel_backend='ray'", "data_parallel_size=1", "raise data_parallel_size"]),
    (True, {"data_parallel_backend": "ray", "data_parallel_size": 2}, ["data_parallel_backend='ray' with headless"]),
    (
        False,
        {"data_parallel_backend": "ray", "data_parallel_size": 2, "distributed_executor_backend": "ray"},
        ["data_parallel_backend='ray' with distributed_executor_backend", "leave one of the two out"],
    ),
    (False, {"data_parallel_backend": "dask"}, ["data_parallel_backend='dask' is unknown", "use mp"]),
    (False, {**LEADER, "data_parallel_rank": 4}, ["data_parallel_rank=4", "from 0 to 3"]),
    (False, {**LEADER, "data_parallel_rpc_port": 0}, ["data_parallel_rpc_port=0", "1 to 65535"]),
    (False, {**LEADER, "data_parallel_rpc_port": 65536}, ["data_parallel_rpc_port=65536"]),
    (False, {"data_parallel_size": 2, "data_parallel_rpc_port": 99999}, ["data_parallel_rpc_port=99999", "1 to 65535"]),
    (False, {**LEADER, "data_parallel_address": "0.0.0.0"}, ["data_parallel_address='0.0.0.0'", "give the leader's"]),
    (False, {**LEADER, "data_parallel_rank": 1, "data_parallel_start_rank": 1}, ["data_parallel_start_rank=1", "leave"]),
    (True, {**KEPT, "data_parallel_rank": 2}, ["data_parallel_rank=2 with headless", "leave"]),
    (True, {**KEPT, "data_parallel_start_rank": 3}, ["data_parallel_start_rank=3", "up to 4", "up to 3", "start at 2"]),
    (True, {**KEPT, "data_parallel_start_rank": 9}, ["data_parallel_start_rank=9", "start at 2"]),
    (True, {**KEPT, "data_parallel_start_rank": -1}, ["data_parallel_start_rank=-1", "at least 0"]),
    (True, {"data_parallel_size": 4, "data_parallel_start_rank": 2}, ["headless needs data_parallel_size_local"]),
    (True, {**KEPT, "data_parallel_size_local": 0}, ["data_parallel_size_local=0", "headless host keeps at least 1"]),
    (False, {"data_parallel_size_local": 0}, ["data_parallel_size_local=0", "data_parallel_size=1"]),
    (False, {**LEADER, "data_parallel_size_local": -1}, ["data_parallel_size_local=-1", "at least 1"]),
    (False, {**LEADER, "data_parallel_size_local": 0, "data_parallel_rank": 1}, ["data_parallel_size_local=0", "data_parallel_rank=1"]),
    (
        False,
        {"data_parallel_size": 2, "data_parallel_size_local": 0, "distributed_executor_backend": "external_launcher"},
        ["data_parallel_size_local=0", "launcher's processes", "leave it out"],
    ),
    (True, {}, ["headless with data_parallel_size=1"]),
    (True, {**KEPT, "data_parallel_address": ""}, ["data_parallel_address=''"]),
]


@pytest.mark.parametrize(("headless", "settings", "words"), BROKEN)
def test_what_cannot_be_is_refused_by_name(headless: bool, settings: dict[str, object], words: list[str]) -> None:
    with pytest.raises(ConfigError) as found:
        check_replicas(parallel(**settings), headless=headless)
    for word in words:
        assert word in str(found.value)


def test_what_can_be() -> None:
    check_replicas(parallel())
    check_replicas(parallel(**LEADER))
    check_replicas(parallel(data_parallel_size=4, data_parallel_size_local=4))
    check_replicas(parallel(**KEPT), headless=True)
    check_replicas(parallel(**{**KEPT, "data_parallel_start_rank": 1}), headless=True)
    check_replicas(parallel(**LEADER, data_parallel_rank=3))
    check_replicas(parallel(**LEADER), headless=True)  # the first two, for a leader that runs none


def test_a_leader_may_run_no_replica_and_one_other_host_all(monkeypatch: pytest.MonkeyPatch) -> None:
    leader, _, _ = resolve(build_config(data_parallel_size=2, data_parallel_size_local=0))
    assert (leader.parallel.ranks_here, leader.parallel.replicas_led, leader.parallel.replicas_served) == (0, 0, 2)
    keeper, _, _ = resolve(build_config(data_parallel_size=2), headless=True)
    assert (keeper.parallel.data_parallel_start_rank, keeper.parallel.local_replicas) == (None, 2)
    monkeypatch.setattr(devices, "cuda_device_count", lambda: 0)
    assert pick_device(RuntimeConfig(device="cuda"), leader.parallel) == "cuda", "as its replicas say; it needs none itself"


@pytest.mark.parametrize(
    ("settings", "local", "mine"),
    [
        ({"data_parallel_size": 4}, 4, None),
        ({"data_parallel_size": 4, "data_parallel_rank": 3}, 4, 3),
        ({**LEADER, "data_parallel_rank": 1}, 2, 1),
        ({**LEADER, "data_parallel_rank": 3}, 2, 1),
        ({**KEPT, "data_parallel_rank": 2}, 2, 0),
        ({"data_parallel_size": 4, "data_parallel_size_local": 3, "data_parallel_start_rank": 1, "data_parallel_rank": 3}, 3, 2),
    ],
)
def test_a_host_is_shared_by_its_own_replicas_only(
    settings: dict[str, object], local: int, mine: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    p = parallel(tensor_parallel_size=2, **settings)
    assert (p.local_replicas, p.local_replica, p.ranks_here) == (local, mine, 2 * local)
    cores: list[PhysicalCore] = [(i,) for i in range(24)]
    monkeypatch.setattr(affinity.machine, "usable_cores", lambda: cores)
    monkeypatch.setattr(affinity.machine, "quota", lambda: None)
    plan = affinity.plan_here(2, p)
    each, first = (24 // (2 * local), 2 * (mine or 0)) if mine is not None else (12, 0)
    assert [rank.cores for rank in plan] == [tuple(range((first + i) * each, (first + i + 1) * each)) for i in range(2)]


def test_what_belongs_to_the_server_is_refused_by_name() -> None:
    for flag in ("-dpm", "--data-parallel-multi-port-external-lb"):
        assert "lockstep serve" in UNAVAILABLE[flag]
