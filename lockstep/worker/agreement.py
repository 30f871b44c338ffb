"""That all ranks compute with the same kernels: otherwise their bits would differ with the split, unnoticed."""

from __future__ import annotations

import zlib
from pathlib import Path

import torch

from lockstep.config.errors import ConfigError
from lockstep.distributed.group import GroupCoordinator
from lockstep.distributed.progress import rank_list
from lockstep.kernels.library import library
from lockstep.kernels.variants import EMULATED, VARIANTS

_TORCH = "torch"  # plain torch operations
_NAMES = (_TORCH, EMULATED.name, *(variant.name for variant in VARIANTS))


def check_kernels(world: GroupCoordinator, native: bool) -> None:
    """Raises ConfigError on every rank when they differ in variant or version of the kernels. Collective.

    native: whether this rank computes with its kernel library at all.
    """
    if world.world_size == 1:
        return
    found = library() if native else None
    name = _TORCH if found is None else str(found.variant())
    version = 0 if found is None else zlib.crc32(Path(found.__file__).stem.encode())  # the file's name has a digest of the sources
    mine = torch.tensor([[_NAMES.index(name), version]])
    everyone = [tuple(row) for row in world.all_gather(mine, dim=0).tolist()]
    if len(set(everyone)) > 1:
        raise ConfigError(_differing(everyone))


def _differing(everyone: list[tuple[int, int]]) -> str:
    users = {kind: [rank for rank, its in enumerate(everyone) if its == kind] for kind in sorted(set(everyone))}
    listed = "; ".join(f"{_NAMES[kind]} on {rank_list(ranks)}" for (kind, _), ranks in users.items())
    names = {_NAMES[kind] for kind, _ in users}
    if len(names) == 1:
        return f"the ranks have different versions of the CPU kernels ({listed}): install the same lockstep everywhere."
    return (
        f"the ranks compute with different CPU kernels ({listed}), which would make answers depend on the split:"
        " set LOCKSTEP_KERNELS to one that every host can run (see `lockstep doctor`)."
    )
