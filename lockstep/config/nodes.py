"""The rules of running over several hosts ("nodes")."""

from __future__ import annotations

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
    if nodes > 1 and parallel.data_parallel_size > 1:
        raise ConfigError(
            f"nnodes={nodes} with data_parallel_size={parallel.data_parallel_size}: replicas that each span hosts are not available yet "
            "in this version; give each host whole replicas (data_parallel_size_local), or leave one of the two out."
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
    world = parallel.world_size
    if world % nodes:
        raise ConfigError(
            f"world_size={world} must be divisible by nnodes={nodes}: each node runs as many ranks as the others; "
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
