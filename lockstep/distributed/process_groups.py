"""Making torch process groups inside a default group, whoever made that one."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any

import torch.distributed as dist

_SERVES = {"gloo": ("cpu",), "nccl": ("cuda",), "cpu:gloo,cuda:nccl": ("cpu", "cuda")}


def backends(group: Any = None) -> dict[str, str]:
    """Device type -> backend name of a process group (None: the default one), e.g. {"cpu": "gloo", "cuda": "nccl"}."""
    text = str(dist.get_backend_config(group))
    return dict(part.split(":", 1) for part in text.split(","))


def is_device_bound() -> bool:
    """Whether the default group was made with `device_id`, so that its communicators exist and can be split."""
    return dist.group.WORLD is not None and getattr(dist.group.WORLD, "bound_device_id", None) is not None


def can_split() -> bool:
    """Whether `split_group` works on the default group: NCCL for cuda, gloo for cpu, bound to a device."""
    return is_device_bound() and backends().get("cuda") == "nccl" and backends().get("cpu") == "gloo"


def make_subgroup(group_ranks: Sequence[Sequence[int]], rank: int, backend: str, timeout: timedelta | None, name: str) -> Any:
    """The torch group of `rank` among `group_ranks`, which must not overlap.

    Collective over the default group: every rank calls with the same lists, also ranks in none (they get None).
    """
    if can_split():
        # Makes all of the groups in one exchange. new_group would wait for NCCL's split on non-members only, and hang.
        child = dist.split_group(split_ranks=[list(ranks) for ranks in group_ranks], timeout=timeout, group_desc=name)
        return child if any(rank in ranks for ranks in group_ranks) else None
    mine = None
    for ranks in group_ranks:
        group = dist.new_group(list(ranks), timeout=timeout, backend=backend, group_desc=name)
        if rank in ranks:
            mine = group
    return mine


def make_lonely_group(rank: int, backend: str) -> Any:
    """A torch group of this rank alone, made without the others' help."""
    if can_split():
        return dist.new_group([rank], backend=backend, use_local_synchronization=True)
    return dist.new_group([rank], backend=backend, use_local_synchronization=True)
