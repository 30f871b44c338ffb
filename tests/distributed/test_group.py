"""GroupCoordinator: every method on real ranks."""

from __future__ import annotations

import gc

import pytest
import torch

from lockstep.distributed import custom_ops
from lockstep.distributed.group import GroupCoordinator, solo_group
from lockstep.distributed.groups import ParallelGroups
from lockstep.distributed.tensor_dict import _split_tensor_dict
from lockstep.testing.ranks import run_ranks

JOBS = "tests.distributed.group_jobs"
SIZES = pytest.mark.parametrize("world_size", [2, 3, *(pytest.param(n, marks=pytest.mark.full) for n in (4, 5, 8))])


@SIZES
@pytest.mark.parametrize(
    "job", ["reductions", "gathers", "broadcasts", "exchange", "point_to_point", "tensor_dicts", "barriers", "siblings"]
)
def test_group(job, world_size):
    run_ranks(f"{JOBS}:{job}", world_size)


@pytest.mark.parametrize("job", ["handles_tell", "objects", "retained", "experts", "torch_groups"])
def test_two_ranks(job):
    run_ranks(f"{JOBS}:{job}", 2)


@pytest.mark.parametrize("world_size", [2, 3])
def test_message_queues_of_a_group(world_size):
    run_ranks(f"{JOBS}:queues", world_size)


def test_broadcast_object_list_honours_its_group():
    run_ranks(f"{JOBS}:object_list_group", 4)


def test_slices_travel_and_the_whole_arrives():
    counts = run_ranks(f"{JOBS}:sliced", 4)
    # h 16/2 + odd 3 + inner.k 4/2 + own 2 + inner2.own 2
    assert counts == [17, 17, -1, -1]


def test_prepare_communication_visits_modules_once_per_group_of_several():
    assert run_ranks(f"{JOBS}:prepared", 2) == [["tp", "ep"]] * 2


def test_neighbours_are_global_ranks_and_wrap():
    found = run_ranks(f"{JOBS}:neighbours", 4)
    assert found[1] == (1, [1, 3], 1, 3, 3, 3, True, False, 0)
    assert found[2] == (2, [0, 2], 0, 2, 0, 0, False, True, 1)


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_collectives_stay_in_a_compiled_graph(backend):
    for names in run_ranks(f"{JOBS}:compiled", 2, backend, timeout=120):
        text = " ".join(names)
        assert all(op in text for op in ("all_reduce", "all_gather", "reduce_scatter", "all_reduce_")), text


def test_fake_implementations_give_shapes():
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        x = torch.empty(2, 6)
        assert torch.ops.lockstep.all_reduce(x, "g").shape == (2, 6)
        assert torch.ops.lockstep.all_gather(x, 1, 4, "g").shape == (2, 24)
        assert torch.ops.lockstep.reduce_scatter(x, 1, 3, "g").shape == (2, 2)
    with pytest.raises(AssertionError, match="Group nobody is not found"):
        custom_ops.lookup("nobody")


def test_a_group_of_one_is_free():
    """Tensors come back as they are; torch.distributed is never touched."""
    assert not torch.distributed.is_initialized()
    g = solo_group()
    x, y = torch.ones(2, 2), torch.ones(2, 2)
    for call in (
        g.all_reduce,
        g.all_reduce_,
        g.all_gather,
        g.reduce_scatter,
        g.gather,
        g.broadcast,
        g.all_gatherv,
        g.reduce_scatterv,
        g.all_to_all,
        g.combine,
    ):
        assert call(x) is x
    assert g.all_gatherv([x, y])[1] is y and g.all_gatherv(x, sizes=[2]) is x
    assert g.dispatch(x, y, x)[1] is y and g.dispatch_router_logits(x, y)[1] is y
    d = {"a": x}
    assert g.broadcast_tensor_dict(d) is d and g.send_tensor_dict(d) is d and g.recv_tensor_dict() is None
    assert g.isend_tensor_dict(d) == [] and g.irecv_tensor_dict() == (None, [], [])
    entries = [object()]
    assert g.broadcast_object(entries) is entries and g.broadcast_object_list(entries) is entries
    g.barrier()
    assert g.cpu_group is None and g.device_group is None and g.device_communicator is None
    assert g.make_sibling_device_group() is None
    assert (g.rank, g.ranks, g.world_size, g.rank_in_group, g.next_rank, g.prev_rank) == (0, [0], 1, 0, 0, 0)
    g.prepare_communication_buffer_for_model(torch.nn.Linear(1, 1))
    with g.graph_capture() as context:
        assert context.stream is None
    g.destroy()
    g.destroy()


def test_solo_groups_live_side_by_side():
    one, other = ParallelGroups.solo(), ParallelGroups.solo()
    assert one.tp is not other.tp and one.tp.unique_name != other.tp.unique_name
    one.destroy()
    x = torch.ones(1)
    assert torch.ops.lockstep.all_reduce(x.clone(), other.tp.unique_name).item() == 1
    with pytest.raises(ValueError, match="destroyed"):
        torch.ops.lockstep.all_reduce(x, one.tp.unique_name)


def test_forgotten_groups_are_collected():
    name = solo_group("passing").unique_name
    gc.collect()
    with pytest.raises(ValueError, match="destroyed"):
        custom_ops.lookup(name)


@pytest.mark.parametrize(
    ("ranks", "text"), [([[1, 0]], "ascending"), ([[0, 0]], "ascending"), ([[1, 2]], "is in 0 of the lists"), ([[0], [0, 1]], "is in 2 of")]
)
def test_lists_that_cannot_be_groups_are_refused(ranks, text):
    with pytest.raises(ValueError, match=text):
        GroupCoordinator(ranks, 0, "gloo", rank=0)


def test_split_tensor_dict_keeps_order_and_makes_contiguous():
    metadata, tensors = _split_tensor_dict({"b": torch.ones(2, 3).t(), "a": 1, "c": {"d": torch.ones(1)}})
    assert [key for key, _ in metadata] == ["b", "a", "c"]
    assert metadata[0][1] == ("cpu", torch.float32, torch.Size([3, 2])) and metadata[1] == ("a", 1)
    assert [t.shape for t in tensors] == [(3, 2), (1,)] and all(t.is_contiguous() for t in tensors)
