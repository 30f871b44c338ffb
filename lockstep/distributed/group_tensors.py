"""The part of GroupCoordinator that moves single tensors and dicts of tensors between two ranks."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from lockstep.distributed import objects
from lockstep.distributed.tensor_dict import _split_tensor_dict, allocate, join_tensor_dict, tensor_keys

if TYPE_CHECKING:
    from collections.abc import Sequence

    from lockstep.distributed.communicators.base import Communicator
    from lockstep.distributed.group import GroupCoordinator
    from lockstep.distributed.handles import Handle

Postprocess = Callable[[], None]


class TensorTransfer:
    """Point to point, and the broadcast of a dict. `dst` and `src` are ranks in the group; defaults are the neighbours."""

    world_size: int
    rank_in_group: int
    device: torch.device
    cpu_communicator: Communicator
    communicator: Communicator

    if TYPE_CHECKING:

        def _enter(self, op: str, *tensors: Tensor, detail: str = "") -> None: ...
        def _note(self, op: str, *tensors: Tensor, detail: str = "") -> None: ...
        def _peer(self, rank_in_group: int, word: str) -> int: ...
        def _other(self, rank: int, word: str) -> int: ...
        def isend_object(self, obj: Any, dst: int) -> list[Handle]: ...
        def recv_object(self, src: int) -> Any: ...

    def _next(self, dst: int | None) -> int:
        return self._other((self.rank_in_group + 1) % self.world_size if dst is None else dst, "dst")

    def _prev(self, src: int | None) -> int:
        return self._other((self.rank_in_group - 1) % self.world_size if src is None else src, "src")

    def _carrier(self, x: Tensor) -> Communicator:
        # CPU tensors of a device group travel through the CPU group.
        return self.cpu_communicator if x.device.type == "cpu" else self.communicator

    def send(self, tensor: Tensor, dst: int | None = None) -> None:
        """Send to group rank `dst` (default: the next); returns when `tensor` may be changed."""
        self.isend(tensor, dst).wait()

    def recv(self, size: Sequence[int], dtype: torch.dtype, src: int | None = None) -> Tensor:
        """A new tensor of that size and dtype on this group's device, from group rank `src` (default: the previous)."""
        out = torch.empty(tuple(size), dtype=dtype, device=self.device)
        self.irecv(out, src).wait()
        return out

    def isend(self, tensor: Tensor, dst: int | None = None) -> Handle:
        """Start sending; `tensor` must not change before the handle's `wait`."""
        dst = self._next(dst)
        self._note("send", tensor, detail=f"dst={dst}")
        return self.communicator.isend(tensor, dst)

    def irecv(self, tensor: Tensor, src: int | None = None) -> Handle:
        """Start receiving into contiguous `tensor`; it may be read after the handle's `wait`."""
        assert tensor.is_contiguous(), f"irecv needs a contiguous tensor, got strides {tensor.stride()} for {tensor.size()}"
        src = self._prev(src)
        self._note("recv", tensor, detail=f"src={src}")
        return self.communicator.irecv_(tensor, src)

    def broadcast_tensor_dict(
        self, tensor_dict: dict[Any, Any] | None = None, src: int = 0, group: Any = None, metadata_group: Any = None
    ) -> dict[Any, Any] | None:
        """Group rank `src`'s dict on every rank; `src` gets its own back. World size 1: the dict itself.

        group, metadata_group: other groups (coordinators) for the tensors and for the rest; `src` counts in them too.
        """
        self._peer(src, "src")
        if self.world_size == 1:
            return tensor_dict
        data: TensorTransfer = group if group is not None else self
        meta = objects.communicator_of(metadata_group) if metadata_group is not None else self.cpu_communicator
        self._enter("broadcast_tensor_dict", detail=f"src={src}")
        if self.rank_in_group == src:
            assert isinstance(tensor_dict, dict), f"Expecting a dictionary, got {type(tensor_dict)}"
            metadata, tensors = _split_tensor_dict(tensor_dict)
            objects.broadcast(meta, metadata, src)
        else:
            metadata = objects.broadcast(meta, None, src)
            tensors = [allocate(entry, self.device) for _, entry in tensor_keys(metadata)]
        for tensor in tensors:
            data._carrier(tensor).broadcast_(tensor, src)
        return tensor_dict if self.rank_in_group == src else join_tensor_dict(metadata, iter(tensors))

    def send_tensor_dict(
        self,
        tensor_dict: dict[Any, Any],
        dst: int | None = None,
        all_gather_group: GroupCoordinator | None = None,
        all_gather_tensors: dict[str, bool] | None = None,
    ) -> dict[Any, Any] | None:
        """Send to group rank `dst` (default: the next). World size 1: returns the dict; else None. See isend_tensor_dict."""
        if self.world_size == 1:
            return tensor_dict
        for handle in self.isend_tensor_dict(tensor_dict, dst, all_gather_group, all_gather_tensors):
            handle.wait()
        return None

    def recv_tensor_dict(
        self,
        src: int | None = None,
        all_gather_group: GroupCoordinator | None = None,
        all_gather_tensors: dict[str, bool] | None = None,
    ) -> dict[Any, Any] | None:
        """The next dict that group rank `src` (default: the previous) sends. World size 1: None."""
        tensor_dict, handles, postprocess = self.irecv_tensor_dict(src, all_gather_group, all_gather_tensors)
        for handle in handles:
            handle.wait()
        for step in postprocess:
            step()
        return tensor_dict

    def isend_tensor_dict(
        self,
        tensor_dict: dict[Any, Any],
        dst: int | None = None,
        all_gather_group: GroupCoordinator | None = None,
        all_gather_tensors: dict[str, bool] | None = None,
    ) -> list[Handle]:
        """Start sending metadata and tensors; wait for every handle before changing a tensor. World size 1: [].

        all_gather_group: ranks that all hold the same tensors, here and at the receiver. Each sends its slice of a tensor
        and the receivers gather the whole. all_gather_tensors: False for keys that are not the same on those ranks.
        """
        if self.world_size == 1:
            return []
        dst = self._next(dst)
        assert isinstance(tensor_dict, dict), f"Expecting a dictionary, got {type(tensor_dict)}"
        metadata, tensors = _split_tensor_dict(tensor_dict)
        handles = self.isend_object(metadata, dst)
        for (key, _), tensor in zip(tensor_keys(metadata), tensors, strict=True):
            if tensor.numel() == 0:
                continue
            if _is_sliced(key, tensor.numel(), all_gather_group, all_gather_tensors):
                assert all_gather_group is not None
                tensor = tensor.reshape(all_gather_group.world_size, -1)[all_gather_group.rank_in_group]
            self._note("send_tensor_dict", tensor, detail=f"dst={dst} key={key}")
            handles.append(self._carrier(tensor).isend(tensor, dst))
        return handles

    def irecv_tensor_dict(
        self,
        src: int | None = None,
        all_gather_group: GroupCoordinator | None = None,
        all_gather_tensors: dict[str, bool] | None = None,
    ) -> tuple[dict[Any, Any] | None, list[Handle], list[Postprocess]]:
        """-> (dict, handles, postprocess): wait for all handles, then call postprocess in order, then read the tensors.

        The metadata is waited for here, the tensors are not. World size 1: (None, [], []).
        """
        if self.world_size == 1:
            return None, [], []
        src = self._prev(src)
        metadata = self.recv_object(src)
        handles: list[Handle] = []
        postprocess: list[Postprocess] = []
        tensors: list[Tensor] = []
        for key, entry in tensor_keys(metadata):
            full = allocate(entry, self.device)
            tensors.append(full)
            if full.numel() == 0:
                continue
            part = full
            if _is_sliced(key, full.numel(), all_gather_group, all_gather_tensors):
                assert all_gather_group is not None
                part = full.view(all_gather_group.world_size, -1)[all_gather_group.rank_in_group]
                postprocess.append(_gather_whole(full, part, all_gather_group))
            self._note("recv_tensor_dict", part, detail=f"src={src} key={key}")
            handles.append(self._carrier(part).irecv_(part, src))
        return join_tensor_dict(metadata, iter(tensors)), handles, postprocess


def _is_sliced(key: str, numel: int, group: GroupCoordinator | None, overrides: dict[str, bool] | None) -> bool:
    if group is None or group.world_size == 1 or numel % group.world_size:
        return False
    return True if overrides is None else overrides.get(key, True)


def _gather_whole(full: Tensor, part: Tensor, group: GroupCoordinator) -> Postprocess:
    def step() -> None:
        # all_gather has read `part`, a view of `full`, before copy_ writes over it.
        full.view(-1).copy_(group._carrier_all_gather(part))

    return step
