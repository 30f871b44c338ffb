"""Where a launcher (torchrun) has put this process: `distributed_executor_backend="external_launcher"`.

Every process runs the same program with an engine of its own; together they are TP x PP x DP ranks, data parallel outermost.
"""

from __future__ import annotations

import importlib.util
import sys
from dataclasses import dataclass
from typing import Any

from lockstep.config.errors import ConfigError
from lockstep.config.tree import ParallelConfig
from lockstep.utils import env

_OPTIONAL = ("LOCAL_WORLD_SIZE",)


@dataclass(frozen=True)
class Place:
    """This process's place among those of the launcher. replica: its data parallel rank."""

    rank: int
    local_rank: int
    world_size: int
    local_world_size: int
    replica: int


def is_external(parallel: ParallelConfig) -> bool:
    """Whether a launcher starts the ranks."""
    return parallel.distributed_executor_backend == "external_launcher"


def is_ray(parallel: ParallelConfig) -> bool:
    """Whether Ray decides which hosts the ranks run on: what this one has says nothing about them."""
    return "ray" in (parallel.distributed_executor_backend, parallel.data_parallel_backend)


def has_ray() -> bool:
    """Whether Ray is installed."""
    return importlib.util.find_spec("ray") is not None


def in_ray_group() -> bool:
    """Whether this process belongs to a Ray placement group. Ray is not imported for that: where it is so, it has been."""
    ray: Any = sys.modules.get("ray")
    if ray is None or not hasattr(ray, "util") or not ray.is_initialized():
        return False
    return ray.util.get_current_placement_group() is not None


def place(parallel: ParallelConfig) -> Place:
    """This process's place, from the launcher's environment. Raises ConfigError where that is missing or does not fit the sizes."""
    ranks = parallel.world_size * parallel.data_parallel_size
    given = env.launcher_variables()
    missing = [name for name, text in given.items() if not text and name not in _OPTIONAL]
    if missing:
        raise ConfigError(
            f"distributed_executor_backend='external_launcher' runs one rank in each process of a launcher, and {', '.join(missing)} "
            f"{'is' if len(missing) == 1 else 'are'} not in the environment: start it with torchrun --nproc-per-node={ranks}, "
            "or use mp, which starts its own processes."
        )
    numbers = {name: _number(name, text or given["WORLD_SIZE"]) for name, text in given.items() if name != "MASTER_ADDR"}
    rank, world, local, here = (numbers[name] for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE"))
    if world != ranks:
        raise ConfigError(
            f"the launcher started WORLD_SIZE={world} processes, but tensor_parallel_size={parallel.tensor_parallel_size} x "
            f"pipeline_parallel_size={parallel.pipeline_parallel_size} x data_parallel_size={parallel.data_parallel_size} are {ranks} "
            f"ranks: start it with torchrun --nproc-per-node={ranks} (over all hosts together), or change the sizes."
        )
    if not (rank < world and local < here <= world):
        raise ConfigError(
            f"RANK={rank}, LOCAL_RANK={local} and LOCAL_WORLD_SIZE={here} do not fit WORLD_SIZE={world}: "
            "a rank is less than its world's size; let torchrun set these variables."
        )
    replica, asked = rank // parallel.world_size, parallel.data_parallel_rank
    if asked is not None and asked != replica:
        raise ConfigError(
            f"data_parallel_rank={asked}, but RANK={rank} is of replica {replica} (the launcher's ranks are dealt out "
            f"{parallel.world_size} to a replica, in order): leave it out."
        )
    return Place(rank, local, world, here, replica)


def ranks_here(parallel: ParallelConfig) -> int:
    """The ranks on this host, as far as is known without asking others."""
    return place(parallel).local_world_size if is_external(parallel) else parallel.ranks_here


def _number(name: str, text: str) -> int:
    if not text.isdigit():
        raise ConfigError(f"{name}={text!r} in the environment is not a whole number: let torchrun set it.")
    return int(text)
