"""The KV blocks: allocation, sharing, reuse in order of age, and names."""

from __future__ import annotations

import subprocess
import sys

import pytest

from lockstep.engine.block_hash import BlockHasher
from lockstep.engine.block_pool import BlockPool


def names(count: int) -> list[bytes]:
    return [bytes([i]) * 16 for i in range(count)]


def test_all_blocks_can_be_taken_once_and_no_more():
    pool = BlockPool(4)
    assert sorted(pool.allocate(4)) == [0, 1, 2, 3]
    assert pool.allocate(1) is None
    assert (pool.num_free, pool.num_used) == (0, 4)
    pool.check()


def test_a_refused_allocation_takes_nothing():
    pool = BlockPool(4)
    pool.allocate(2)
    assert pool.allocate(3) is None
    assert pool.num_free == 2
    pool.check()


def test_a_shared_block_is_free_only_after_its_last_holder():
    pool = BlockPool(2)
    (block,) = pool.allocate(1)
    pool.share([block])
    pool.release([block])
    assert pool.num_free == 1
    pool.release([block])
    assert pool.num_free == 2
    pool.check()


def test_releasing_too_often_is_our_fault():
    pool = BlockPool(1)
    blocks = pool.allocate(1)
    pool.release(blocks)
    with pytest.raises(AssertionError, match="released more often"):
        pool.release(blocks)


def test_lookup_finds_the_longest_run_and_stops_at_a_gap():
    pool, (a, b, c) = BlockPool(8), names(3)
    blocks = pool.allocate(2)
    pool.publish(blocks[0], a)
    pool.publish(blocks[1], c)
    assert pool.lookup([a, b, c]) == [blocks[0]]
    assert pool.lookup([b, a]) == []
    assert pool.lookup([a, c]) == blocks


def test_a_freed_block_with_a_name_is_found_until_it_is_reused():
    pool, (a,) = BlockPool(2), names(1)
    blocks = pool.allocate(2)
    pool.publish(blocks[0], a)
    pool.release(blocks)
    assert pool.lookup([a]) == [blocks[0]]
    assert pool.allocate(1) == [blocks[1]], "a blank block is reused before one that holds a prefix"
    assert pool.lookup([a]) == [blocks[0]]
    pool.allocate(1)
    assert pool.lookup([a]) == []
    pool.check()


def test_cached_blocks_are_reused_oldest_first_and_tails_before_heads():
    pool, (a, b, c) = BlockPool(3), names(3)
    first, second = pool.allocate(2), pool.allocate(1)
    for block, name in zip(first + second, (a, b, c), strict=True):
        pool.publish(block, name)
    pool.release(first)
    pool.release(second)
    assert [pool.allocate(1)[0] for _ in range(3)] == [first[1], first[0], second[0]]


def test_sharing_a_cached_block_makes_it_the_youngest_when_freed_again():
    pool, (a, b) = BlockPool(2), names(2)
    blocks = pool.allocate(2)
    pool.publish(blocks[0], a)
    pool.publish(blocks[1], b)
    pool.release([blocks[0]])
    pool.release([blocks[1]])
    pool.share([blocks[0]])
    pool.release([blocks[0]])
    assert pool.allocate(1) == [blocks[1]]
    assert pool.lookup([a]) == [blocks[0]]


def test_the_first_block_keeps_a_name_that_two_have_earned():
    pool, (a,) = BlockPool(2), names(1)
    blocks = pool.allocate(2)
    pool.publish(blocks[0], a)
    pool.publish(blocks[1], a)
    assert pool.lookup([a]) == [blocks[0]]
    pool.release(blocks)
    pool.check()


def test_unpublish_hides_a_block_and_leaves_it_with_its_holder():
    pool, (a,) = BlockPool(1), names(1)
    blocks = pool.allocate(1)
    pool.publish(blocks[0], a)
    pool.unpublish(blocks[0])
    assert pool.lookup([a]) == []
    assert pool.num_used == 1
    pool.release(blocks)
    pool.check()


def test_clear_cache_forgets_free_and_used_prefixes():
    pool, (a, b) = BlockPool(3), names(2)
    blocks = pool.allocate(2)
    pool.publish(blocks[0], a)
    pool.publish(blocks[1], b)
    pool.release([blocks[1]])
    pool.clear_cache()
    assert pool.lookup([a]) == pool.lookup([b]) == []
    assert pool.num_free == 2
    pool.check()


@pytest.mark.parametrize("field", ["references", "_blank", "_hash_of", "_block_of"])
def test_check_notices_damage(field):
    pool, (a,) = BlockPool(3), names(1)
    pool.publish(pool.allocate(1)[0], a)
    pool.check()
    damage = {
        "references": lambda: pool.references.__setitem__(0, 0),
        "_blank": lambda: pool._blank.append(0),
        "_hash_of": lambda: pool._hash_of.__setitem__(1, a),
        "_block_of": pool._block_of.clear,
    }
    damage[field]()
    with pytest.raises(AssertionError):
        pool.check()


def test_names_depend_on_every_token_before_on_salt_on_seed_and_on_block_size():
    def name(tokens: list[int], salt: str | None = None, seed: int = 0, size: int = 2) -> bytes:
        hasher = BlockHasher(size, seed)
        parent = hasher.root(salt)
        for i in range(0, len(tokens), size):
            parent = hasher.child(parent, tokens[i : i + size])
        return parent

    tokens = [1, 2, 3, 4]
    variants = [
        name(tokens),
        name([9, 2, 3, 4]),
        name([1, 2, 3, 9]),
        name([3, 4, 1, 2]),
        name(tokens[2:]),
        name(tokens, salt=""),
        name(tokens, salt="tenant"),
        name(tokens, seed=1),
        name(tokens, size=4),
    ]
    assert len(set(variants)) == len(variants)
    assert name(tokens) == name(list(tokens))
    assert len(variants[0]) == 16


def test_names_are_the_same_in_every_process():
    code = "from lockstep.engine.block_hash import BlockHasher as B; h = B(3, 7); print(h.child(h.root('s'), [1, 2, 3]).hex())"
    here = BlockHasher(3, 7)
    for hash_seed in ("0", "1"):
        env = {"PYTHONHASHSEED": hash_seed, "PYTHONPATH": ":".join(sys.path)}
        ran = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True, timeout=60, check=True)
        assert ran.stdout.strip() == here.child(here.root("s"), [1, 2, 3]).hex()
