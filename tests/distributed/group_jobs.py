"""Functions that the group tests run on ranks. Each returns what the test compares, or asserts here."""

from __future__ import annotations

import threading
import time
from typing import Any

import torch
import torch.distributed as dist

from lockstep.distributed import observer
from lockstep.distributed import parallel_state as ps
from lockstep.distributed.codec import TensorMetadata
from lockstep.distributed.group import GroupCoordinator
from lockstep.distributed.reduction_tree import ReductionTree


def tp_group(world_size: int) -> GroupCoordinator:
    ps.initialize_model_parallel(tensor_model_parallel_size=world_size)
    return ps.get_tp_group()


def ones(rank: int, *shape: int) -> torch.Tensor:
    return torch.full(shape, float(rank + 1))


def refused(kind: type[BaseException], text: str, call: Any) -> None:
    try:
        call()
    except kind as error:
        assert text in str(error), f"{text!r} not in {error}"
        return
    raise AssertionError(f"{kind.__name__} {text!r} was not raised")


def reductions(rank: int, world_size: int) -> None:
    tp = tp_group(world_size)
    total = world_size * (world_size + 1) / 2
    x = ones(rank, 2, 3)
    y = tp.all_reduce(x)
    assert y is not x and (y == total).all() and (x == rank + 1).all()
    strided = ones(rank, 2, 3).t()
    assert tp.all_reduce(strided).is_contiguous()
    z = tp.all_reduce_(x)
    assert z is x and (x == total).all()
    # G1: the default dim of a 3-D tensor is its last.
    w = torch.arange(2 * 4 * 3 * world_size, dtype=torch.float32).view(2, 4, 3 * world_size)
    scattered = tp.reduce_scatter(w)
    assert scattered.shape == (2, 4, 3)
    assert torch.equal(scattered, (w * world_size)[..., 3 * rank : 3 * rank + 3])
    assert torch.equal(tp.reduce_scatter(w.movedim(2, 1), 1), (w * world_size)[..., 3 * rank : 3 * rank + 3].movedim(2, 1))
    refused(AssertionError, "does not divide", lambda: tp.reduce_scatter(torch.ones(world_size + 1), 0))
    sizes = list(range(1, world_size + 1))
    v = torch.arange(float(sum(sizes) * 2)).view(2, -1)
    assert torch.equal(tp.reduce_scatterv(v, -1, sizes), (v * world_size).split(sizes, 1)[rank])
    assert torch.equal(tp.reduce_scatterv(w), scattered)
    refused(ValueError, "sum to", lambda: tp.reduce_scatterv(v, 1, [1] * world_size))
    order = ReductionTree.of(world_size, [(r, r + 1) for r in range(world_size)])
    assert (tp.combine_partials(ones(rank, 1, 2, 3), order) == torch.full((2, 3), total)).all()


def gathers(rank: int, world_size: int) -> None:
    tp = tp_group(world_size)
    x = ones(rank, 2, 3)
    everyone = [ones(r, 2, 3) for r in range(world_size)]
    assert torch.equal(tp.all_gather(x), torch.cat(everyone, -1))
    assert torch.equal(tp.all_gather(x, 0), torch.cat(everyone, 0))
    refused(AssertionError, "Invalid dim (3) for input tensor with shape torch.Size([2, 3])", lambda: tp.all_gather(x, 3))
    for dst in range(world_size):
        found = tp.gather(x, dst, 0)
        assert (found is None) == (rank != dst)
        assert found is None or torch.equal(found, torch.cat(everyone, 0))
    values = torch.tensor([float((rank + row) % world_size) for row in range(3)])  # the largest is another rank's in each row
    assert tp.largest(values, torch.full((3,), 10 + rank)).tolist() == [10 + (-1 - row) % world_size for row in range(3)]
    sizes = list(range(world_size))
    parts = [ones(r, r, 2) for r in range(world_size)]
    assert torch.equal(tp.all_gatherv(parts[rank], 0, sizes), torch.cat(parts))
    a, b = tp.all_gatherv([parts[rank], parts[rank] * 2], sizes=sizes)
    assert torch.equal(b, 2 * a) and torch.equal(a, torch.cat(parts))
    assert torch.equal(tp.all_gatherv(x, 1), torch.cat(everyone, 1))
    refused(ValueError, "must be", lambda: tp.all_gatherv(x, 0, [1] * (world_size + 1)))
    refused(ValueError, "brings 2 along dim 0", lambda: tp.all_gatherv(x, 0, [5] * world_size))


def broadcasts(rank: int, world_size: int) -> None:
    tp = tp_group(world_size)
    for src in range(world_size):
        x = ones(rank, 2)
        assert tp.broadcast(x, src) is x and (x == src + 1).all()
        assert tp.broadcast_object({"from": rank} if rank == src else None, src) == {"from": src}
        entries = [rank, ("tuple", rank)] if rank == src else [None, None]
        assert tp.broadcast_object_list(entries, src) is entries and entries == [src, ("tuple", src)]
    assert tp.all_gather_objects({"mine": rank}) == [{"mine": r} for r in range(world_size)]
    refused(AssertionError, f"Invalid src rank ({world_size})", lambda: tp.broadcast(ones(rank, 1), world_size))
    refused(AssertionError, f"Invalid src rank ({world_size})", lambda: tp.broadcast_object(1, world_size))


def object_list_group(rank: int, world_size: int) -> None:
    """G28: `group` is honoured, a coordinator or a torch group; src counts in it."""
    ps.initialize_model_parallel(2, 2)
    tp, pp = ps.get_tp_group(), ps.get_pp_group()
    for group in (pp, pp.cpu_group):
        entries = [rank]
        tp.broadcast_object_list(entries, 1, group=group)
        assert entries == [pp.ranks[1]]
    entries = [rank]
    tp.broadcast_object_list(entries, 1)
    assert entries == [tp.ranks[1]]


def exchange(rank: int, world_size: int) -> None:
    tp = tp_group(world_size)
    rows = torch.arange(float(world_size)).unsqueeze(1) + 10 * rank
    assert tp.all_to_all(rows).flatten().tolist() == [10.0 * r + rank for r in range(world_size)]
    # Rank a sends b + 1 rows to rank b.
    send = [b + 1 for b in range(world_size)]
    x = torch.cat([torch.full((b + 1, 2), 10.0 * rank + b) for b in range(world_size)])
    got = tp.all_to_all(x, send, [rank + 1] * world_size)
    assert torch.equal(got, torch.cat([torch.full((rank + 1, 2), 10.0 * a + rank) for a in range(world_size)]))
    refused(ValueError, "both send_sizes and recv_sizes", lambda: tp.all_to_all(x, send))
    refused(ValueError, "but the tensor has", lambda: tp.all_to_all(x, [1] * world_size, [1] * world_size))
    refused(AssertionError, "does not divide", lambda: tp.all_to_all(torch.ones(world_size + 1)))


def point_to_point(rank: int, world_size: int) -> None:
    """Every pair, and the ring of the defaults."""
    tp = tp_group(world_size)
    for src in range(world_size):
        for dst in range(world_size):
            if src == dst:
                continue
            if rank == src:
                tp.send(torch.full((3,), 100.0 * src + dst), dst)
                tp.send_object((src, dst), dst)
            elif rank == dst:
                assert tp.recv((3,), torch.float32, src).tolist() == [100.0 * src + dst] * 3
                assert tp.recv_object(src) == (src, dst)
    handle = tp.isend(ones(rank, 2))
    x = torch.empty(2)
    received = tp.irecv(x)
    received.wait()
    handle.wait()
    assert x.tolist() == [float((rank - 1) % world_size + 1)] * 2
    assert handle.is_completed() and received.is_completed()
    handles = tp.isend_object([rank], (rank + 1) % world_size)
    assert tp.recv_object((rank - 1) % world_size) == [(rank - 1) % world_size]
    for h in handles:
        h.wait()
    incoming = tp.irecv_object((rank - 1) % world_size)
    tp.send_object({"late": rank}, (rank + 1) % world_size)
    assert incoming.wait() == {"late": (rank - 1) % world_size}
    refused(AssertionError, "it is this rank itself", lambda: tp.send_object(1, rank))
    refused(AssertionError, f"Invalid src rank ({world_size})", lambda: tp.recv_object(world_size))
    refused(AssertionError, "contiguous", lambda: tp.irecv(torch.empty(2, 3).t()))


def handles_tell(rank: int, world_size: int) -> None:
    """is_completed is False while the peer has not sent, and turns True without a wait."""
    tp = tp_group(world_size)
    if rank == 0:
        tp.recv_object(1)  # rank 1 has posted its receive and looked
        tp.send(torch.ones(2), 1)
        return
    x = torch.zeros(2)
    handle = tp.irecv(x, 0)
    assert not handle.is_completed()
    tp.send_object("posted", 0)
    deadline = time.monotonic() + 20
    while not handle.is_completed():
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert x.tolist() == [1.0, 1.0]
    handle.wait()


class Opaque:
    """Cannot cross processes."""


def objects(rank: int, world_size: int) -> Any:
    """Types survive; what cannot be sent is refused before anything goes out, so the next exchange is in step."""
    tp = tp_group(world_size)
    samples = [
        None, True, -5, 2**80, 1.5, float("inf"), "ü", b"\x00\xff", [1, [2]], (1, (2, "x")), {"a": (1,)}, {1: "one", (2, 3): "pair"},
        {1, 2}, frozenset({"f"}), 1 + 2j, torch.bfloat16, torch.device("cpu"), torch.Size([2, 3]), [],
        TensorMetadata("cpu", torch.int8, torch.Size([4])), *(b"x" * n for n in (4070, 4080, 4088, 4089, 100_000)),
    ]  # fmt: skip
    for sample in samples:
        if rank == 0:
            tp.send_object(sample, 1)
        else:
            got = tp.recv_object(0)
            assert got == sample and type(got) is type(sample), (got, sample)
    tensor = torch.randn(3, 2, generator=torch.Generator().manual_seed(0)).bfloat16().t()
    for sample in (tensor, torch.empty(0, 2), torch.tensor(3), torch.tensor([True])):
        if rank == 0:
            tp.send_object({"nested": [sample]}, 1)
        else:
            got = tp.recv_object(0)["nested"][0]
            assert torch.equal(got, sample) and got.dtype == sample.dtype and got.shape == sample.shape
    if rank == 0:
        refused(TypeError, "object['a'][1] is a tests.distributed.group_jobs.Opaque", lambda: tp.send_object({"a": [1, Opaque()]}, 1))
        refused(TypeError, "cannot cross processes", lambda: tp.isend_tensor_dict({"t": torch.ones(1), "x": Opaque()}, 1))
        tp.send_object("in step", 1)
    else:
        assert tp.recv_object(0) == "in step"


def sample_dict() -> dict[str, Any]:
    return {
        "hidden": torch.arange(12.0).view(3, 4),
        "turned": torch.arange(12.0).view(3, 4).t(),
        "bf16": torch.ones(5, dtype=torch.bfloat16),
        "flag": torch.tensor([True, False]),
        "scalar": torch.tensor(7),
        "empty": torch.empty(0, 4),
        "number": 3,
        "nothing": None,
        "text": "x",
        "pair": (1, 2),
        "inner": {"t": torch.full((2, 2), 9, dtype=torch.int64).t(), "deep": {"u": torch.ones(3)}, "v": "w"},
        "last": torch.full((2,), 5.0),
    }


def equal(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor):
        return a.dtype == b.dtype and torch.equal(a, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(equal(a[k], b[k]) for k in a)
    return type(a) is type(b) and a == b


def tensor_dicts(rank: int, world_size: int) -> None:
    tp = tp_group(world_size)
    for src in range(world_size):
        given = sample_dict() if rank == src else None
        got = tp.broadcast_tensor_dict(given, src)
        assert equal(got, sample_dict())
        assert rank != src or got is given
    if rank == 0:
        refused(AssertionError, "Expecting a dictionary, got <class 'list'>", lambda: tp.send_tensor_dict([1]))
    # Ring of the defaults, then explicit and asynchronous.
    handles = tp.isend_tensor_dict(sample_dict())
    assert equal(tp.recv_tensor_dict(), sample_dict())
    for handle in handles:
        handle.wait()
    if rank == 0:
        assert tp.send_tensor_dict(sample_dict(), world_size - 1) is None
    elif rank == world_size - 1:
        got, handles, post = tp.irecv_tensor_dict(0)
        for handle in handles:
            handle.wait()
        for step in post:
            step()
        assert equal(got, sample_dict())


def retained(rank: int, world_size: int) -> None:
    """G20: handles keep the tensors alive; metadata does not block the sender either."""
    tp = tp_group(world_size)
    if rank == 0:
        started = time.monotonic()
        handles = tp.isend_tensor_dict({"x": torch.full((200_000,), 3.0).view(2, -1).t()}, 1)
        took = time.monotonic() - started
        for seed in range(20):
            torch.full((200_000,), float(seed))  # would land in the freed memory
        tp.recv_object(1)
        for handle in handles:
            handle.wait()
        assert took < 0.5, took
    else:
        time.sleep(0.7)
        tp.send_object("go", 0)
        got = tp.recv_tensor_dict(0)
        assert got is not None and (got["x"] == 3.0).all()


def sliced(rank: int, world_size: int) -> int:
    """TP 2 x PP 2: a stage sends slices, the next gathers the whole; what differs between TP ranks is sent whole."""
    ps.initialize_model_parallel(2, 2)
    tp, pp = ps.get_tp_group(), ps.get_pp_group()
    same = {"h": torch.arange(16.0).view(4, 4), "odd": torch.arange(3.0), "inner": {"k": torch.arange(4.0)}, "empty": torch.empty(0)}
    mine = {**same, "own": torch.full((2,), float(tp.rank_in_group)), "inner2": {"own": torch.full((2,), float(tp.rank_in_group))}}
    sent: list[int] = []
    if pp.is_first_rank:
        inner = pp.cpu_communicator.isend

        def count(x: torch.Tensor, dst: int) -> Any:
            sent.append(x.numel())
            return inner(x, dst)

        pp.cpu_communicator.isend = count  # type: ignore[method-assign]
        pp.send_tensor_dict(mine, all_gather_group=tp, all_gather_tensors={"own": False, "inner2.own": False})
        return sum(sent[1:])  # less the metadata's one message
    got = pp.recv_tensor_dict(all_gather_group=tp, all_gather_tensors={"own": False, "inner2.own": False})
    assert equal(got, mine), got
    return -1


def barriers(rank: int, world_size: int) -> None:
    tp = tp_group(world_size)
    store = ps.shared_store("test")
    for turn in range(5):
        time.sleep(0.01 * ((rank + turn) % world_size))
        store.add(str(turn), 1)
        tp.barrier()
        assert store.add(str(turn), 0) == world_size
    told: list[str] = []
    listener = lambda number, what: told.append(what)  # noqa: E731
    observer.add(listener)
    tp.announce("layers")
    tp.barrier()
    observer.remove(listener)
    assert told == [f"{tp.unique_name}.layers", f"{tp.unique_name}.barrier"]


def siblings(rank: int, world_size: int) -> None:
    """Traffic of a sibling group does not queue behind the group's own."""
    tp = tp_group(world_size)
    sibling = tp.make_sibling_device_group()
    assert sibling is not None and sibling is not tp.device_group and dist.get_process_group_ranks(sibling) == tp.ranks
    x = ones(rank, 2)
    if rank == 0:
        waiting = threading.Thread(target=tp.broadcast, args=(torch.zeros(1), 1))
        waiting.start()
        dist.all_reduce(x, group=sibling)
        assert waiting.is_alive()  # rank 1 broadcasts only after the sibling's sum
        tp.cpu_communicator.send(torch.zeros(1), 1)
        waiting.join()
    else:
        dist.all_reduce(x, group=sibling)
        if rank == 1:
            tp.cpu_communicator.recv_(torch.empty(1), 0)
        tp.broadcast(torch.zeros(1), 1)
    assert (x == world_size * (world_size + 1) / 2).all()


def experts(rank: int, world_size: int) -> None:
    ps.initialize_model_parallel(1, data_parallel_size=world_size)
    ep = ps.get_ep_group()
    sizes = [r + 1 for r in range(world_size)]
    hidden, weights, ids = ones(rank, rank + 1, 4), ones(rank, rank + 1, 2), torch.full((rank + 1, 2), rank)
    h, w, i = ep.dispatch(hidden, weights, ids, sizes)
    assert h.shape == (sum(sizes), 4) and w.shape == i.shape == (sum(sizes), 2)
    assert torch.equal(h, torch.cat([ones(r, r + 1, 4) for r in range(world_size)])) and i.dtype == torch.int64
    h2, logits = ep.dispatch_router_logits(hidden, weights, sizes)
    assert torch.equal(h2, h) and torch.equal(logits, w)
    back = ep.combine(h, sizes)
    assert torch.equal(back, hidden * world_size)


class Prepared(torch.nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.groups: list[str] = []

    def prepare_communication(self, group: GroupCoordinator) -> None:
        self.groups.append(group.name)


def prepared(rank: int, world_size: int) -> list[str]:
    ps.initialize_model_parallel(world_size)
    model = torch.nn.Sequential(torch.nn.Linear(1, 1), Prepared())
    ps.prepare_communication_buffer_for_model(model)
    return model[1].groups  # type: ignore[return-value]


def neighbours(rank: int, world_size: int) -> Any:
    ps.initialize_model_parallel(2, world_size // 2)
    pp = ps.get_pp_group()
    return pp.rank, pp.ranks, pp.first_rank, pp.last_rank, pp.next_rank, pp.prev_rank, pp.is_first_rank, pp.is_last_rank, pp.rank_in_group


def torch_groups(rank: int, world_size: int) -> None:
    """cpu_group and device_group are torch's own, also in groups of one."""
    ps.initialize_model_parallel(world_size)
    tp, pp = ps.get_tp_group(), ps.get_pp_group()
    for group in (tp.cpu_group, tp.device_group):
        assert dist.get_process_group_ranks(group) == tp.ranks
        x = torch.ones(1)
        dist.all_reduce(x, group=group)
        assert x.item() == world_size
    x = torch.ones(1)
    dist.all_reduce(x, group=pp.cpu_group)
    dist.all_reduce(x, group=pp.device_group)
    assert x.item() == 1 and pp.world_size == 1
    assert isinstance(tp.cpu_group, dist.ProcessGroup) and tp.cpu_group is not tp.device_group


def compiled(rank: int, world_size: int, backend: str) -> list[str]:
    """Collectives stay in one graph, and give what eager gives."""
    tp = tp_group(world_size)

    def f(x: torch.Tensor) -> torch.Tensor:
        y = tp.all_reduce(x * 2)
        z = tp.all_gather(y + rank, 1)
        w = tp.reduce_scatter(z, 1)
        return tp.all_reduce_(w + 1)

    names: list[str] = []

    def spy(module: torch.fx.GraphModule, inputs: Any) -> Any:
        names.extend(str(node.target) for node in module.graph.nodes if "lockstep" in str(node.target))
        return torch._dynamo.lookup_backend(backend)(module, inputs)

    x = ones(rank, 2, 3)
    expected = f(x)
    found = torch.compile(f, fullgraph=True, backend=spy)(x)
    assert torch.equal(found, expected)
    tp.destroy()
    refused(ValueError, "is destroyed", lambda: torch.ops.lockstep.all_reduce(x, tp.unique_name))
    return names


def prepared_checked(rank: int, world_size: int) -> None:
    assert prepared(rank, world_size) == ["tp", "ep"]


def properties(rank: int, world_size: int) -> None:
    tp = tp_group(world_size)
    last = world_size - 1
    assert (tp.first_rank, tp.last_rank, tp.is_first_rank, tp.is_last_rank) == (0, last, rank == 0, rank == last)
    assert (tp.next_rank, tp.prev_rank) == ((rank + 1) % world_size, (rank - 1) % world_size)
    assert tp.device_communicator is tp.communicator and ps.get_pp_group().device_communicator is None


def destroyed(rank: int, world_size: int) -> None:
    tp = tp_group(world_size)
    groups = len(dist.distributed_c10d._world.pg_map)
    sibling = tp.make_sibling_device_group()
    assert sibling is not None and len(dist.distributed_c10d._world.pg_map) == groups + 1
    tp.destroy()
    assert len(dist.distributed_c10d._world.pg_map) == groups - 2
    refused(ValueError, "is destroyed", lambda: torch.ops.lockstep.all_reduce(torch.ones(1), tp.unique_name))


def captured(rank: int, world_size: int) -> None:
    tp = tp_group(world_size)
    with tp.graph_capture() as context, tp.graph_capture(context) as same:
        assert same is context and tp.all_reduce(torch.ones(1)).item() == world_size


def queues(rank: int, world_size: int) -> None:
    """The broadcast queue carries `broadcast_object` from its writer; other sources go the ordinary way."""
    from lockstep.distributed.message_queue import MessageQueue, MessageReader

    ps.initialize_model_parallel(world_size)
    group = ps.init_model_parallel_group([list(range(world_size))], rank, "gloo", use_message_queue_broadcaster=True, group_name="plan")
    assert group.mq_broadcaster is not None and group.mq_broadcaster.writer_rank == 0
    assert isinstance(group.mq_broadcaster.end, MessageQueue if rank == 0 else MessageReader)
    sent: list[int] = []
    broadcast = group.cpu_communicator.broadcast_

    def count(x: torch.Tensor, src: int) -> None:
        sent.append(src)
        broadcast(x, src)

    group.cpu_communicator.broadcast_ = count  # type: ignore[method-assign]
    big = {"step": (1, 2), "payload": b"x" * (6 << 20)}
    for turn in range(20):
        assert group.broadcast_object((turn, "plan") if rank == 0 else None) == (turn, "plan")
    assert group.broadcast_object(big if rank == 0 else None) == big
    assert sent == []
    assert group.broadcast_object(rank, 1) == 1
    assert sent == [1]
    mq = group.mq_broadcaster
    late = group.create_mq_broadcaster(writer_rank=1)
    assert late is not None and late.broadcast_object([rank] if rank == 1 else None, 20) == [1]
    late.close()
    late.close()
    ends = group.create_single_reader_mq_broadcasters(1)
    if rank == 1:
        assert ends[1] is None
        assert [end.dequeue(20) for end in ends if end is not None] == [b"from %d" % r for r in range(world_size) if r != 1]
    else:
        ends[rank].enqueue(b"from %d" % rank, 20)
        assert [end is not None for end in ends] == [r == rank for r in range(world_size)]
    if rank == 0:
        queue = MessageQueue.create(1)
        outside = group.create_mq_broadcaster(external_writer_handle=queue.handle(0).duplicate())
        from lockstep.distributed import codec

        queue.enqueue(codec.encode({"from": "outside"}))
        assert outside is not None and outside.broadcast_object(timeout=20) == {"from": "outside"}
        outside.close()
        queue.close()
    group.barrier()
    for end in ends:
        if end is not None:
            end.close()
    group.destroy()
    assert group.mq_broadcaster is None and mq is not None
