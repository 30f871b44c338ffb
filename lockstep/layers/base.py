"""What parallel layers share: their group, their device and type, and the piece of the checkpoint each parameter holds."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Required, TypedDict, Unpack

import torch
from torch import Tensor, nn

from lockstep.distributed.partition import Shard

if TYPE_CHECKING:
    from lockstep.distributed.group import GroupCoordinator

ShardId = str | int | None


@dataclass(frozen=True)
class Piece:
    """One slice of a checkpoint tensor and where it goes.

    Copy `full.narrow(dim, src_start, size)` to `param.narrow(dim, dest_start, size)`; `full_shape` is the shape the
    checkpoint tensor must have. A piece of size 0 (a rank with padding rows only) has nothing to read.
    """

    dim: int
    dest_start: int
    src_start: int
    src_stop: int
    full_shape: tuple[int, ...]

    @property
    def size(self) -> int:
        return self.src_stop - self.src_start


def whole(param: Tensor) -> Piece:
    """The piece of a parameter that every rank holds in full."""
    return Piece(0, 0, 0, param.shape[0], tuple(param.shape))


class Place(TypedDict, total=False):
    """Where a layer lives: keywords that every layer takes."""

    tp: Required[GroupCoordinator]
    dtype: torch.dtype | None  # default: torch's
    device: torch.device | str | None  # default: torch's
    disable_tp: bool  # hold the layer whole and never communicate
    prefix: str  # name in the model, for errors


class TensorParallelModule(nn.Module):
    """A module that knows its tensor-parallel group and which part of each parameter it holds.

    With `disable_tp` the layer is whole on every rank and never communicates.
    """

    def __init__(self, **place: Unpack[Place]) -> None:
        super().__init__()
        self.tp = tp = place["tp"]
        alone = place.get("disable_tp", False)
        device = place.get("device")
        self.tp_size = 1 if alone else tp.world_size
        self.tp_rank = 0 if alone else tp.rank_in_group
        self.dtype = place.get("dtype") or torch.get_default_dtype()
        self.device = torch.get_default_device() if device is None else torch.device(device)
        self.prefix = place.get("prefix", "")

    def _empty(self, *shape: int) -> nn.Parameter:
        return nn.Parameter(torch.empty(shape, dtype=self.dtype, device=self.device), requires_grad=False)

    def shard_ids(self, param: str) -> tuple[ShardId, ...]:
        """The checkpoint tensors that make up `param`: ("q", "k", "v"), (0, 1) or, for one tensor, (None,)."""
        del param
        return (None,)

    def pieces(self, param: str, shard_id: ShardId = None) -> Piece:
        """Which slice of the checkpoint tensor `shard_id` this rank holds in `param`, and where.

        Raises ValueError for a shard id that the layer does not have.
        """
        self._check_shard_id(param, shard_id)
        return whole(getattr(self, param))

    def _check_shard_id(self, param: str, shard_id: ShardId) -> None:
        if shard_id not in self.shard_ids(param):
            name = f"{self.prefix or type(self).__name__}.{param}"
            raise ValueError(f"shard_id={shard_id!r} of {name} must be one of {self.shard_ids(param)}.")


def gather_shards(tp: GroupCoordinator, x: Tensor, cuts: Sequence[Shard]) -> Tensor:
    """Join each rank's columns of the last dim, in rank order, on every rank. `cuts[r]` is what rank r holds.

    Uneven shards are padded to the widest, gathered, and trimmed.
    """
    width = max(cut.size for cut in cuts)
    return trim_shards(tp.all_gather(pad_last(x, width), dim=-1), cuts)


def pad_last(x: Tensor, width: int) -> Tensor:
    """`x` with zeros appended to its last dim up to `width`; `x` itself when it has that width."""
    return x if x.shape[-1] == width else nn.functional.pad(x, (0, width - x.shape[-1]))


def trim_shards(gathered: Tensor, cuts: Sequence[Shard]) -> Tensor:
    """Drop the padding that made the shards of a gathered last dim equally wide."""
    width = max(cut.size for cut in cuts)
    if all(cut.size == width for cut in cuts):
        return gathered
    return torch.cat([gathered.narrow(-1, rank * width, cut.size) for rank, cut in enumerate(cuts)], dim=-1)
