"""The KV blocks of the device: who holds each, which are free, and which of them still hold a known prefix.

A block is in exactly one of three states:

    state   references   has a hash   where
    used    > 0          maybe        in the tables of that many requests
    cached  0            yes          free, but a request with the same prefix may take it back; reused oldest first
    blank   0            no           free, reused first
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence


class BlockPool:
    """Reference-counted blocks 0..num_blocks-1 with least-recently-used reuse of cached ones."""

    def __init__(self, num_blocks: int) -> None:
        assert num_blocks > 0, f"a pool of {num_blocks} blocks"
        self.num_blocks = num_blocks
        self.references = [0] * num_blocks
        self._hash_of: list[bytes | None] = [None] * num_blocks
        self._block_of: dict[bytes, int] = {}
        self._blank = list(range(num_blocks - 1, -1, -1))  # a stack: low numbers first
        self._cached: OrderedDict[int, None] = OrderedDict()  # oldest first

    @property
    def num_free(self) -> int:
        """Blocks that allocate() can give."""
        return len(self._blank) + len(self._cached)

    @property
    def num_used(self) -> int:
        """Blocks that some request holds."""
        return self.num_blocks - self.num_free

    def allocate(self, count: int) -> list[int] | None:
        """`count` blocks with one reference each, or None (and nothing changed) when fewer are free."""
        blank = self._blank
        if count > len(blank) + len(self._cached):
            return None
        blocks: list[int] = []
        for _ in range(count):
            block = blank.pop() if blank else self._evict()
            self.references[block] = 1
            blocks.append(block)
        return blocks

    def _evict(self) -> int:
        """Take the least recently used cached block and forget what it held."""
        block, _ = self._cached.popitem(last=False)
        self._forget(block)
        return block

    def share(self, blocks: Sequence[int]) -> None:
        """One more reference to each block, which is used or cached (found by `lookup`)."""
        for block in blocks:
            if self.references[block] == 0:
                del self._cached[block]
            self.references[block] += 1

    def release(self, blocks: Sequence[int]) -> None:
        """Give back one reference to each block of a table. The tail ages first: without its head it is of no use."""
        for block in reversed(blocks):
            left = self.references[block] - 1
            assert left >= 0, f"block {block} released more often than it was taken"
            self.references[block] = left
            if left == 0:
                if self._hash_of[block] is None:
                    self._blank.append(block)
                else:
                    self._cached[block] = None

    def publish(self, block: int, name: bytes) -> None:
        """Let `lookup` find `block` under `name`. Does nothing when another block already has that name."""
        assert self.references[block] > 0, f"block {block} published while free"
        if name not in self._block_of:
            assert self._hash_of[block] is None, f"block {block} published twice"
            self._block_of[name] = block
            self._hash_of[block] = name

    def unpublish(self, block: int) -> None:
        """Make a used block unknown again, so that it is never shared from now on."""
        assert self.references[block] > 0, f"block {block} unpublished while free"
        self._forget(block)

    def _forget(self, block: int) -> None:
        name, self._hash_of[block] = self._hash_of[block], None
        if name is not None:
            del self._block_of[name]

    def lookup(self, names: Sequence[bytes]) -> list[int]:
        """The blocks of the longest known run of `names`, from the first on. Changes nothing."""
        blocks: list[int] = []
        get = self._block_of.get
        for name in names:
            block = get(name)
            if block is None:
                break
            blocks.append(block)
        return blocks

    def num_unreferenced(self, blocks: Sequence[int]) -> int:
        """How many of `blocks` are free now, so that sharing them lowers num_free."""
        return sum(1 for block in blocks if self.references[block] == 0)

    def clear_cache(self) -> None:
        """Forget every prefix. Used blocks stay with their requests."""
        for block in list(self._block_of.values()):
            self._forget(block)
        self._blank.extend(self._cached)
        self._cached.clear()

    def check(self) -> None:
        """Assert every invariant. O(num_blocks): for tests."""
        blank = set(self._blank)
        assert len(blank) == len(self._blank), "a block is twice in the blank list"
        assert not blank & self._cached.keys(), "a block is both blank and cached"
        for block, count in enumerate(self.references):
            free = block in blank or block in self._cached
            assert free == (count == 0), f"block {block} has {count} references and is {'free' if free else 'not free'}"
            name = self._hash_of[block]
            assert name is None or self._block_of.get(name) == block, f"block {block} has a name that leads elsewhere"
            assert not (block in blank and name is not None), f"blank block {block} has a name"
            assert not (block in self._cached and name is None), f"cached block {block} has no name"
        assert len(self._block_of) == sum(name is not None for name in self._hash_of), "a name leads to a block without it"
        assert self.num_free + self.num_used == self.num_blocks
