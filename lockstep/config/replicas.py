"""The rules of data parallelism: which replicas run where, and who takes the requests."""

from __future__ import annotations

from lockstep.config import launcher
from lockstep.config.errors import ConfigError
from lockstep.config.tree import ParallelConfig
from lockstep.utils import net


def check_replicas(parallel: ParallelConfig, *, headless: bool = False, hybrid: bool = False) -> None:
    """Refuse what no set of hosts can have. Raises ConfigError.

    headless: this process keeps replicas for a leader elsewhere. hybrid: it is an endpoint for its host's own (`for_endpoint`).
    """
    size, local, port = parallel.data_parallel_size, parallel.data_parallel_size_local, parallel.data_parallel_rpc_port
    if not 0 < port < 65536:
        raise ConfigError(f"data_parallel_rpc_port={port} must be from 1 to 65535: give the same free port on every host.")
    if parallel.data_parallel_backend == "ray":
        _check_ray(parallel, headless=headless)
    elif parallel.data_parallel_backend != "mp":
        raise ConfigError(f"data_parallel_backend={parallel.data_parallel_backend!r} is unknown: use mp or ray.")
    if local is not None and local > size:
        raise ConfigError(
            f"data_parallel_size_local={local} is more than data_parallel_size={size}: a host runs a part of all replicas; "
            f"use at most {size}, or raise data_parallel_size."
        )
    if local is not None and local < 1:
        _check_none_here(parallel, headless=headless)
    _check_rank(parallel, headless=headless)
    if not hybrid:
        _check_start(parallel, headless=headless)
    if headless or parallel.replicas_led < parallel.replicas_served:
        _check_meeting_point(parallel)


def _check_none_here(parallel: ParallelConfig, *, headless: bool) -> None:
    """data_parallel_size_local=0: a leader may run no replica itself, and only take the requests for those of other hosts."""
    local, why = parallel.data_parallel_size_local, ""
    if local != 0:
        why = "it is 0 on a leader that runs none itself, and else at least 1"
    elif headless:
        why = "a headless host keeps at least 1"
    elif launcher.is_external(parallel):
        why = "a launcher's processes are ranks of the replicas on this host; with it it is found by itself"
    elif parallel.data_parallel_rank is not None:
        why = f"data_parallel_rank={parallel.data_parallel_rank} is one that runs here"
    elif parallel.data_parallel_size == 1:
        why = "with data_parallel_size=1 there are no others, on other hosts; raise that"
    if why:
        raise ConfigError(f"data_parallel_size_local={local} is impossible: {why}, or leave it out.")


def _check_ray(parallel: ParallelConfig, *, headless: bool) -> None:
    """Ray places whole replicas; who says where they are, or lets Ray place their ranks, wants something else."""
    named = "data_parallel_backend='ray'"
    if not launcher.has_ray():
        raise ConfigError(f"{named} needs Ray, which is not installed here: pip install 'lockstep[ray]', or use mp.")
    if parallel.data_parallel_size == 1:
        raise ConfigError(f"{named} places replicas, and data_parallel_size=1 is one: raise data_parallel_size, or leave it out.")
    others = {
        "headless": headless,
        "data_parallel_size_local": parallel.data_parallel_size_local is not None,
        "data_parallel_rank": parallel.data_parallel_rank is not None,
        "distributed_executor_backend": parallel.distributed_executor_backend not in (None, "mp", "uni"),
    }
    for other, given in others.items():
        if given:
            raise ConfigError(
                f"{named} with {other}: Ray starts whole replicas, each with its ranks on one node; leave one of the two out."
            )


def _check_rank(parallel: ParallelConfig, *, headless: bool) -> None:
    """data_parallel_rank: this process is one replica and nothing else, and whoever started it sends it its requests."""
    rank, size = parallel.data_parallel_rank, parallel.data_parallel_size
    if rank is None:
        return
    if not 0 <= rank < size:
        raise ConfigError(f"data_parallel_rank={rank} is not one of data_parallel_size={size} replicas: it must be from 0 to {size - 1}.")
    if headless or parallel.data_parallel_start_rank is not None:
        other = "headless" if headless else f"data_parallel_start_rank={parallel.data_parallel_start_rank}"
        raise ConfigError(
            f"data_parallel_rank={rank} with {other}: this process is either one replica by itself, or keeps replicas for a leader; "
            f"leave data_parallel_rank out, or {other.split('=', maxsplit=1)[0]}."
        )


def _check_start(parallel: ParallelConfig, *, headless: bool) -> None:
    """data_parallel_start_rank: which replicas a headless host keeps; by default all, for a leader that runs none."""
    start, size, local = parallel.data_parallel_start_rank, parallel.data_parallel_size, parallel.data_parallel_size_local
    if not headless:
        if start is not None:
            raise ConfigError(
                f"data_parallel_start_rank={start} without headless: add headless to keep replicas for a leader, or "
                "--data-parallel-hybrid-lb to `lockstep serve` for an endpoint on this host; leave it out on the leader."
            )
        return
    if size == 1:
        raise ConfigError("--headless with data_parallel_size=1: one replica has nobody to keep it for; raise data_parallel_size.")
    start = start or 0  # not given: all of them, or the first
    if start < 0:
        raise ConfigError(f"data_parallel_start_rank={start} must be at least 0: replicas are numbered from there.")
    if local is None and start:
        raise ConfigError(
            f"data_parallel_start_rank={start} with headless needs data_parallel_size_local: say how many replicas this host keeps."
        )
    local = size if local is None else local
    if start + local > size:
        raise ConfigError(
            f"data_parallel_start_rank={start} and data_parallel_size_local={local} make replicas up to {start + local - 1}, but "
            f"data_parallel_size={size} has them up to {size - 1}: start at {max(0, size - local)}, or keep {max(0, size - start)}."
        )


def _check_meeting_point(parallel: ParallelConfig) -> None:
    address = parallel.data_parallel_address
    if not address.strip() or net.is_any(address):
        raise ConfigError(
            f"data_parallel_address={address!r} is no address that other hosts could connect to: give the leader's, the same on every host."
        )
