"""Sampled tokens on their way through a pipeline: from the output rank straight back to the first stage, which embeds them.

    first stage    step 4    step 5    take the tokens of step 4, step 6    take those of step 5, step 7
    output rank              step 4, send                 step 5, send                           step 6, send

So a plan may have rows whose tokens no rank knows yet, and where there are as many micro-batches as stages the engine's part of a
step (to take its result, plan the next one, hand it over) is no part of the way from a token to the next. On every other rank a
token is a placeholder: those need to know how many there are, and never look at one.
"""

from __future__ import annotations

from collections import deque
from dataclasses import dataclass

import numpy as np

from lockstep.distributed.groups import ParallelGroups
from lockstep.distributed.handles import Handle
from lockstep.worker.batch import I64, BatchState

PLACEHOLDER = 0


@dataclass(frozen=True)
class _Owed:
    """What a step sampled: for these slots (`[rows]`, as all below), which held these tenants, tokens that stand there."""

    slots: I64
    tenants: I64
    positions: I64


class Returns:
    """One rank's part. Every rank of a pipeline makes the same calls in the same order."""

    def __init__(self, groups: ParallelGroups, state: BatchState) -> None:
        self._groups, self._state = groups, state
        self._gives = bool(groups.tp.rank_in_group == 0 and groups.pp.is_last_rank)
        self._takes = bool(groups.pp.is_first_rank)
        self._most = groups.pp.world_size + 1  # steps that an engine has in flight: what is older has been sent
        self._sending: deque[list[Handle]] = deque()  # oldest first, as what is owed
        self._owed: deque[_Owed] = deque()
        self._taken = 0  # how many are no longer owed: the first one's number, less one
        self._last = np.zeros(state.capacity, np.int64)  # by slot: the number of the last one that has a token for it
        self._tenant = np.zeros(state.capacity, np.int64)  # and for whom

    def sampled(self, slots: I64, tokens: I64) -> None:
        """A step has sampled `tokens [rows]` for `slots [rows]`. The tokens are looked at on the output rank alone."""
        if not len(slots):
            return
        if self._gives:
            self._state.append(slots, tokens)
            self._sending.append(self._groups.pp.isend_object(tokens.tolist(), 0))
            while len(self._sending) > self._most + 1:  # the first stage has begun this step, and so has taken the others
                for handle in self._sending.popleft():
                    handle.wait()
            return
        if self._takes:
            owed = _Owed(slots, self._state.tenants[slots], self._state.lengths[slots])
            self._owed.append(owed)
            self._last[slots], self._tenant[slots] = self._taken + len(self._owed), owed.tenants
        self._state.append(slots, np.full(len(slots), PLACEHOLDER, np.int64))

    def take(self, slots: I64) -> None:
        """Wait for the tokens of steps before of the requests in `slots [rows]`, and put them where they belong."""
        last = int((self._last[slots] * (self._tenant[slots] == self._state.tenants[slots])).max(initial=0))
        while self._taken < last or len(self._owed) > self._most:
            self._take()
            self._taken += 1

    def _take(self) -> None:
        owed, state = self._owed.popleft(), self._state
        tokens = self._receive(len(owed.slots))
        still = state.tenants[owed.slots] == owed.tenants
        state.tokens[owed.slots[still], owed.positions[still]] = tokens[still]

    def _receive(self, count: int) -> I64:
        """What the output rank sent next, on every rank of this stage."""
        pp, tp = self._groups.pp, self._groups.tp
        tokens = pp.recv_object(pp.world_size - 1) if tp.rank_in_group == 0 else None
        tokens = np.array(tp.broadcast_object(tokens), np.int64)  # not by way of a device, which would have to be waited for
        assert len(tokens) == count, f"{len(tokens)} tokens came for {count} rows"
        return tokens
