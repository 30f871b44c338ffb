"""Which blocks each request holds, and which prefixes the next ones may reuse.

When may a block be shared? When its contents are decided: all its tokens are known, and a step that computes them *has
been issued*. The step need not have run: ranks execute steps in the order of issue, so any step that reads the block is
executed after the one that writes it. Within one step there is no such order; therefore blocks are `stage`d while a
plan is made and become visible by `commit` when the plan is complete. A block with an unknown token (a placeholder of a
step in flight) is never published, so the row of a request that turns out to have stopped publishes nothing.
"""

from __future__ import annotations

from lockstep.engine.block_hash import BlockHasher
from lockstep.engine.block_pool import BlockPool
from lockstep.engine.request import NEVER, Request


class KVManager:
    """Gives blocks to requests and takes them back. A request's `block_ids` is written here only."""

    def __init__(self, num_blocks: int, block_size: int, enable_caching: bool = True, seed: int = 0) -> None:
        self.pool = BlockPool(num_blocks)
        self.block_size = block_size
        self.enable_caching = enable_caching
        self._hasher = BlockHasher(block_size, seed)
        self._staged: dict[bytes, int] = {}
        self.query_tokens = 0
        self.hit_tokens = 0

    def blocks_for(self, num_tokens: int) -> int:
        """Blocks that hold this many tokens."""
        return -(-num_tokens // self.block_size)

    def find_cached(self, request: Request) -> list[int]:
        """The cached blocks a waiting request can start from. At least its last token is left to compute."""
        if not self.enable_caching or not request.reads_cache:
            return []
        return self.pool.lookup(self._names(request, (len(request.token_ids) - 1) // self.block_size))

    def is_coming(self, request: Request, num_cached_blocks: int) -> bool:
        """Whether the first block that `request` misses is being computed by the plan in the making."""
        if not self._staged or not request.reads_cache:
            return False
        names = self._names(request, (len(request.token_ids) - 1) // self.block_size)
        return num_cached_blocks < len(names) and names[num_cached_blocks] in self._staged

    def num_free_after(self, request: Request, cached: list[int]) -> int:
        """Free blocks that would be left once `request` held all of its known tokens, `cached` included. May be negative."""
        new = self.blocks_for(request.total) - len(cached)
        return self.pool.num_free - self.pool.num_unreferenced(cached) - new

    def admit(self, request: Request, cached: list[int], end: int) -> None:
        """Give a starting request its cached blocks, and new ones up to token `end`. The caller has checked that they fit."""
        assert not request.block_ids, f"request {request.request_id!r} starts with blocks"
        self.pool.share(cached)
        new = self.pool.allocate(self.blocks_for(end) - len(cached))
        assert new is not None, f"request {request.request_id!r} admitted without room"
        request.block_ids = cached + new
        request.num_computed = len(cached) * self.block_size
        request.next_publish = request.num_computed + self.block_size if self.enable_caching else NEVER
        if self.enable_caching and request.reads_cache:
            self.query_tokens += len(request.token_ids)
            self.hit_tokens += request.num_computed

    def extend(self, request: Request, end: int) -> list[int] | None:
        """Give a running request blocks up to token `end`: the new ones, or None when there are not enough."""
        new = self.pool.allocate(self.blocks_for(end) - len(request.block_ids))
        if new:
            request.block_ids += new
        return new

    def stage(self, request: Request, end: int) -> None:
        """Note the full blocks of known tokens that the plan in the making completes by computing up to `end`."""
        full = min(end, len(request.token_ids)) // self.block_size
        names = self._names(request, full)
        for i in range(request.next_publish // self.block_size - 1, full):
            self._staged.setdefault(names[i], request.block_ids[i])
        request.next_publish = (full + 1) * self.block_size

    def commit(self) -> None:
        """The plan is complete and will be issued: what it computes can be shared from the next plan on."""
        for name, block in self._staged.items():
            self.pool.publish(block, name)
        self._staged.clear()

    def release(self, request: Request, poisoned: bool = False) -> None:
        """Take back all blocks at once. The next plan may reuse them: ranks run it after every plan that uses them now.

        poisoned: nobody may find their contents from now on (the request failed in computing them).
        """
        if poisoned:
            for block in request.block_ids:
                self.pool.unpublish(block)
        self.pool.release(request.block_ids)
        request.block_ids = []
        request.num_computed = 0
        request.next_publish = NEVER

    def _names(self, request: Request, count: int) -> list[bytes]:
        """The names of the first `count` blocks, which must be full of known tokens."""
        names, size = request.block_hashes, self.block_size
        while len(names) < count:
            at = len(names)
            parent = names[-1] if names else self._hasher.root(request.source.cache_salt)
            names.append(self._hasher.child(parent, request.token_ids[at * size : (at + 1) * size]))
        return names if len(names) == count else names[:count]
