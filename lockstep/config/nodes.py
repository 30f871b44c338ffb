"""The rules of running over several hosts ("nodes")."""

from __future__ import annotations

from dataclasses import replace

from lockstep.config.errors import ConfigError
from lockstep.config.tree import ParallelConfig
from lockstep.utils import env, net


def check_nodes(parallel: ParallelConfig, *, headless: bool = False) -> None:
    """Refuse numbers that no set of nodes can have. `headless`: this process is to serve a leader elsewhere."""
    nodes, rank = parallel.nnodes, parallel.node_rank
    if not 0 < parallel.master_port < 65536:
        raise ConfigError(f"master_port={parallel.master_port} must be from 1 to 65535: give the same free port on every node.")
    if rank < 0 or rank >= nodes:
        more = "" if nodes > 1 else ", or set nnodes to the number of hosts"
        raise ConfigError(f"node_rank={rank} must be from 0 to nnodes - 1 (nnodes={nodes}): the leader is 0, the others count up{more}.")
    if headless and nodes == 1 and parallel.data_parallel_size == 1:
        raise ConfigError(
            "--headless needs nnodes > 1 (nnodes=1) or data_parallel_size > 1 (data_parallel_size=1): one host has nobody to serve; "
            "leave it out."
        )
    if headless and nodes > 1 and rank == 0:
        raise ConfigError(
            "--headless with node_rank=0: node 0 is the leader, which takes the requests; leave --headless out, or set node_rank."
        )
    if nodes == 1:
        return
    if rank > 0 and not headless:
        raise ConfigError(
            f"node_rank={rank} serves the leader (node 0) and takes no requests of its own: start it with "
            "`lockstep serve ... --headless` (or generate)."
        )
    backend = parallel.distributed_executor_backend
    if backend not in (None, "mp"):
        raise ConfigError(
            f"nnodes={nodes} > 1 can only be set when distributed_executor_backend is mp, and it is {backend!r}: use mp, or leave it out."
        )
    if parallel.data_parallel_size > 1:
        _check_replicas_of(parallel)
    world, each = parallel.world_size, parallel.nodes_per_replica
    if world % each:
        by = f"nnodes={nodes}" if each == nodes else f"{each}, the nodes of each replica (nnodes={nodes})"
        raise ConfigError(
            f"world_size={world} must be divisible by {by}: each node runs as many ranks as the others; "
            "change tensor_parallel_size or pipeline_parallel_size so that their product is."
        )
    if not parallel.master_addr.strip() or net.is_any(parallel.master_addr):
        raise ConfigError(
            f"master_addr={parallel.master_addr!r} is no address that other hosts could connect to: give that of node 0, "
            "the same on every node."
        )
    try:
        env.rendezvous_port()
    except ValueError as e:
        raise ConfigError(str(e)) from None


def _check_replicas_of(parallel: ParallelConfig) -> None:
    """Replicas and nodes: which replica is where follows from nnodes and node_rank, and from nothing else."""
    nodes, size, defaults = parallel.nnodes, parallel.data_parallel_size, ParallelConfig()
    if nodes % size and size % nodes:
        raise ConfigError(
            f"nnodes={nodes} with data_parallel_size={size}: one of the two must be divisible by the other, so that each replica has as "
            "many nodes as the others, or each node as many replicas; change one of them."
        )
    for name in ("rank", "size_local", "start_rank", "address", "rpc_port", "backend"):
        name = f"data_parallel_{name}"
        value = getattr(parallel, name)
        if value != getattr(defaults, name):
            raise ConfigError(
                f"{name}={value} with nnodes={nodes}: nnodes and node_rank say which replicas a host has, and all hosts meet at "
                f"master_addr and master_port; leave {name} out, or nnodes."
            )
    last = parallel.master_port + size - 1
    if parallel.in_groups and last > 65535:
        raise ConfigError(
            f"master_port={parallel.master_port} with data_parallel_size={size}: the nodes of each replica report at a port of their own, "
            f"from master_port on, and {last} is none; use at most {65536 - size}."
        )


def placed(parallel: ParallelConfig, *, headless: bool = False) -> ParallelConfig:
    """`parallel` with what nnodes and node_rank say of this host's replicas filled in. The rules hold (`check_nodes`).

    In groups of nodes, a headless one has ranks of one replica. Else it keeps whole replicas for the leader, as with
    data_parallel_size_local and data_parallel_start_rank.
    """
    if parallel.nnodes == 1 or parallel.data_parallel_size == 1:
        return parallel
    if parallel.in_groups:
        return replace(parallel, data_parallel_rank=parallel.node_rank // parallel.nodes_per_replica) if headless else parallel
    local = parallel.data_parallel_size // parallel.nnodes
    return replace(
        parallel,
        data_parallel_size_local=local,
        data_parallel_start_rank=parallel.node_rank * local if headless else None,
        data_parallel_address=parallel.master_addr,
        data_parallel_rpc_port=parallel.master_port,
    )


def meeting_point(parallel: ParallelConfig) -> tuple[str, str]:
    """The settings that say where the leader listens for the keepers of replicas: of its address and its port."""
    return ("master_addr", "master_port") if parallel.nnodes > 1 else ("data_parallel_address", "data_parallel_rpc_port")


def own_address(address: str, setting: str) -> str:
    """Where this host listens for others, in digits: as the environment says, else `address`, which `setting` gave.

    Raises ConfigError when there is none that others could reach.
    """
    chosen = chosen_address()
    if chosen:
        return chosen
    try:
        found = net.resolve(address)
    except OSError as e:
        raise ConfigError(f"{setting}={address!r} is not known here ({e.strerror}): give this host's address.") from None
    if net.is_loopback(found) and not net.is_loopback(address):
        raise ConfigError(
            f"{setting}={address!r} is {found} on this host, which no other host can reach: give this host's address in digits, the same "
            "everywhere, or set LOCKSTEP_HOST_IP here."
        )
    return found


def chosen_address() -> str:
    """This host's address as LOCKSTEP_HOST_IP or LOCKSTEP_INTERFACE say it; "" where neither is set. Raises ConfigError."""
    if env.host_ip() or not env.network_interface():
        return env.host_ip()
    address = net.address_of(env.network_interface())
    if address is None:
        raise ConfigError(f"LOCKSTEP_INTERFACE={env.network_interface()} has no address on this host: name another one, or unset it.")
    return address
