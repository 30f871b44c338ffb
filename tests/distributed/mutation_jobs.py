"""Runs a job with one method emptied: the job must notice."""

from __future__ import annotations

import importlib
from typing import Any

from lockstep.distributed import parallel_state
from lockstep.distributed.group import GroupCoordinator


def emptied(rank: int, world_size: int, method: str, job: str, args: list[Any]) -> str:
    """ "noticed" when `job` fails with `GroupCoordinator.method` (or `parallel_state.method`) doing nothing.

    On every rank alike, so that an emptied collective shows as a wrong result rather than as a hang.
    """
    where, name = method.split(".")
    owner: Any = {"GroupCoordinator": GroupCoordinator, "parallel_state": parallel_state}[where]
    original = getattr(owner, name)
    nothing: Any = property(lambda self: None) if isinstance(original, property) else (lambda *a, **k: None)
    setattr(owner, name, nothing)
    module, _, function = job.partition(":")
    try:
        getattr(importlib.import_module(module), function)(rank, world_size, *args)
    except BaseException:
        return "noticed"
    finally:
        setattr(owner, name, original)
    return "not noticed"
