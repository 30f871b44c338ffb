"""The part of GroupCoordinator that expert layers and executors use: token dispatch, sibling groups, plan broadcast."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lockstep.distributed import broadcaster, nodes, process_groups
from lockstep.distributed.broadcaster import GroupBroadcaster
from lockstep.distributed.message_queue import MessageQueue, QueueHandle

if TYPE_CHECKING:
    from collections.abc import Sequence
    from datetime import timedelta

    from lockstep.distributed.communicators.base import Communicator


class DeviceSharing:
    """Dispatch gathers every rank's tokens to all (all_gatherv); combine sums and scatters them back (reduce_scatterv)."""

    world_size: int
    rank_in_group: int
    rank: int
    ranks: list[int]
    unique_name: str
    backend: str
    device: torch.device
    timeout: timedelta | None
    cpu_group: Any
    mq_broadcaster: Any
    cpu_communicator: Communicator
    communicator: Communicator
    _group_ranks: list[list[int]]

    if TYPE_CHECKING:

        def _enter(self, op: str, *tensors: Tensor, detail: str = "") -> None: ...
        def all_gatherv(self, x: Any, dim: int = 0, sizes: Sequence[int] | None = None) -> Any: ...
        def reduce_scatterv(self, x: Tensor, dim: int = -1, sizes: Sequence[int] | None = None) -> Tensor: ...

    def dispatch(
        self, hidden_states: Tensor, topk_weights: Tensor, topk_ids: Tensor, sizes: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Every rank's tokens, routing weights and expert ids, [tokens of all ranks, ...]; `sizes[r]` tokens from rank r."""
        hidden, weights, ids = self.all_gatherv([hidden_states, topk_weights, topk_ids], 0, sizes)
        return hidden, weights, ids

    def dispatch_router_logits(
        self, hidden_states: Tensor, router_logits: Tensor, sizes: Sequence[int] | None = None
    ) -> tuple[Tensor, Tensor]:
        """Every rank's tokens and router logits, [tokens of all ranks, ...]; `sizes[r]` tokens from rank r."""
        hidden, logits = self.all_gatherv([hidden_states, router_logits], 0, sizes)
        return hidden, logits

    def combine(self, hidden_states: Tensor, sizes: Sequence[int] | None = None) -> Tensor:
        """The sum over ranks of their parts, each rank getting its own `sizes[rank]` tokens back."""
        return self.reduce_scatterv(hidden_states, 0, sizes)

    def prepare_communication_buffer_for_model(self, model: torch.nn.Module) -> None:
        """Let every module of `model` that has `prepare_communication(group)` allocate its buffers over this group."""
        if self.world_size == 1:
            return
        for module in model.modules():
            prepare = getattr(module, "prepare_communication", None)
            if callable(prepare):
                prepare(self)

    def create_mq_broadcaster(self, writer_rank: int = 0, external_writer_handle: QueueHandle | None = None) -> GroupBroadcaster | None:
        """A message queue from group rank `writer_rank` to all others; `broadcast_object` from that rank uses it when kept.

        external_writer_handle: this rank's handle of a queue whose writer is outside the group (nothing is exchanged then).
        None in a group of one, and where the ranks do not share a host. Collective over the group.
        """
        if external_writer_handle is not None:
            return GroupBroadcaster(MessageQueue.attach(external_writer_handle), None)
        if self.world_size == 1 or not all(nodes.in_the_same_node_as(self.cpu_group, writer_rank)):
            return None
        readers = [rank for rank in range(self.world_size) if rank != writer_rank]
        return GroupBroadcaster(broadcaster.connect(self.cpu_communicator, writer_rank, readers), writer_rank)

    def create_single_reader_mq_broadcasters(self, reader_rank_in_group: int = 0) -> list[Any]:
        """A queue from every other rank to one reader: by writer's rank, the ends this rank holds, None elsewhere.

        The reader holds a MessageReader of each other rank; another rank holds the MessageQueue at its own place.
        """
        return [
            None if writer == reader_rank_in_group else broadcaster.connect(self.cpu_communicator, writer, [reader_rank_in_group])
            for writer in range(self.world_size)
        ]

    def make_sibling_device_group(self, name: str = "sibling") -> Any:
        """Another torch group of the same ranks and backend, for traffic that must not queue behind this group's.

        Collective over the world, as making a group is. None in a world where every such group is of one rank.
        """
        lists = [ranks for ranks in self._group_ranks if len(ranks) > 1]
        if not lists:
            return process_groups.make_lonely_group(self.rank, self.backend) if torch.distributed.is_initialized() else None
        sibling = process_groups.make_subgroup(lists, self.rank, self.backend, self.timeout, f"{self.unique_name}.{name}")
        self._siblings().append(sibling)
        return sibling

    def _siblings(self) -> list[Any]:
        return self.__dict__.setdefault("_sibling_groups", [])

    def _close_siblings(self) -> None:
        for sibling in self._siblings():
            if sibling is not None and torch.distributed.is_initialized():
                torch.distributed.destroy_process_group(sibling)
        self._siblings().clear()

    def _carrier_all_gather(self, x: Tensor) -> Tensor:
        """All ranks' `x` in rank order, flat; CPU tensors through the CPU group."""
        self._enter("all_gather", x, detail="dim=0")
        carrier = self.cpu_communicator if x.device.type == "cpu" else self.communicator
        return carrier.all_gather(x.reshape(-1), 0)
