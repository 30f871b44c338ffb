"""A group of ranks and everything they can say to each other.

Layers get groups as constructor arguments; they never look one up. Every collective goes through `_enter`, so that the
ledger can compare ranks and progress cells can count. World size 1 is free: tensors come back as they are.
"""

from __future__ import annotations

import weakref
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import timedelta
from itertools import count
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from lockstep.distributed import custom_ops, ledger, observer, process_groups
from lockstep.distributed.communicators import make_communicator
from lockstep.distributed.communicators.base import Communicator
from lockstep.distributed.communicators.gloo import GlooCommunicator
from lockstep.distributed.communicators.loopback import LoopbackCommunicator
from lockstep.distributed.group_objects import ObjectTransfer
from lockstep.distributed.group_sharing import DeviceSharing
from lockstep.distributed.group_tensors import TensorTransfer
from lockstep.distributed.reduction_tree import ReductionTree

DEFAULT_TIMEOUT_S = 300.0

_numbers: dict[str, Iterator[int]] = {}


@dataclass
class GraphCaptureContext:
    """The side stream on which CUDA graphs are captured; None on devices without streams."""

    stream: Any


def _get_unique_name(name: str) -> str:
    """ "tp" -> "tp:0", "tp:1", ... in this process."""
    return f"{name}:{next(_numbers.setdefault(name, count()))}"


def default_device(backend: str, local_rank: int) -> torch.device:
    """The device that `backend` serves for this rank."""
    return torch.device("cuda", local_rank) if "nccl" in backend else torch.device("cpu")


class GroupCoordinator(ObjectTransfer, TensorTransfer, DeviceSharing):
    """One rank's view of its group.

    rank: global. ranks: the group's members, global, ascending. world_size: of the group. rank_in_group: 0-based.
    cpu_group, device_group: torch ProcessGroups (None in a solo group). device: where this rank's tensors live.
    """

    def __init__(
        self,
        group_ranks: Sequence[Sequence[int]],
        local_rank: int,
        torch_distributed_backend: str,
        use_device_communicator: bool = True,
        use_message_queue_broadcaster: bool = False,
        group_name: str | None = None,
        *,
        rank: int | None = None,
        device: torch.device | None = None,
        timeout: timedelta | None = None,
    ) -> None:
        """Collective: every rank of the world calls with the same `group_ranks`, in the same order.

        Raises ValueError when a list is not ascending or this rank is in none.
        """
        self.name = group_name or "anonymous"
        self.rank = dist.get_rank() if rank is None else rank
        self.local_rank = local_rank
        self.backend = torch_distributed_backend
        self.device = device or default_device(torch_distributed_backend, local_rank)
        self.timeout = timeout
        self._group_ranks = [list(ranks) for ranks in group_ranks]
        for ranks in self._group_ranks:
            if sorted(set(ranks)) != ranks:
                raise ValueError(f"group {self.name}: ranks {ranks} must be ascending and different.")
        mine = [ranks for ranks in self._group_ranks if self.rank in ranks]
        if len(mine) != 1:
            raise ValueError(f"group {self.name}: rank {self.rank} is in {len(mine)} of the lists {self._group_ranks}; it must be in one.")
        self.ranks = mine[0]
        self.world_size = len(self.ranks)
        self.rank_in_group = self.ranks.index(self.rank)
        self.unique_name = _get_unique_name(self.name)
        self.mq_broadcaster: Any = None
        self.use_custom_op_call = True
        self.use_cpu_custom_send_recv = False
        self._device_group, self._cpu_group = self._make_torch_groups()
        self.cpu_communicator: Communicator = LoopbackCommunicator()
        self.communicator: Communicator = LoopbackCommunicator(self.device)
        if self.world_size > 1:
            timeout_s = timeout.total_seconds() if timeout is not None else DEFAULT_TIMEOUT_S
            self.communicator = make_communicator(self._device_group, self.backend, self.device, timeout_s)
            on_host = self.device.type == "cpu"
            self.cpu_communicator = self.communicator if on_host else GlooCommunicator(self._cpu_group, torch.device("cpu"))
        self.use_device_communicator = use_device_communicator and self.world_size > 1
        custom_ops.register(self.unique_name, weakref.ref(self))
        if use_message_queue_broadcaster and self.world_size > 1:
            self.mq_broadcaster = self.create_mq_broadcaster()

    def _make_torch_groups(self) -> tuple[Any, Any]:
        # Groups of one need no torch group; one is made on demand by the properties below.
        lists = [ranks for ranks in self._group_ranks if len(ranks) > 1]
        if not lists or not dist.is_initialized():
            return None, None
        device_group = process_groups.make_subgroup(lists, self.rank, self.backend, self.timeout, self.unique_name)
        cpu_group = process_groups.make_subgroup(lists, self.rank, "gloo", self.timeout, f"{self.unique_name}.cpu")
        return device_group, cpu_group

    @property
    def cpu_group(self) -> Any:
        """The gloo torch group of these ranks; None when torch.distributed is not initialised."""
        if self._cpu_group is None and dist.is_initialized():
            self._cpu_group = process_groups.make_lonely_group(self.rank, "gloo")
        return self._cpu_group

    @property
    def device_group(self) -> Any:
        """The torch group of these ranks for device tensors; None when torch.distributed is not initialised."""
        if self._device_group is None and dist.is_initialized():
            self._device_group = process_groups.make_lonely_group(self.rank, self.backend)
        return self._device_group

    @property
    def device_communicator(self) -> Communicator | None:
        """What moves device tensors; None in a group of one, or when the group was made without."""
        return self.communicator if self.use_device_communicator else None

    @property
    def first_rank(self) -> int:
        return self.ranks[0]

    @property
    def last_rank(self) -> int:
        return self.ranks[-1]

    @property
    def is_first_rank(self) -> bool:
        return self.rank == self.first_rank

    @property
    def is_last_rank(self) -> bool:
        return self.rank == self.last_rank

    @property
    def next_rank(self) -> int:
        """Global rank of the next member, wrapping."""
        return self.ranks[(self.rank_in_group + 1) % self.world_size]

    @property
    def prev_rank(self) -> int:
        """Global rank of the previous member, wrapping."""
        return self.ranks[(self.rank_in_group - 1) % self.world_size]

    def announce(self, op: str, *tensors: Tensor, detail: str = "") -> None:
        """Tell whoever watches that this rank begins `op`, which talks to the group by other means than these methods."""
        if self.world_size > 1:
            self._enter(op, *tensors, detail=detail)

    def _enter(self, op: str, *tensors: Tensor, detail: str = "") -> None:
        """Tell whoever watches that this rank enters `op`. Raises CollectiveMismatchError when the ledger is on and ranks diverge."""
        if observer.observers:
            observer.entered(f"{self.unique_name}.{op}")
        if ledger.active:
            ledger.active[0].enter(self.unique_name, self.ranks, self.rank, op, tensors, detail)

    def _note(self, op: str, *tensors: Tensor, detail: str = "") -> None:
        """As `_enter` for what only two ranks take part in: recorded, not compared."""
        if observer.observers:
            observer.entered(f"{self.unique_name}.{op}")
        if ledger.active:
            ledger.active[0].note(self.unique_name, self.rank, op, tensors, detail)

    def _dim(self, x: Tensor, dim: int) -> int:
        assert -x.dim() <= dim < x.dim(), f"Invalid dim ({dim}) for input tensor with shape {x.size()}"
        return dim % x.dim()

    def _peer(self, rank_in_group: int, word: str) -> int:
        assert 0 <= rank_in_group < self.world_size, (
            f"Invalid {word} rank ({rank_in_group}): group {self.unique_name} has {self.world_size}"
        )
        return rank_in_group

    def _sizes(self, sizes: Sequence[int], word: str) -> list[int]:
        if len(sizes) != self.world_size or any(size < 0 for size in sizes):
            raise ValueError(f"{word} {list(sizes)} must be {self.world_size} sizes of at least 0, one per rank of {self.unique_name}.")
        return list(sizes)

    def all_reduce(self, x: Tensor) -> Tensor:
        """The sum over ranks as a new tensor; `x` is left alone. World size 1: `x` itself."""
        if self.world_size == 1:
            return x
        if torch.compiler.is_compiling():
            return torch.ops.lockstep.all_reduce(x, self.unique_name)
        return self._all_reduce(x)

    def _all_reduce(self, x: Tensor) -> Tensor:
        out = x.clone(memory_format=torch.contiguous_format)
        self._enter("all_reduce", x)
        self.communicator.all_reduce_(out)
        return out

    def all_reduce_(self, x: Tensor) -> Tensor:
        """The sum over ranks, into `x`; returns `x`. What layers call: no copy."""
        if self.world_size == 1:
            return x
        if torch.compiler.is_compiling():
            torch.ops.lockstep.all_reduce_(x, self.unique_name)
            return x
        if observer.observers or ledger.active:
            self._enter("all_reduce", x)
        self.communicator.all_reduce_(x)
        return x

    def combine_partials(self, partials: Tensor, tree: ReductionTree) -> Tensor:
        """The ranks' partial sums [tree.counts[rank], rows, n] float32, added in the order of `tree`: [rows, n] float32.

        The bits do not depend on how many ranks the sum was dealt out to.
        """
        self._enter("combine_partials", partials[:0], detail=f"counts={tree.counts}")
        return self.communicator.combine(partials, tree)

    def all_gather(self, x: Tensor, dim: int = -1) -> Tensor:
        """Every rank's `x` joined along `dim`, in group order. World size 1: `x` itself."""
        if self.world_size == 1:
            return x
        dim = self._dim(x, dim)
        if torch.compiler.is_compiling():
            return torch.ops.lockstep.all_gather(x, dim, self.world_size, self.unique_name)
        return self._all_gather(x, dim)

    def _all_gather(self, x: Tensor, dim: int) -> Tensor:
        self._enter("all_gather", x, detail=f"dim={dim}")
        return self.communicator.all_gather(x, dim)

    def largest(self, values: Tensor, ids: Tensor) -> Tensor:
        """Of each row the id that comes with the largest value over ranks, `[rows]`; see `Communicator.largest`. World size 1: `ids`."""
        if self.world_size == 1:
            return ids
        self._enter("largest", values, ids)
        return self.communicator.largest(values, ids)

    def all_gatherv(self, x: Tensor | list[Tensor], dim: int = 0, sizes: Sequence[int] | None = None) -> Any:
        """As all_gather where rank r brings `sizes[r]` along `dim` (None: all alike). A list gives a list."""
        if self.world_size == 1:
            return x
        tensors = list(x) if isinstance(x, (list, tuple)) else [x]
        outputs = [self._all_gatherv(tensor, dim, sizes) for tensor in tensors]
        return outputs if isinstance(x, (list, tuple)) else outputs[0]

    def _all_gatherv(self, x: Tensor, dim: int, sizes: Sequence[int] | None) -> Tensor:
        dim = self._dim(x, dim)
        if sizes is None:
            return self._all_gather(x, dim)
        sizes = self._sizes(sizes, "sizes")
        if x.size(dim) != sizes[self.rank_in_group]:
            raise ValueError(
                f"rank {self.rank_in_group} brings {x.size(dim)} along dim {dim}, but sizes {sizes} say {sizes[self.rank_in_group]}."
            )
        self._enter("all_gatherv", x.narrow(dim, 0, 0), detail=f"dim={dim} sizes={sizes}")
        return self.communicator.all_gatherv(x, sizes, dim)

    def reduce_scatter(self, x: Tensor, dim: int = -1) -> Tensor:
        """This rank's slice along `dim` of the sum over ranks. World size 1: `x` itself."""
        if self.world_size == 1:
            return x
        dim = self._dim(x, dim)
        assert x.size(dim) % self.world_size == 0, (
            f"dim {dim} of {x.size()} does not divide by {self.world_size} ranks; use reduce_scatterv"
        )
        if torch.compiler.is_compiling():
            return torch.ops.lockstep.reduce_scatter(x, dim, self.world_size, self.unique_name)
        return self._reduce_scatter(x, dim)

    def _reduce_scatter(self, x: Tensor, dim: int) -> Tensor:
        self._enter("reduce_scatter", x, detail=f"dim={dim}")
        return self.communicator.reduce_scatter(x, dim)

    def reduce_scatterv(self, x: Tensor, dim: int = -1, sizes: Sequence[int] | None = None) -> Tensor:
        """As reduce_scatter where rank r gets `sizes[r]` along `dim` (None: equal slices)."""
        if self.world_size == 1:
            return x
        if sizes is None:
            return self.reduce_scatter(x, dim)
        dim, sizes = self._dim(x, dim), self._sizes(sizes, "sizes")
        if sum(sizes) != x.size(dim):
            raise ValueError(f"sizes {sizes} sum to {sum(sizes)}, but dim {dim} of the tensor is {x.size(dim)}.")
        self._enter("reduce_scatterv", x, detail=f"dim={dim} sizes={sizes}")
        return self.communicator.reduce_scatterv(x, sizes, dim)

    def gather(self, x: Tensor, dst: int = 0, dim: int = -1) -> Tensor | None:
        """Every rank's `x` joined along `dim` on group rank `dst`, None elsewhere. World size 1: `x` itself."""
        if self.world_size == 1:
            return x
        dim, dst = self._dim(x, dim), self._peer(dst, "dst")
        self._enter("gather", x, detail=f"dim={dim} dst={dst}")
        return self.communicator.gather(x, dst, dim)

    def broadcast(self, x: Tensor, src: int = 0) -> Tensor:
        """Group rank `src`'s values, into `x`; returns `x`."""
        self._peer(src, "src")
        if self.world_size == 1:
            return x
        self._enter("broadcast", x, detail=f"src={src}")
        self.communicator.broadcast_(x, src)
        return x

    def all_to_all(self, x: Tensor, send_sizes: Sequence[int] | None = None, recv_sizes: Sequence[int] | None = None) -> Tensor:
        """Rows of dim 0 to and from every rank: equal slices, or `send_sizes[r]` rows to rank r and `recv_sizes[r]` from it."""
        if self.world_size == 1:
            return x
        if send_sizes is None and recv_sizes is None:
            assert x.dim() > 0 and x.size(0) % self.world_size == 0, f"dim 0 of {x.size()} does not divide by {self.world_size} ranks"
            self._enter("all_to_all", x)
            return self.communicator.all_to_all(x)
        if send_sizes is None or recv_sizes is None:
            raise ValueError("all_to_all needs both send_sizes and recv_sizes, or neither.")
        send_sizes, recv_sizes = self._sizes(send_sizes, "send_sizes"), self._sizes(recv_sizes, "recv_sizes")
        if sum(send_sizes) != x.size(0):
            raise ValueError(f"send_sizes {send_sizes} sum to {sum(send_sizes)}, but the tensor has {x.size(0)} rows.")
        self._enter("all_to_allv", x[:0])
        return self.communicator.all_to_allv(x, send_sizes, recv_sizes)

    def barrier(self) -> None:
        """Return when every rank has called it. On the CPU group: it never waits for the device."""
        if self.world_size > 1:
            self._enter("barrier")
            self.cpu_communicator.barrier()

    @contextmanager
    def graph_capture(self, context: GraphCaptureContext | None = None) -> Iterator[GraphCaptureContext]:
        """Run the body on a side stream, so that its collectives can be captured in a CUDA graph."""
        if self.device.type != "cuda":
            yield context or GraphCaptureContext(None)
            return
        context = context or GraphCaptureContext(torch.cuda.Stream(self.device))
        current = torch.cuda.current_stream(self.device)
        if context.stream != current:
            context.stream.wait_stream(current)
        with torch.cuda.stream(context.stream):
            yield context

    def destroy(self) -> None:
        """Release the torch groups and everything made for this group. May be called twice; the group is unusable after."""
        custom_ops.forget(self.unique_name)
        if self.mq_broadcaster is not None:
            self.mq_broadcaster.close()
            self.mq_broadcaster = None
        self._close_siblings()
        self.communicator.close()
        self.cpu_communicator.close()
        self.use_device_communicator = False
        groups, self._device_group, self._cpu_group = (self._device_group, self._cpu_group), None, None
        for group in groups:
            if group is not None and dist.is_initialized():
                dist.destroy_process_group(group)


def solo_group(name: str = "tp", device: torch.device | str | None = None, rank: int = 0) -> GroupCoordinator:
    """A group of one, without torch.distributed: every collective is free. Several may live in one process."""
    return GroupCoordinator([[rank]], 0, "gloo", False, group_name=name, rank=rank, device=torch.device(device or "cpu"))
