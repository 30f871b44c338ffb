"""parallel_state: every axis on gloo, life cycle, and groups of other launchers."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

import lockstep.distributed
from lockstep.distributed import parallel_state as ps
from lockstep.distributed.topology import Topology
from lockstep.testing.ranks import run_ranks
from lockstep.utils.net import Listener

JOBS = "tests.distributed.parallel_state_jobs"
LAYOUTS = [{"tp": 2}, {"tp": 2, "pp": 2}, {"tp": 2, "pcp": 2, "dcp": 2}, {"pp": 3}, {"tp": 2, "dp": 2}]
LARGE = [{"tp": 2, "pp": 2, "dp": 2}, {"tp": 4, "pp": 2, "dcp": 2}, {"tp": 2, "pp": 2, "pcp": 2}, {"tp": 4}, {"tp": 8, "dcp": 4}, {"dp": 5}]


@pytest.mark.parametrize("sizes", [*LAYOUTS, *(pytest.param(s, marks=pytest.mark.full) for s in LARGE)], ids=str)
def test_groups_are_those_of_the_topology(sizes):
    world_size = 1
    for axis, size in sizes.items():
        world_size *= size if axis != "dcp" else 1
    found = run_ranks(f"{JOBS}:layout", world_size, sizes)
    grid = Topology(world_size, **sizes)
    for rank, report in enumerate(found):
        at = grid.coordinates(rank)
        assert report["suffix"] == f"dp{at.dp}_pp{at.pp}_pcp{at.pcp}_tp{at.tp}_dcp{at.dcp}_ep{at.ep}_rank{rank}"
        assert report["other"] == "dp0_pp0_pcp0_tp0_dcp0_ep0_rank0"


@pytest.mark.skipif(sys.platform != "linux", reason="the names of threads are read from /proc")
def test_all_groups_of_a_rank_share_one_event_loop():
    assert run_ranks(f"{JOBS}:event_loops", 4) == [(1, 0, True)] * 4


def test_external_data_parallel_makes_separate_worlds_of_groups():
    found = run_ranks(f"{JOBS}:layout", 4, {"tp": 2})
    assert [report["tp"] for report in found] == [[0, 1], [0, 1], [2, 3], [2, 3]]
    assert [report["dp"] for report in found] == [[0], [1], [2], [3]]


def test_life_cycle():
    run_ranks(f"{JOBS}:life", 2)


def test_destroy_leaves_nothing_and_init_works_again(tmp_path):
    before = set(os.listdir("/dev/shm"))
    for counts in run_ranks(f"{JOBS}:again", 2, str(tmp_path), init=False):
        # (threads, descriptors): a library thread may take its time to end, but nothing accumulates
        assert all(last <= first for first, last in zip(counts[0], counts[2], strict=True)), counts
    assert not [name for name in set(os.listdir("/dev/shm")) - before if name.startswith("lockstep_")]


def test_collectives_by_name_patching_and_capture():
    run_ranks(f"{JOBS}:names", 2)


def test_a_foreign_default_group_is_checked_used_and_left(tmp_path):
    run_ranks(f"{JOBS}:foreign", 2, str(tmp_path), init=False)


def test_a_default_group_that_cannot_serve_is_refused_with_the_call_to_make():
    run_ranks(f"{JOBS}:unusable", 1, init=False)


def test_device_groups_are_split_off_a_default_group_that_can_be_split():
    run_ranks(f"{JOBS}:split", 4)


def test_groups_are_made_one_by_one_where_it_cannot_be():
    run_ranks(f"{JOBS}:bound", 2)


def test_nodes():
    assert run_ranks(f"{JOBS}:nodes", 3) == [[[True] * 3] * 3] * 3


def test_nodes_of_two_hosts():
    assert run_ranks(f"{JOBS}:two_hosts", 4) == [([False, True, False, True], 2)] * 4


def test_ranks_listen_on_loopback_only():
    for addresses in run_ranks(f"{JOBS}:listening", 2):
        assert addresses and set(addresses) == {"0100007F"}


def test_tcp_file_and_env_methods(tmp_path):
    assert run_ranks(f"{JOBS}:methods", 2, f"file://{tmp_path}/meet", "gloo", init=False) == [2.0, 2.0]
    with Listener() as held:
        port = held.port
    assert run_ranks(f"{JOBS}:methods", 2, f"tcp://127.0.0.1:{port}", "gloo", init=False) == [2.0, 2.0]
    environ = {"MASTER_ADDR": "localhost", "MASTER_PORT": str(port)}
    assert run_ranks(f"{JOBS}:from_environment", 2, init=False, environ=environ) == [(0, 2, 0, 2.0), (1, 2, 1, 2.0)]


def test_torchrun_is_enough(tmp_path):
    """env:// under torchrun, whose agent serves the store."""
    script = tmp_path / "job.py"
    script.write_text(
        "import os\nimport torch\nfrom lockstep.distributed import parallel_state as ps\n"
        "ps.init_distributed_environment(backend='gloo', timeout=60)\nps.initialize_model_parallel(2)\n"
        "t = ps.get_tp_group()\nos.write(1, f'sum {t.all_reduce(torch.ones(1)).item()}\\n'.encode())\n"
        "t.barrier()\nps.cleanup_dist_env_and_memory()\n"
    )
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--nproc-per-node=2",
        "--rdzv-backend=c10d",
        "--rdzv-endpoint=localhost:0",
        str(script),
    ]
    done = subprocess.run(
        command, capture_output=True, text=True, timeout=120, cwd=os.getcwd(), env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)}
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.count("sum 2.0") == 2


def test_a_users_interface_stays():
    assert run_ranks(f"{JOBS}:users_interface", 1, init=False, environ={"GLOO_SOCKET_IFNAME": "eth7"}) == ["eth7"]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"world_size": 2, "rank": 2, "distributed_init_method": "tcp://127.0.0.1:1"}, "rank 2 is outside 0..1"),
        ({"distributed_init_method": "tcp://127.0.0.1:1"}, "are needed"),
        ({"world_size": 1, "rank": 0, "distributed_init_method": "http://x"}, "is unknown: use env://"),
        ({"world_size": 1, "rank": 0, "distributed_init_method": "tcp://nohost"}, "must be tcp://host:port"),
        ({"world_size": 1, "rank": 0, "backend": "smoke"}, "backend 'smoke' is unknown"),
        ({"world_size": 1, "rank": 0, "timeout": 0}, "more than 0"),
    ],
)
def test_settings_that_cannot_be_are_refused(arguments, text, monkeypatch):
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ValueError, match=text):
        ps.init_distributed_environment(**{"backend": "gloo", **arguments})


def test_safe_before_init():
    assert ps.is_global_first_rank() and ps.is_local_first_rank()
    assert lockstep.distributed.broadcast_tensor_dict({"a": 1}) == {"a": 1}
    with pytest.raises(AssertionError, match="not initialized"):
        ps.get_node_count()
    ps.cleanup_dist_env_and_memory()


def test_names_are_where_people_look_for_them():
    wanted = [
        "TensorMetadata",
        "Handle",
        "_split_tensor_dict",
        "_get_unique_name",
        "all_reduce",
        "reduce_scatter",
        "all_gather",
        "get_world_group",
        "get_tp_group",
        "get_pp_group",
        "get_dp_group",
        "get_ep_group",
        "get_eplb_group",
        "get_dcp_group",
        "get_pcp_group",
        "get_inner_dp_world_group",
        "get_context_model_parallel_group",
        "get_tensor_model_parallel_world_size",
        "get_tensor_model_parallel_rank",
        "get_decode_context_model_parallel_world_size",
        "get_decode_context_model_parallel_rank",
        "init_world_group",
        "init_model_parallel_group",
        "init_distributed_environment",
        "initialize_model_parallel",
        "ensure_model_parallel_initialized",
        "model_parallel_is_initialized",
        "patch_tensor_parallel_group",
        "graph_capture",
        "set_custom_all_reduce",
        "destroy_model_parallel",
        "destroy_distributed_environment",
        "cleanup_dist_env_and_memory",
        "in_the_same_node_as",
        "_node_count",
        "get_node_count",
        "is_global_first_rank",
        "is_local_first_rank",
        "GroupCoordinator",
        "GraphCaptureContext",
        "get_worker_rank_suffix",
        "StatelessProcessGroup",
        "prepare_communication_buffer_for_model",
        "tensor_model_parallel_all_reduce",
        "broadcast_tensor_dict",
    ]
    for name in wanted:
        assert getattr(ps, name) is getattr(lockstep.distributed, name)
    with pytest.raises(AttributeError, match="no attribute 'nonsense'"):
        _ = lockstep.distributed.nonsense
