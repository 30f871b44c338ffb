"""Every public method has a job that fails when the method's body is emptied, and this proves it by emptying it."""

from __future__ import annotations

import inspect

import pytest

from lockstep.distributed.group import GroupCoordinator
from lockstep.testing.ranks import RankError, run_ranks_outcomes

G, P = "tests.distributed.group_jobs", "tests.distributed.parallel_state_jobs"
NOTICED_BY = {
    "all_reduce": "reductions",
    "all_reduce_": "reductions",
    "combine_partials": "reductions",
    "reduce_scatter": "reductions",
    "reduce_scatterv": "reductions",
    "all_gather": "gathers",
    "all_gatherv": "gathers",
    "gather": "gathers",
    "largest": "gathers",
    "broadcast": "broadcasts",
    "broadcast_object": "broadcasts",
    "broadcast_object_list": "broadcasts",
    "all_to_all": "exchange",
    "send": "point_to_point",
    "recv": "point_to_point",
    "isend": "point_to_point",
    "irecv": "point_to_point",
    "send_object": "point_to_point",
    "isend_object": "point_to_point",
    "recv_object": "point_to_point",
    "irecv_object": "point_to_point",
    "all_gather_objects": "broadcasts",
    "broadcast_tensor_dict": "tensor_dicts",
    "send_tensor_dict": "tensor_dicts",
    "recv_tensor_dict": "tensor_dicts",
    "isend_tensor_dict": "tensor_dicts",
    "irecv_tensor_dict": "tensor_dicts",
    "announce": "barriers",
    "barrier": "barriers",
    "make_sibling_device_group": "siblings",
    "dispatch": "experts",
    "dispatch_router_logits": "experts",
    "combine": "experts",
    "prepare_communication_buffer_for_model": "prepared_checked",
    "cpu_group": "torch_groups",
    "device_group": "torch_groups",
    "device_communicator": "properties",
    "create_mq_broadcaster": "queues",
    "create_single_reader_mq_broadcasters": "queues",
    "destroy": "destroyed",
    "graph_capture": "captured",
    "first_rank": "properties",
    "last_rank": "properties",
    "is_first_rank": "properties",
    "is_last_rank": "properties",
    "next_rank": "properties",
    "prev_rank": "properties",
}
STATE = {
    "destroy_model_parallel": f"{P}:life",
    "initialize_model_parallel": f"{P}:life",
    "ensure_model_parallel_initialized": f"{P}:life",
    "model_parallel_is_initialized": f"{P}:life",
    "patch_tensor_parallel_group": f"{P}:names",
    "graph_capture": f"{P}:names",
    "set_custom_all_reduce": f"{P}:names",
    "init_model_parallel_group": f"{P}:names",
    "get_topology": f"{P}:layout",
    "get_worker_rank_suffix": f"{P}:layout_checked",
    "is_global_first_rank": f"{P}:layout",
    "is_local_first_rank": f"{P}:layout",
    "get_tensor_model_parallel_rank": f"{P}:layout",
    "get_tensor_model_parallel_world_size": f"{P}:layout",
    "get_decode_context_model_parallel_rank": f"{P}:layout",
    "get_decode_context_model_parallel_world_size": f"{P}:layout",
    "get_context_model_parallel_group": f"{P}:layout",
    "get_node_count": f"{P}:nodes_checked",
    "in_the_same_node_as": f"{P}:nodes_checked",
    "prepare_communication_buffer_for_model": f"{G}:prepared_checked",
}
CASES = [
    *((f"GroupCoordinator.{method}", f"{G}:{job}") for method, job in NOTICED_BY.items()),
    *((f"parallel_state.{name}", job) for name, job in STATE.items()),
]
SAMPLE = {"GroupCoordinator.all_reduce_", "GroupCoordinator.barrier", "parallel_state.destroy_model_parallel"}


@pytest.mark.parametrize(("method", "job"), [pytest.param(m, j, marks=() if m in SAMPLE else pytest.mark.full, id=m) for m, j in CASES])
def test_an_emptied_method_is_noticed(method, job):
    args = [{"tp": 2}] if "layout" in job else []
    outcomes = run_ranks_outcomes("tests.distributed.mutation_jobs:emptied", 2, method, job, args, timeout=5)
    assert any(isinstance(o, RankError) or o == "noticed" for o in outcomes), outcomes


def test_the_same_jobs_pass_when_nothing_is_emptied():
    """Else the tests above would prove nothing. The jobs run by name elsewhere are left out here."""
    from lockstep.testing.ranks import run_ranks

    for job in (f"{G}:prepared_checked", f"{G}:properties", f"{G}:destroyed", f"{G}:captured", f"{P}:nodes_checked"):
        run_ranks(job, 2)
    run_ranks(f"{P}:layout_checked", 2, {"tp": 2})


def test_no_public_method_is_left_out():
    public = {name for name, _ in inspect.getmembers(GroupCoordinator) if not name.startswith("_")}
    assert public == set(NOTICED_BY)
