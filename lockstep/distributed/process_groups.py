"""Making torch process groups inside a default group, whoever made that one."""

from __future__ import annotations

import inspect
import os
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.distributed_c10d as c10d

from lockstep.utils import env


def backends(group: Any = None) -> dict[str, str]:
    """Device type -> backend name of a process group (None: the default one), e.g. {"cpu": "gloo", "cuda": "nccl"}."""
    return dict(part.split(":", 1) for part in str(dist.get_backend_config(group)).split(","))


def is_device_bound() -> bool:
    """Whether the default group was made with `device_id`, so that its communicators exist and can be split."""
    return dist.group.WORLD is not None and getattr(dist.group.WORLD, "bound_device_id", None) is not None


_CAN_FILTER = "backend" in inspect.signature(dist.split_group).parameters


def can_split() -> bool:
    """Whether NCCL groups can be split off the default group: it is bound to a device, and only NCCL would be split.

    Beside gloo that needs a torch whose `split_group` can leave gloo out; gloo's groups are made one by one, always.
    """
    if not is_device_bound() or backends().get("cuda") != "nccl" or not (_CAN_FILTER or set(backends()) == {"cuda"}):
        return False
    world: Any = dist.group.WORLD
    return bool(getattr(world._get_backend(torch.device("cuda")), "supports_splitting", True))


@contextmanager
def _unbound() -> Iterator[None]:
    """While inside, `new_group` makes its groups from scratch.

    With a bound default group it would have the *other* ranks take part in splitting NCCL's communicator, also for gloo
    groups and for groups that nobody else is asked to make: they, or this rank, would wait for ever.
    """
    world: Any = dist.group.WORLD
    bound = getattr(world, "bound_device_id", None)
    if bound is None:
        yield
        return
    world.bound_device_id = None
    try:
        yield
    finally:
        world.bound_device_id = bound


_GLOO: Any = c10d.ProcessGroupGloo if dist.is_gloo_available() else object
_DEVICES: dict[tuple[int, str], list[Any]] = {}  # by process (a forked one has none of its parent's threads) and interfaces


def _devices() -> list[Any]:
    """Gloo's devices of this process, made once: as torch makes them for each group, of the interfaces that the user names."""
    names = env.gloo_interfaces()
    key = os.getpid(), names
    if key not in _DEVICES:
        _DEVICES[key] = [_GLOO.create_device(interface=name) for name in names.split(",") if name] or [_GLOO.create_default_device()]
    return _DEVICES[key]


def forget_devices() -> None:
    """Let the shared devices go: with the last group that uses one its thread ends. Groups made later share another."""
    for key in [key for key in _DEVICES if key[0] == os.getpid()]:
        del _DEVICES[key]


class _Kind(type(_GLOO)):  # type: ignore[misc]
    """Torch asks what it constructed whether it is of this class; another thread may have changed the name in between."""

    def __instancecheck__(cls, instance: Any) -> bool:
        return isinstance(instance, _GLOO)


class _Sharing(_GLOO, metaclass=_Kind):  # type: ignore[misc]
    def __init__(self, store: Any, rank: int, size: int, *args: Any, timeout: timedelta = c10d.default_pg_timeout, **more: Any) -> None:
        if more or (args and not isinstance(args[0], timedelta)):  # somebody, in another thread, who brings options
            super().__init__(store, rank, size, *args, **more)
            return
        options = _GLOO._Options()
        options._devices = _devices()
        options._timeout = args[0] if args else timeout
        options._threads = 2 * len(options._devices)  # as torch does
        super().__init__(store, rank, size, options)


_INSIDE: list[Any] = []  # of `one_event_loop`: what was there before, once for each that is inside
_CHANGING = threading.Lock()


@contextmanager
def one_event_loop() -> Iterator[None]:
    """While inside, the gloo groups that torch makes share one device, and so one thread.

    Torch gives every group a device, whose thread wakes a hundred times a second, used or not. On cores that all compute
    it interrupts one, and the ranks on the others wait for that: fourteen took 1.4 % of both cores, and of a step of two
    ranks 7 %. Devices are given to a group's constructor only, which `new_group` calls; so another one is there meanwhile.
    """
    if not dist.is_gloo_available():
        yield
        return
    with _CHANGING:
        _INSIDE.append(_INSIDE[0] if _INSIDE else c10d.ProcessGroupGloo)
        c10d.ProcessGroupGloo = _Sharing  # type: ignore[misc]
    try:
        yield
    finally:
        with _CHANGING:
            before = _INSIDE.pop()
            if not _INSIDE:  # the last to leave
                c10d.ProcessGroupGloo = before  # type: ignore[misc]


def make_subgroup(group_ranks: Sequence[Sequence[int]], rank: int, backend: str, timeout: timedelta | None, name: str) -> Any:
    """The torch group of `rank` among `group_ranks`, which must not overlap.

    Collective over the default group: every rank calls with the same lists, also ranks in none (they get None).
    """
    if backend == "nccl" and can_split():
        only_nccl: dict[str, Any] = {"backend": "cuda:nccl"} if _CAN_FILTER else {}
        lists = [list(ranks) for ranks in group_ranks]
        return dist.split_group(split_ranks=lists, timeout=timeout, group_desc=name, **only_nccl)
    mine = None
    with _unbound(), one_event_loop():
        for ranks in group_ranks:
            group = dist.new_group(list(ranks), timeout=timeout, backend=backend, group_desc=name)
            if rank in ranks:
                mine = group
    return mine


def make_lonely_group(rank: int, backend: str) -> Any:
    """A torch group of this rank alone, made without the others' help."""
    with _unbound(), one_event_loop():
        return dist.new_group([rank], backend=backend, use_local_synchronization=True)
