"""The one process-wide slot for groups. Layers never look here: groups are handed to them.

Names are those the ecosystem knows. The grid is in `topology`, what a group can do in `group`, how ranks meet in
`rendezvous`; this file keeps what was made and unmakes it.
"""

from __future__ import annotations

import contextlib
import gc
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import distributed_c10d as c10d

from lockstep.distributed import default_group, ledger, process_groups, rendezvous
from lockstep.distributed.exports import *  # noqa: F403
from lockstep.distributed.group import GraphCaptureContext, GroupCoordinator
from lockstep.distributed.nodes import _node_count
from lockstep.distributed.topology import Topology
from lockstep.utils import env

_AXES = ("tp", "dcp", "pcp", "pp", "dp", "ep", "eplb", "inner_dp_world")
_MISSING = {
    "world": "world group is not initialized",
    "tp": "tensor model parallel group is not initialized",
    "pp": "pipeline model parallel group is not initialized",
    "dp": "data parallel group is not initialized",
    "pcp": "prefill context parallel group is not initialized",
    "dcp": "decode context model parallel group is not initialized",
    "inner_dp_world": "inner dp world group is not initialized",
    "ep": "expert parallel group is not initialized. It is made by initialize_model_parallel, unless it is told "
    "enable_expert_parallel=False, as for models without experts.",
    "eplb": "EPLB group is not initialized. It is made by initialize_model_parallel(enable_eplb=True).",
}


@dataclass
class _State:
    """All that this process holds. `default_is_ours`: whether we made torch's default group, and so unmake it."""

    groups: dict[str, GroupCoordinator] = field(default_factory=dict)
    topology: Topology | None = None
    node_count: int | None = None
    seat: rendezvous.Rendezvous | None = None
    default_is_ours: bool = False
    bound_variables: list[str] = field(default_factory=list)
    patched: bool = False
    custom_all_reduce: bool = True


_STATE = _State()


def _group(name: str) -> GroupCoordinator:
    assert name in _STATE.groups, _MISSING[name]
    return _STATE.groups[name]


def find_group(name: str) -> GroupCoordinator | None:
    """The group of that name, None where it was not made."""
    return _STATE.groups.get(name)


def get_world_group() -> GroupCoordinator:
    """All ranks of the deployment."""
    return _group("world")


def get_tp_group() -> GroupCoordinator:
    """Ranks that share each layer's matrices."""
    return _group("tp")


def get_pp_group() -> GroupCoordinator:
    """Ranks that hold the stages of one copy of the model."""
    return _group("pp")


def get_dp_group() -> GroupCoordinator:
    """The ranks at the same place of every replica."""
    return _group("dp")


def get_ep_group() -> GroupCoordinator:
    """Ranks over which experts are spread: DP x PCP x TP of one pipeline stage."""
    return _group("ep")


def get_eplb_group() -> GroupCoordinator:
    """The ranks of the EP group again, for moving experts beside its traffic."""
    return _group("eplb")


def get_dcp_group() -> GroupCoordinator:
    """Ranks that share one request's KV cache in decode."""
    return _group("dcp")


def get_context_model_parallel_group() -> GroupCoordinator:
    """The older name of `get_dcp_group`."""
    return get_dcp_group()


def get_pcp_group() -> GroupCoordinator:
    """Ranks that share one prompt in prefill."""
    return _group("pcp")


def get_inner_dp_world_group() -> GroupCoordinator:
    """All ranks of one replica: PP x PCP x TP."""
    return _group("inner_dp_world")


def get_topology() -> Topology:
    """The grid that `initialize_model_parallel` laid out."""
    assert _STATE.topology is not None, "model parallel groups are not initialized"
    return _STATE.topology


def init_distributed_environment(
    world_size: int = -1,
    rank: int = -1,
    distributed_init_method: str = "env://",
    local_rank: int = -1,
    backend: str | None = None,
    timeout: timedelta | float | None = None,
) -> None:
    """Meet the other ranks; make the default torch group and the world group.

    world_size, rank: -1 takes them from torchrun's environment, or from a default group that exists. local_rank: -1 takes
    it from the environment, else `rank`. backend: "gloo", "nccl", None for what the machine has. timeout: seconds.
    A default group made by somebody else is checked and used. Raises ValueError when the settings cannot be,
    rendezvous.RendezvousError when ranks are late. A second call checks that the sizes agree.
    """
    limit_s = default_group.seconds(timeout)
    if "world" in _STATE.groups:
        assert world_size in (-1, dist.get_world_size()) and get_world_group().world_size == dist.get_world_size(), (
            "world group already initialized with a different world size"
        )
        return
    backend = default_group.choose_backend(backend)
    if dist.is_initialized():
        rank, world_size = default_group.validate(rank, world_size, backend)
        _finish_init(default_group.local_rank(local_rank, rank), backend, limit_s)
        return
    rank, world_size, local_rank = default_group.place(rank, world_size, local_rank, distributed_init_method)
    store, host = rendezvous.open_store(distributed_init_method, rank, world_size, limit_s or 300.0)
    init_from_store(store, rank, world_size, local_rank, host, backend, limit_s or 300.0, distributed_init_method)


def init_from_store(
    store: Any, rank: int, world_size: int, local_rank: int, host: str, backend: str | None, timeout_s: float, where: str
) -> None:
    """The rest of `init_distributed_environment`, once this rank is connected to the `store` that all ranks share."""
    backend = default_group.choose_backend(backend)
    seat = rendezvous.Rendezvous(store, rank, world_size, timeout_s, where)
    seat.meet("connected")
    device = rendezvous.device_for(backend, local_rank)
    _STATE.bound_variables = env.bind_collectives(rendezvous.choose_interface(host))
    default_group.create(store, rank, world_size, backend, device, timeout_s)
    _STATE.seat, _STATE.default_is_ours = seat, True
    try:
        _finish_init(local_rank, backend, timeout_s)
        seat.meet("world group ready")
    except BaseException:
        destroy_distributed_environment()
        raise


def _finish_init(local_rank: int, backend: str, timeout_s: float | None) -> None:
    ranks = list(range(dist.get_world_size()))
    _STATE.groups["world"] = init_world_group(ranks, local_rank, backend, timeout_s)
    _STATE.node_count = _node_count(_STATE.groups["world"].cpu_group) if len(ranks) > 1 else 1


def init_world_group(ranks: Sequence[int], local_rank: int, backend: str, timeout_s: float | None = None) -> GroupCoordinator:
    """One group of all `ranks`, named "world"."""
    limit = None if timeout_s is None else timedelta(seconds=timeout_s)
    return GroupCoordinator([list(ranks)], local_rank, backend, False, group_name="world", timeout=limit)


def init_model_parallel_group(
    group_ranks: Sequence[Sequence[int]],
    local_rank: int,
    backend: str,
    use_message_queue_broadcaster: bool = False,
    group_name: str | None = None,
    use_device_communicator: bool = True,
) -> GroupCoordinator:
    """A group for tensors of the model. Collective over the world."""
    timeout = _STATE.groups["world"].timeout if "world" in _STATE.groups else None
    return GroupCoordinator(
        group_ranks, local_rank, backend, use_device_communicator, use_message_queue_broadcaster, group_name, timeout=timeout
    )


def initialize_model_parallel(
    tensor_model_parallel_size: int = 1,
    pipeline_model_parallel_size: int = 1,
    prefill_context_model_parallel_size: int = 1,
    decode_context_model_parallel_size: int = 1,
    backend: str | None = None,
    *,
    data_parallel_size: int = 1,
    enable_expert_parallel: bool = True,
    enable_eplb: bool = False,
) -> None:
    """Lay the world out on the grid and make every axis's group. Collective over the world.

    enable_expert_parallel: False skips the EP group, for models without experts. Raises ValueError, naming the rule, when
    the sizes do not fit the world.
    """
    world = get_world_group()
    assert not model_parallel_is_initialized(), "model parallel groups are already initialized; destroy_model_parallel() first"
    topology = Topology(
        world.world_size,
        tp=tensor_model_parallel_size,
        pp=pipeline_model_parallel_size,
        pcp=prefill_context_model_parallel_size,
        dcp=decode_context_model_parallel_size,
        dp=data_parallel_size,
    )
    skipped = {name for name, wanted in (("ep", enable_expert_parallel), ("eplb", enable_eplb)) if not wanted}
    if _STATE.seat is not None:
        _STATE.seat.note("making groups")
    for name in _AXES:
        if name not in skipped:
            _STATE.groups[name] = init_model_parallel_group(
                topology.groups(name), world.local_rank, backend or world.backend, group_name=name
            )
    _STATE.topology = topology
    if _STATE.seat is not None:
        _STATE.seat.note("groups ready")


def ensure_model_parallel_initialized(
    tensor_model_parallel_size: int,
    pipeline_model_parallel_size: int,
    prefill_context_model_parallel_size: int = 1,
    decode_context_model_parallel_size: int = 1,
    backend: str | None = None,
    *,
    data_parallel_size: int = 1,
) -> None:
    """Initialise, or check that what exists has these sizes (AssertionError where not)."""
    if not model_parallel_is_initialized():
        initialize_model_parallel(
            tensor_model_parallel_size,
            pipeline_model_parallel_size,
            prefill_context_model_parallel_size,
            decode_context_model_parallel_size,
            backend,
            data_parallel_size=data_parallel_size,
        )
        return
    wanted = {
        "tp": ("tensor parallel", tensor_model_parallel_size),
        "pp": ("pipeline parallel", pipeline_model_parallel_size),
        "pcp": ("prefill context parallel", prefill_context_model_parallel_size),
        "dcp": ("decode context parallel", decode_context_model_parallel_size),
        "dp": ("data parallel", data_parallel_size),
    }
    for name, (words, size) in wanted.items():
        found = _group(name).world_size
        assert found == size, f"{words} group already initialized, but of unexpected size. got: {found} vs. wanted: {size}"


def model_parallel_is_initialized() -> bool:
    """Whether the TP and PP groups exist."""
    return "tp" in _STATE.groups and "pp" in _STATE.groups


@contextmanager
def patch_tensor_parallel_group(tp_group: GroupCoordinator) -> Iterator[None]:
    """Let `get_tp_group` answer `tp_group` inside the body, as for a draft model with its own split. Not reentrant."""
    assert not _STATE.patched, "Should not call when it's already patched"
    before, _STATE.patched = get_tp_group(), True
    _STATE.groups["tp"] = tp_group
    try:
        yield
    finally:
        _STATE.groups["tp"], _STATE.patched = before, False


@contextmanager
def graph_capture(device: torch.device | None = None) -> Iterator[GraphCaptureContext]:
    """Enter capture on the TP and PP groups with one side stream (none on a device without streams)."""
    where = device or get_tp_group().device
    context = GraphCaptureContext(torch.cuda.Stream(where) if where.type == "cuda" else None)
    with get_tp_group().graph_capture(context), get_pp_group().graph_capture(context):
        yield context


def prepare_communication_buffer_for_model(model: torch.nn.Module) -> None:
    """Let the model's modules allocate their communication buffers over each group."""
    for name in ("tp", "pcp", "pp", "dp", "ep", "eplb"):
        if name in _STATE.groups:
            _STATE.groups[name].prepare_communication_buffer_for_model(model)


def set_custom_all_reduce(enable: bool) -> None:
    """Whether groups made from now on may use an all-reduce other than the library's."""
    _STATE.custom_all_reduce = enable


def custom_all_reduce_enabled() -> bool:
    """What `set_custom_all_reduce` was told last; True at first."""
    return _STATE.custom_all_reduce


def get_tensor_model_parallel_world_size() -> int:
    return get_tp_group().world_size


def get_tensor_model_parallel_rank() -> int:
    return get_tp_group().rank_in_group


def get_decode_context_model_parallel_world_size() -> int:
    return get_dcp_group().world_size


def get_decode_context_model_parallel_rank() -> int:
    return get_dcp_group().rank_in_group


def shared_store(name: str) -> Any:
    """A key-value store of all ranks, keys under `name`, in torch's default group's store."""
    return dist.PrefixStore(f"lockstep/{name}", c10d._get_default_store())


def get_node_count() -> int:
    """How many hosts the world spans."""
    assert _STATE.node_count is not None, "distributed environment is not initialized"
    return _STATE.node_count


def is_global_first_rank() -> bool:
    """Whether this is rank 0 of the world; True before anything is initialised."""
    if "world" in _STATE.groups:
        return _STATE.groups["world"].is_first_rank
    return dist.get_rank() == 0 if dist.is_initialized() else True


def is_local_first_rank() -> bool:
    """Whether this is the first rank of its host; True before anything is initialised."""
    if "world" in _STATE.groups:
        return _STATE.groups["world"].local_rank == 0
    placed = env.torchrun_rank()
    return placed is None or placed[1] == 0


def get_worker_rank_suffix(global_rank: int | None = None) -> str:
    """ "dp0_pp0_pcp0_tp0_dcp0_ep0_rank0": names a rank's files and log lines. `global_rank` None: this rank."""
    rank = get_world_group().rank if global_rank is None else global_rank
    at = get_topology().coordinates(rank)
    return f"dp{at.dp}_pp{at.pp}_pcp{at.pcp}_tp{at.tp}_dcp{at.dcp}_ep{at.ep}_rank{rank}"


def destroy_model_parallel() -> None:
    """Release every group that `initialize_model_parallel` made. May be called twice."""
    for name in _AXES:
        group = _STATE.groups.pop(name, None)
        if group is not None:
            group.destroy()
    _STATE.topology = None


def destroy_distributed_environment() -> None:
    """Release the world group and the default group (only if lockstep made it). May be called twice; init works again after."""
    ledger.disable()
    world = _STATE.groups.pop("world", None)
    if world is not None:
        world.destroy()
    if _STATE.default_is_ours and dist.is_initialized():
        dist.destroy_process_group()
    process_groups.forget_devices()
    env.unbind_collectives(_STATE.bound_variables)
    _STATE.node_count, _STATE.seat, _STATE.default_is_ours, _STATE.bound_variables = None, None, False, []


def cleanup_dist_env_and_memory(shutdown_ray: bool = False) -> None:
    """Everything above, then give memory back. `shutdown_ray`: also disconnect from Ray."""
    destroy_model_parallel()
    destroy_distributed_environment()
    if shutdown_ray:
        with contextlib.suppress(ImportError):
            import ray

            ray.shutdown()
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()
        getattr(torch._C, "_host_emptyCache", lambda: None)()
