"""The collectives as torch operators, so that torch.compile keeps them in its graph.

Groups are looked up by their unique name: a graph can hold a string, not a group.
"""

from __future__ import annotations

import weakref
from typing import TYPE_CHECKING

import torch
from torch import Tensor

if TYPE_CHECKING:
    from lockstep.distributed.group import GroupCoordinator

_groups: dict[str, weakref.ref[GroupCoordinator] | None] = {}


def register(unique_name: str, group: weakref.ref[GroupCoordinator]) -> None:
    """Let the operators find `group` by its name."""
    _groups[unique_name] = group


def forget(unique_name: str) -> None:
    """The group is destroyed; later calls say so."""
    if unique_name in _groups:
        _groups[unique_name] = None


def lookup(unique_name: str) -> GroupCoordinator:
    """The living group of that name. Raises ValueError when it was destroyed."""
    assert unique_name in _groups, f"Group {unique_name} is not found."
    found = _groups[unique_name]
    group = found() if found is not None else None
    if group is None:
        raise ValueError(f"Group {unique_name} is destroyed.")
    return group


def all_reduce(tensor: Tensor, group_name: str) -> Tensor:
    """The sum over the group's ranks, as a new tensor."""
    return lookup(group_name)._all_reduce(tensor)


def all_reduce_(tensor: Tensor, group_name: str) -> None:
    """The sum over the group's ranks, into `tensor`."""
    lookup(group_name).all_reduce_(tensor)


def all_gather(tensor: Tensor, dim: int, world_size: int, group_name: str) -> Tensor:
    """Every rank's tensor joined along `dim`."""
    return lookup(group_name)._all_gather(tensor, dim)


def reduce_scatter(tensor: Tensor, dim: int, world_size: int, group_name: str) -> Tensor:
    """This rank's slice along `dim` of the sum."""
    return lookup(group_name)._reduce_scatter(tensor, dim)


def _scaled(tensor: Tensor, dim: int, numerator: int, denominator: int) -> Tensor:
    shape = list(tensor.shape)
    shape[dim] = shape[dim] * numerator // denominator
    return tensor.new_empty(shape)


_library = torch.library.Library("lockstep", "FRAGMENT")
_library.define("all_reduce(Tensor tensor, str group_name) -> Tensor")
_library.define("all_reduce_(Tensor(a!) tensor, str group_name) -> ()")
_library.define("all_gather(Tensor tensor, int dim, int world_size, str group_name) -> Tensor")
_library.define("reduce_scatter(Tensor tensor, int dim, int world_size, str group_name) -> Tensor")
for _op in (all_reduce, all_reduce_, all_gather, reduce_scatter):
    _library.impl(_op.__name__, _op, "CompositeExplicitAutograd")
torch.library.register_fake("lockstep::all_reduce", lambda tensor, group_name: torch.empty_like(tensor).contiguous(), lib=_library)
torch.library.register_fake("lockstep::all_reduce_", lambda tensor, group_name: None, lib=_library)
torch.library.register_fake(
    "lockstep::all_gather", lambda tensor, dim, world_size, group_name: _scaled(tensor, dim, world_size, 1), lib=_library
)
torch.library.register_fake(
    "lockstep::reduce_scatter", lambda tensor, dim, world_size, group_name: _scaled(tensor, dim, 1, world_size), lib=_library
)
