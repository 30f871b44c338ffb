"""Which replica a request goes to: what the request asks for, then its session, then the policy."""

from __future__ import annotations

from collections.abc import Sequence

from lockstep.cluster import balance
from lockstep.cluster.errors import RoutingError
from lockstep.cluster.prefix_index import PrefixIndex
from lockstep.config.tree import EngineConfig
from lockstep.engine.errors import RequestError
from lockstep.protocol import EngineRequest


class Placement:
    """Chooses replicas, and remembers what it sent where as far as the policy needs it."""

    def __init__(self, config: EngineConfig) -> None:
        self._routing = config.parallel.data_parallel_routing
        self._caching = config.cache.enable_prefix_caching
        self._prefixes = PrefixIndex(config.parallel.replicas_served)
        self._first = config.parallel.first_replica
        self._routed = 0

    def check(self, request: EngineRequest, loads: Sequence[balance.ReplicaLoad]) -> None:
        """Raise RequestError when the request names a replica that there is not, or not any more."""
        if request.data_parallel_rank is not None:
            try:
                balance.explicit(request.data_parallel_rank, loads, self._first)
            except RoutingError as e:
                raise RequestError(str(e)) from None

    def choose(self, request: EngineRequest, tokens: Sequence[int], loads: list[balance.ReplicaLoad], *, again: bool = False) -> int:
        """The replica for a request whose tokens so far are `tokens`. At least one must be routable.

        again: the request has run before and its replica died. It may go anywhere then, as it may while the replica that it names is
        down: to be finished is worth more than where.
        """
        self._routed += 1
        # A salted request reads no cache but that of its salt, which is nobody else's.
        keeps_index = self._routing == "prefix" and self._caching and request.cache_salt is None
        names = self._prefixes.names(tokens) if keeps_index else []
        named = None if request.data_parallel_rank is None else request.data_parallel_rank - self._first
        if named is not None and not again and loads[named].routable:
            replica = named
        elif request.session_id is not None:
            replica = balance.sticky(request.session_id, loads)
        elif self._routing == "round_robin":
            replica = balance.round_robin(loads, self._routed)
        elif not keeps_index:
            replica = balance.shortest_queue(loads, start=self._routed)
        else:
            replica = balance.prefix_affine(loads, self._prefixes.matches(tokens, names), start=self._routed)
        if keeps_index:
            self._prefixes.insert(tokens, replica, names)
        return replica

    def forget(self, replica: int) -> None:
        """The replica died: nothing is cached there."""
        self._prefixes.forget(replica)
