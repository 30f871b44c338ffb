"""Groups that span hosts: shared memory within a host, gloo between the first ranks ("leaders") of the hosts.

A sum goes three ways: each host adds up what its ranks hold, leaders exchange those partial sums, and hand the result to
their host. The additions are those of one tree over all ranks: a host sums up the largest subtrees whose leaves are all its
own, in float32, and leaders finish the tree. So the bits do not depend on which rank sits where.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from datetime import timedelta
from functools import partial, reduce
from itertools import pairwise
from operator import add
from typing import Any

import torch
from torch import Tensor

from lockstep.distributed.communicators.base import Communicator
from lockstep.distributed.communicators.segment import members_here
from lockstep.distributed.communicators.shm import SUMMED, ShmCommunicator
from lockstep.distributed.communicators.torch_pg import TorchCommunicator, as_bytes
from lockstep.distributed.handles import Handle
from lockstep.distributed.reduction_tree import ADD, ReductionTree

_TAG = 1  # of messages between leaders; transfers that callers ask for have 0
_SHARED_OUT_BYTES = 64 << 10  # sums above this size: each leader finishes a part of them


@dataclass(frozen=True)
class _Plan:
    """A tree cut at the borders of hosts.

    local: for each of this host's subtrees, the tree over its ranks' leaves. mine: which of this rank's leaves are in it.
    counts: subtrees by host. code: the rest of the tree; leaf i is subtree i, counted by host, then in order.
    """

    local: tuple[ReductionTree, ...]
    mine: tuple[tuple[int, int], ...]
    counts: tuple[int, ...]
    code: tuple[int, ...]


class HierarchicalCommunicator(Communicator):
    """Sums, broadcasts and transfers within a host use shared memory; everything else is gloo's."""

    def __init__(self, outer: TorchCommunicator, inner: ShmCommunicator, hosts: Sequence[str], timeout_s: float) -> None:
        """outer: gloo over all ranks. inner: this host's ranks, ascending. hosts: by rank, which one it sits on.

        timeout_s: how long a leader waits for another.
        """
        super().__init__(outer.rank, outer.world_size, torch.device("cpu"))
        self.outer, self.inner, self._timeout_s = outer, inner, timeout_s
        names = list(dict.fromkeys(hosts))
        self._host_of = [names.index(host) for host in hosts]
        self._members = [members_here(hosts, hosts.index(name)) for name in names]
        self._here = self._host_of[self.rank]
        self._place = self._members[self._here].index(self.rank)
        self._leaders = [members[0] for members in self._members]
        self._each_one = ReductionTree.of(self.world_size, [(r, r + 1) for r in range(self.world_size)])
        self._plans: dict[ReductionTree, _Plan] = {}

    def all_reduce_(self, x: Tensor) -> None:
        if x.numel() == 0:
            return
        if x.dtype in (torch.float32, torch.bfloat16, torch.float16):
            x.copy_(self._sum(x.float().unsqueeze(0), self._each_one, x.dtype))
            return
        if x.dtype not in SUMMED:
            return self.outer.all_reduce_(x)
        total = x.contiguous()
        self.inner.all_reduce_(total)
        if self._place == 0:
            parts = self._exchange([total] * len(self._leaders))
            parts.insert(self._here, total)
            total = reduce(add, parts)  # in the order of the hosts, on each of them
        self._hand_out(x, total)

    def combine(self, partials: Tensor, tree: ReductionTree) -> Tensor:
        return self._sum(partials, tree, torch.float32)

    def _sum(self, partials: Tensor, tree: ReductionTree, dtype: torch.dtype) -> Tensor:
        """partials [tree.counts[rank], ...] float32 -> [...] of `dtype`, the same bits on every rank."""
        plan = self._plans.get(tree)
        if plan is None:
            plan = self._plans[tree] = _plan(tree, self._host_of, self.rank)
        nodes = torch.stack([self.inner.combine(partials[a:b], local) for local, (a, b) in zip(plan.local, plan.mine, strict=True)])
        out = torch.empty(partials.shape[1:], dtype=dtype)
        total = self._finish(plan, nodes.reshape(len(nodes), out.numel()), dtype) if self._place == 0 else out
        self._hand_out(out, total.view(out.shape))
        return out

    def _finish(self, plan: _Plan, nodes: Tensor, dtype: torch.dtype) -> Tensor:
        """On a leader: nodes [subtrees of this host, n] -> the whole sum [n], rounded."""
        n = nodes.shape[1]
        if n * nodes.element_size() <= _SHARED_OUT_BYTES:
            return self._evaluate(plan, self._exchange([nodes] * len(self._leaders), plan.counts, n), nodes).to(dtype)
        cuts = list(pairwise(n * h // len(self._leaders) for h in range(len(self._leaders) + 1)))
        parts = [nodes[:, a:b].contiguous() for a, b in cuts]
        own = parts[self._here]
        part = self._evaluate(plan, self._exchange(parts, plan.counts, own.shape[1]), own).to(dtype)
        out = self._exchange([part] * len(self._leaders), [b - a for a, b in cuts])
        out.insert(self._here, part)
        return torch.cat(out)

    def _evaluate(self, plan: _Plan, others: list[Tensor], own: Tensor) -> Tensor:
        others.insert(self._here, own)
        return ReductionTree(plan.counts, plan.code).evaluate(torch.cat(others))

    def _exchange(self, parts: list[Tensor], rows: Sequence[int] | None = None, width: int | None = None) -> list[Tensor]:
        """Leaders give each other `parts[host]`; what came, by host, without this one.

        rows, width: what host h sends has `rows[h]` rows of `width` (None: it is flat). rows None: the shape of what is given.
        """
        moves, came = [], []
        for host, leader in enumerate(self._leaders):
            if host == self._here:
                continue
            shape = parts[host].shape if rows is None else (rows[host],) if width is None else (rows[host], width)
            came.append(parts[host].new_empty(shape))
            if came[-1].numel():
                moves.append((leader, partial(self.outer.group.recv, [as_bytes(came[-1])], leader, _TAG)))
            if parts[host].numel():
                moves.append((leader, partial(self.outer.group.send, [as_bytes(parts[host])], leader, _TAG)))
        self._between_hosts(moves)
        return came

    def _between_hosts(self, moves: Sequence[tuple[int, Callable[[], Any]]]) -> None:
        """Start the transfers, each with the rank at its other end, and wait for them.

        One that fails is this host's failure: its other ranks, which wait for this one, are told the cause.
        """
        until = time.monotonic() + self._timeout_s
        at = 0
        try:
            under_way = [start() for _, start in moves]
            for at, handle in enumerate(under_way):  # noqa: B007
                handle.wait(timedelta(seconds=max(0.001, until - time.monotonic())))
        except RuntimeError as error:
            cause = str(error).strip().partition("\n")[0]
            waited = f"rank {self.rank} waited for it, at most {self._timeout_s:g} s"
            self.inner.fail(f"rank {moves[at][0]}, on another host, is gone or late: {waited} ({cause}).")

    def _hand_out(self, x: Tensor, total: Tensor) -> None:
        """The leader's `total` into every member's `x`."""
        whole = total.contiguous() if self._place == 0 or not x.is_contiguous() else x
        self.inner.broadcast_(whole, 0)
        if whole is not x:
            x.copy_(whole)

    def broadcast_(self, x: Tensor, src: int) -> None:
        dense, home = x.contiguous(), self._host_of[src]
        if dense.numel():
            if self.rank == src:
                leaders = [leader for host, leader in enumerate(self._leaders) if host != home]
                self._between_hosts([(leader, partial(self.outer.group.send, [as_bytes(dense)], leader, _TAG)) for leader in leaders])
            elif self._place == 0 and self._here != home:
                self._between_hosts([(src, partial(self.outer.group.recv, [as_bytes(dense)], src, _TAG))])
            self.inner.broadcast_(dense, self._members[home].index(src) if self._here == home else 0)
        if dense is not x:
            x.copy_(dense)

    def all_gather(self, x: Tensor, dim: int) -> Tensor:
        return self.outer.all_gather(x, dim)

    def all_gatherv(self, x: Tensor, sizes: Sequence[int], dim: int) -> Tensor:
        return self.outer.all_gatherv(x, sizes, dim)

    def reduce_scatter(self, x: Tensor, dim: int) -> Tensor:
        return self.outer.reduce_scatter(x, dim)

    def reduce_scatterv(self, x: Tensor, sizes: Sequence[int], dim: int) -> Tensor:
        return self.outer.reduce_scatterv(x, sizes, dim)

    def gather(self, x: Tensor, dst: int, dim: int) -> Tensor | None:
        return self.outer.gather(x, dst, dim)

    def all_to_all(self, x: Tensor) -> Tensor:
        return self.outer.all_to_all(x)

    def all_to_allv(self, x: Tensor, send_sizes: Sequence[int], recv_sizes: Sequence[int]) -> Tensor:
        return self.outer.all_to_allv(x, send_sizes, recv_sizes)

    def isend(self, x: Tensor, dst: int) -> Handle:
        if self._host_of[dst] == self._here:
            return self.inner.isend(x, self._members[self._here].index(dst))
        return self.outer.isend(x, dst)

    def irecv_(self, x: Tensor, src: int) -> Handle:
        if self._host_of[src] == self._here:
            return self.inner.irecv_(x, self._members[self._here].index(src))
        return self.outer.irecv_(x, src)

    def barrier(self) -> None:
        self.outer.barrier()

    def close(self) -> None:
        self.inner.close()
        self.outer.close()


def _plan(tree: ReductionTree, host_of: Sequence[int], rank: int) -> _Plan:
    """Cut `tree` into subtrees of one host each, and what is above them."""
    owner = [r for r, count in enumerate(tree.counts) for _ in range(count)]
    host = [host_of[r] for r in owner]  # by leaf
    # Each entry: the host of all leaves (None: of several), and the code, where a tuple is a whole subtree of one host.
    stack: list[tuple[int | None, list[Any]]] = []
    for op in tree.code:
        if op != ADD:
            stack.append((host[op], [op]))
            continue
        (high_host, high), (low_host, low) = stack.pop(), stack.pop()
        if low_host is not None and low_host == high_host:
            stack.append((low_host, [*low, *high, ADD]))
        else:
            stack.append((None, [*_closed(low_host, low), *_closed(high_host, high), ADD]))
    rest = _closed(*stack[0])
    nodes = sorted((node for node in rest if node != ADD), key=lambda node: (host[node[0]], node[0]))
    at = [host[node[0]] for node in nodes]
    here, members = host_of[rank], [r for r in range(len(host_of)) if host_of[r] == host_of[rank]]
    pieces = [_piece(node, owner, members, rank) for node in nodes if host[node[0]] == here]
    code = tuple(ADD if op == ADD else nodes.index(op) for op in rest)
    return _Plan(tuple(p[0] for p in pieces), tuple(p[1] for p in pieces), tuple(map(at.count, range(max(host_of) + 1))), code)


def _piece(node: Sequence[int], owner: Sequence[int], members: Sequence[int], rank: int) -> tuple[ReductionTree, tuple[int, int]]:
    """A subtree as the host's ranks see it, and the run of `rank`'s own leaves in it."""
    leaves = [op for op in node if op != ADD]  # consecutive, and so are those of each rank
    tree = ReductionTree(
        tuple(sum(owner[leaf] == r for leaf in leaves) for r in members), tuple(op if op == ADD else op - leaves[0] for op in node)
    )
    own = [leaf - owner.index(rank) for leaf in leaves if owner[leaf] == rank]
    return tree, (own[0], own[-1] + 1) if own else (0, 0)


def _closed(host: int | None, code: list[Any]) -> list[Any]:
    """The code as seen from above a cut: a whole subtree of one host is one leaf."""
    return code if host is None else [tuple(code)]
