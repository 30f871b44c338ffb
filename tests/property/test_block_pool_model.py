"""The block pool against the plainest model of it: a dict of holders and a list of ages."""

from __future__ import annotations

from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from lockstep.engine.block_pool import BlockPool

NAMES = [bytes([i]) * 16 for i in range(8)]


class PoolMachine(RuleBasedStateMachine):
    """Tables take, share, publish and release blocks in any order."""

    @initialize(size=st.integers(1, 8))
    def start(self, size: int) -> None:
        self.pool, self.size = BlockPool(size), size
        self.tables: list[list[int]] = []
        self.name_of: dict[int, bytes] = {}
        self.cached: list[int] = []  # free blocks with a name, oldest first

    def holders(self, block: int) -> int:
        return sum(table.count(block) for table in self.tables)

    @property
    def free(self) -> set[int]:
        return {b for b in range(self.size) if not self.holders(b)}

    @rule(count=st.integers(0, 9))
    def allocate(self, count: int) -> None:
        free = self.free
        blocks = self.pool.allocate(count)
        if count > len(free):
            assert blocks is None
            return
        assert len(set(blocks)) == count and set(blocks) <= free
        reused = [b for b in blocks if b in self.name_of]
        assert reused == self.cached[: max(0, count - (len(free) - len(self.cached)))], "not the blank ones first, then the oldest"
        for block in reused:
            self.cached.remove(block)
            del self.name_of[block]
        self.tables.append(blocks)

    @precondition(lambda self: self.tables)
    @rule(data=st.data())
    def release(self, data: st.DataObject) -> None:
        table = self.tables.pop(data.draw(st.integers(0, len(self.tables) - 1)))
        self.pool.release(table)
        self.cached += [b for b in reversed(table) if not self.holders(b) and b in self.name_of]

    @precondition(lambda self: any(self.tables))
    @rule(data=st.data(), name=st.sampled_from(NAMES))
    def publish(self, data: st.DataObject, name: bytes) -> None:
        block = data.draw(st.sampled_from(sorted({b for table in self.tables for b in table})))
        if block in self.name_of:
            return
        self.pool.publish(block, name)
        if name not in self.name_of.values():
            self.name_of[block] = name

    @rule(wanted=st.lists(st.sampled_from(NAMES), max_size=4, unique=True))
    def share_what_is_found(self, wanted: list[bytes]) -> None:
        by_name = {name: block for block, name in self.name_of.items()}
        expected = []
        for name in wanted:
            if name not in by_name:
                break
            expected.append(by_name[name])
        found = self.pool.lookup(wanted)
        assert found == expected
        assert self.pool.num_unreferenced(found) == sum(1 for b in found if b in self.cached)
        self.pool.share(found)
        self.cached = [b for b in self.cached if b not in found]
        self.tables.append(found)

    @precondition(lambda self: any(self.tables))
    @rule(data=st.data())
    def unpublish(self, data: st.DataObject) -> None:
        block = data.draw(st.sampled_from(sorted({b for table in self.tables for b in table})))
        self.pool.unpublish(block)
        self.name_of.pop(block, None)

    @invariant()
    def consistent(self) -> None:
        if hasattr(self, "pool"):
            self.pool.check()
            assert self.pool.num_free == len(self.free)
            assert self.pool.references == [self.holders(b) for b in range(self.size)]


PoolMachine.TestCase.settings = settings(deadline=None, max_examples=100, stateful_step_count=40)
TestPoolMachine = PoolMachine.TestCase
