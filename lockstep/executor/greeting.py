"""How an agent gets to its leader: tries again until the leader is there, and both prove that they have the key."""

from __future__ import annotations

import selectors
import socket
import time

from lockstep.config.model_spec import ModelSpec
from lockstep.config.nodes import chosen_address
from lockstep.config.tree import EngineConfig
from lockstep.distributed.greeting import Challenge, Identity, Refused, Welcome, introduce
from lockstep.executor import gather, node_wire
from lockstep.executor.contract import ExecutorError
from lockstep.executor.link import Link, LinkLost
from lockstep.executor.node_wire import SIDES, Message
from lockstep.observability.logging import get_logger
from lockstep.utils import net

FIRST_PAUSE_S, LONGEST_PAUSE_S = 0.05, 1.0
_log = get_logger(__name__)


def identity(config: EngineConfig, spec: ModelSpec) -> Identity:
    """Who this node is."""
    return introduce(config.parallel.node_rank, node_wire.agreed_settings(config, spec))


def connect(config: EngineConfig, spec: ModelSpec, key: str) -> Link:
    """The connection to the leader, both ends proven to have the key. Raises ExecutorError when the leader is not found in
    startup_timeout_seconds, or will not have this node."""
    parallel, limit_s = config.parallel, config.runtime.startup_timeout_seconds
    host, port = parallel.master_addr, parallel.report_port
    if not key and not net.is_loopback(host):
        gather.warn_of_no_key()
    until, pause, why = time.monotonic() + limit_s, FIRST_PAUSE_S, ""
    while time.monotonic() < until:
        try:
            link = Link(_open(host, port, min(5.0, limit_s)), parallel.node_timeout_seconds)
        except OSError as e:
            why = f"{e.strerror or e}"
        else:
            try:
                return _greet(link, identity(config, spec), key, parallel.node_timeout_seconds)
            except LinkLost as e:
                link.close()
                why = f"it was reached, but {e}"
            except BaseException:
                link.close()
                raise
        time.sleep(min(pause, max(0.0, until - time.monotonic())))
        pause = min(pause * 1.6, LONGEST_PAUSE_S)
    rule = f" (master_port={parallel.master_port}, and one more for each replica before this node's)" if parallel.in_groups else ""
    hint = ""
    if net.is_loopback(host):
        hint = f" {host} is this very host: give node 0's network address as master_addr if it is another one."
    raise ExecutorError(
        f"node {parallel.node_rank} of {parallel.nnodes} did not reach the leader at {host}:{port} in {limit_s:g} s ({why}): start "
        f"node 0 with the same master_addr and master_port{rule}, and see that no firewall is between "
        f"(startup_timeout_seconds={limit_s:g}).{hint}",
        phase="node",
        kind="hung",
    )


def _open(host: str, port: int, timeout_s: float) -> socket.socket:
    source = chosen_address()
    return socket.create_connection((host, port), timeout_s, (source, 0) if source else None)


def _greet(link: Link, who: Identity, key: str, limit_s: float) -> Link:
    until = time.monotonic() + limit_s
    challenge = _next(link, until)
    if not isinstance(challenge, Challenge):
        raise LinkLost(f"it said {type(challenge).__name__} first")
    if challenge.protocol != node_wire.PROTOCOL:
        raise _refused(who, f"the leader speaks version {challenge.protocol} of the protocol, this node {node_wire.PROTOCOL}")
    hello = SIDES.hello(challenge, key, who)
    link.send(hello)
    answer = _next(link, until)
    if isinstance(answer, Refused):
        raise _refused(who, answer.reason)
    if not isinstance(answer, Welcome) or not SIDES.obeys(challenge, key, hello, answer):
        raise _refused(who, "what answers there does not have this node's LOCKSTEP_CLUSTER_KEY: set the same one on every node")
    link.frames.limit = node_wire.MESSAGE_BYTES
    _log.info("node %d is in: waiting for the others", who.number)
    return link


def _next(link: Link, until: float) -> Message:
    """The next message; what came with it is left for later. Raises LinkLost."""
    with selectors.DefaultSelector() as one:
        one.register(link.socket, selectors.EVENT_READ)
        while time.monotonic() < until:
            if one.select(0.2) and (messages := link.receive()):
                link.early += messages[1:]
                return messages[0]
    raise LinkLost("it did not greet")


def _refused(who: Identity, reason: str) -> ExecutorError:
    return ExecutorError(f"node {who.number} ({who.host}) was refused: {reason}.", phase="node", kind="refused")
