"""Routing by example: which replica, which error, and what the router's books say."""

from __future__ import annotations

import pytest

from lockstep.cluster.balance import (
    SLACK_TOKENS,
    ReplicaLoad,
    explicit,
    prefix_affine,
    round_robin,
    shortest_queue,
    sticky,
)
from lockstep.cluster.errors import RoutingError
from lockstep.cluster.load_book import LoadBook
from lockstep.cluster.prefix_index import PrefixIndex


def loads(*tokens: int, down: tuple[int, ...] = ()) -> list[ReplicaLoad]:
    return [ReplicaLoad(i, i not in down, waiting_tokens=t // 2, running_tokens=t - t // 2) for i, t in enumerate(tokens)]


def test_round_robin_goes_round_the_routable():
    assert [round_robin(loads(9, 9, 9, 9, down=(1,)), start) for start in range(5)] == [0, 2, 2, 3, 0]


def test_shortest_queue():
    assert shortest_queue(loads(30, 10, 20)) == 1
    assert shortest_queue(loads(30, 10, 20, down=(1,))) == 2
    waiting_is_dear = [ReplicaLoad(0, waiting_tokens=10), ReplicaLoad(1, running_tokens=30)]
    assert shortest_queue(waiting_is_dear) == 0
    assert shortest_queue(waiting_is_dear, cost=lambda load: 4 * load.waiting_tokens + load.running_tokens) == 1


def test_shortest_queue_breaks_ties_by_requests_then_in_turn():
    equal = loads(10, 10, 10)
    equal[0].requests = 2
    assert [shortest_queue(equal, start=start) for start in range(4)] == [1, 1, 2, 1]


def test_prefix_affine_follows_the_prefix_up_to_the_bound():
    base = 100_000
    within, over = base + int(0.05 * base), base + int(0.1 * base)
    assert prefix_affine(loads(base, within, base), [0, 64, 32], bound=0.06) == 1
    assert prefix_affine(loads(base, over, base), [0, 64, 32], bound=0.06) == 2  # the next longest
    assert prefix_affine(loads(base, over, base - 1), [0, 64, 0], bound=0.06) == 2  # none within: the shortest queue
    assert prefix_affine(loads(base, base - 5, base - 9), [64, 64, 0]) == 1  # equal matches
    assert prefix_affine(loads(base, base, base, down=(1,)), [0, 64, 32]) == 2


def test_an_idle_cluster_is_never_out_of_balance():
    assert prefix_affine(loads(0, SLACK_TOKENS, 0), [0, 64, 0]) == 1
    assert prefix_affine(loads(0, SLACK_TOKENS + 1, 0), [0, 64, 0]) == 0


def test_sticky_is_the_same_in_every_process():
    assert [sticky(f"session {i}", loads(*[0] * 8)) for i in range(10)] == [1, 7, 1, 0, 2, 1, 1, 0, 1, 3]


def test_sticky_moves_on_over_the_bound_and_comes_back():
    even = loads(*[50_000] * 8)
    home = sticky("a", even)
    even[home].waiting_tokens += 50_000
    second = sticky("a", even)
    assert second != home
    even[home].routable = False
    assert sticky("a", even) == second  # next in the same order, whatever the reason
    even[home].routable, even[home].waiting_tokens = True, 25_000
    assert sticky("a", even) == home


def test_explicit():
    assert explicit(2, loads(0, 0, 10**9)) == explicit(2, loads(0, 0, 0, down=(2,))) == 2
    gone = loads(0, 0, 0, down=(1, 2))
    gone[1].given_up = True
    with pytest.raises(RoutingError, match=r"data_parallel_rank=1 takes no requests any more: .* given up\. Name one of 0, 2, or none"):
        explicit(1, gone)
    with pytest.raises(RoutingError, match=r"data_parallel_rank=3 does not exist: the replicas are 0 to 2\. Name one"):
        explicit(3, loads(0, 0, 0))
    for load in gone:
        load.given_up = True
    with pytest.raises(RoutingError, match=r"data_parallel_rank=0 .*So were all others"):
        explicit(0, gone)
    assert issubclass(RoutingError, ValueError)


@pytest.mark.parametrize("policy", [round_robin, shortest_queue, lambda x: prefix_affine(x, [1, 1]), lambda x: sticky("a", x)])
def test_no_routable_replica(policy):
    with pytest.raises(RoutingError, match=r"0 of 2 replicas take requests.*Try again"):
        policy(loads(0, 0, down=(0, 1)))


def test_prefix_index():
    index = PrefixIndex(4, block_size=4)
    prompt = list(range(14))
    for replica, length in enumerate((14, 8, 11)):
        index.insert(prompt[:length], replica)
    assert index.matches(prompt) == [12, 8, 8, 0]
    assert index.matches(prompt[:7]) == [4, 4, 4, 0]
    assert index.matches([99, *prompt]) == index.matches([]) == [0, 0, 0, 0]
    assert index.matches([*prompt[:4], 99, *prompt[5:]]) == [4, 4, 4, 0]  # later blocks are other blocks
    index.forget(0)
    assert index.matches(prompt) == [0, 8, 8, 0]


def test_prefix_index_forgets_what_is_not_used():
    index = PrefixIndex(1, block_size=1, blocks_per_replica=8)
    for i in range(40):
        index.insert([1000], 0)
        index.insert([i], 0)
        assert len(index) <= 9
    assert index.matches([1000]) == [1]
    assert index.matches([0]) == [0]
    assert index.matches([39]) == [1]


def test_prefix_index_forgets_a_replica_in_both_generations():
    index = PrefixIndex(2, block_size=1, blocks_per_replica=4)
    for i in range(5):  # a generation is 4 uses
        index.insert([i], i % 2)
    assert [index.matches([i]) for i in range(5)] == [[1, 0], [0, 1], [1, 0], [0, 1], [1, 0]]
    index.forget(0)
    assert [index.matches([i]) for i in range(5)] == [[0, 0], [0, 1], [0, 0], [0, 1], [0, 0]]


def test_prefix_index_looks_at_the_first_blocks_only():
    index = PrefixIndex(1, block_size=2, max_blocks=3)
    index.insert(range(20), 0)
    assert index.matches(range(20)) == [6]
    with pytest.raises(ValueError, match="block_size=0 must be at least 1"):
        PrefixIndex(1, block_size=0)


def seen(book: LoadBook, replica: int = 0) -> tuple[int, int, int]:
    load = book.loads[replica]
    return load.waiting_tokens, load.running_tokens, load.requests


def test_book_follows_a_request():
    book = LoadBook(2)
    assert [book.start("a", 0, 100, expected_tokens=20, cached_tokens=30), book.start("b", 0, 10), book.start("c", 1, 1)] == [1, 2, 1]
    assert seen(book) == (80, 50, 2)
    book.progress("a", 100, 5)
    assert seen(book) == (10, 120, 2)
    book.progress("a", 60, 2)  # an old message
    assert seen(book) == (10, 120, 2)
    book.progress("a", 100, 30)  # more than expected
    assert seen(book) == (10, 130, 2)
    book.finish("a", 31)
    book.finish("a", 31)
    book.progress("a", 1, 1)
    assert seen(book) == (10, 0, 1)
    book.finish("b")
    assert seen(book) == (0, 0, 0) and len(book) == 1


def test_a_report_counts_nothing_twice():
    book = LoadBook(1)
    book.start("a", 0, 100)
    book.reconcile(0, 40, 60, requests=1)  # it computed 60, and we have not heard
    assert seen(book) == (40, 60, 1)
    book.progress("a", 60, 0)
    assert seen(book) == (40, 60, 1)
    book.reconcile(0, 0, 115, requests=1)
    book.progress("a", 100, 10)
    assert seen(book) == (0, 115, 1)
    book.finish("a", 18)
    assert seen(book) == (0, 0, 0)


def test_a_report_adds_what_is_on_its_way():
    book = LoadBook(1)
    book.start("a", 0, 100)
    late = book.start("b", 0, 70, cached_tokens=20)
    book.reconcile(0, 90, 10, requests=1, newest_ticket=late - 1)
    assert seen(book) == (140, 30, 2)
    book.reconcile(0, 90, 10, requests=1)  # without the ticket: everything was counted, so one end was lost
    assert seen(book) == (90, 10, 1) and len(book) == 1


def test_lost_messages_do_not_drift():
    book = LoadBook(1)
    for i in range(100):  # no end ever arrives
        ticket = book.start(f"r{i}", 0, 50, expected_tokens=10)
        book.reconcile(0, 0, 0, requests=0, newest_ticket=ticket)
    assert seen(book) == (0, 0, 0) and len(book) == 0


def test_a_request_that_never_arrived():
    book = LoadBook(1)
    book.start("a", 0, 100)
    book.start("lost", 0, 70)
    book.reconcile(0, 100, 0, requests=1, newest_ticket=1)
    assert seen(book) == (170, 0, 2)  # it may be on its way
    book.reconcile(0, 90, 10, requests=1, newest_ticket=1)
    assert seen(book) == (90, 10, 1) and len(book) == 1  # no longer


def test_a_dead_replica_carries_nothing():
    book = LoadBook(2)
    book.start("a", 0, 10, 10)
    book.reconcile(0, 500, 500, requests=7)
    book.set_routable(0, False)
    book.forget(0)
    assert seen(book) == (0, 0, 0) and not book.loads[0].routable and len(book) == 0
    assert book.start("a", 0, 10) == 2  # the id is free again, and tickets count on


def test_book_refuses():
    book = LoadBook(1)
    book.start("a", 0, 1)
    with pytest.raises(ValueError, match="'a' was started already"):
        book.start("a", 0, 1)
    with pytest.raises(ValueError, match="prompt_tokens=5, cached_tokens=6"):
        book.start("b", 0, 5, cached_tokens=6)
    with pytest.raises(ValueError, match="waiting_tokens=-1"):
        book.reconcile(0, -1, 0)
    with pytest.raises(ValueError, match="replicas=0"):
        LoadBook(0)
