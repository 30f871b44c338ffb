"""Tensor, expert, context and data parallelism on paper."""

from __future__ import annotations

import random
from fractions import Fraction

import pytest

from lockstep.cli import simulate_data
from lockstep.config.errors import ConfigError
from lockstep.distributed.partition import shards
from lockstep.planner.teach import context, data, experts, tp

np = pytest.importorskip("numpy")


@pytest.mark.parametrize("ranks", [1, 2, 3, 5, 8])
def test_the_all_reduce_rebuilds_the_product(ranks):
    result = tp.simulate(tp.Options(ranks=ranks, inner=11, seed=ranks))
    assert result.rebuilt and sum(result.weight_elements) == 2 * 4 * 11
    whole = dict(result.steps[0].matrices)
    x, a, b = (np.array(whole[name]) for name in "XAB")
    assert np.array_equal(np.array(whole["Z"]), np.maximum(x @ a, 0) @ b)
    assert all(rows == whole["Z"] for _, rows in result.steps[-1].matrices)
    assert "yes" in tp.report(result) and tp.picture(result).count(">rank ") == ranks


def test_a_rank_sees_its_own_run_only():
    """Whatever stands in the others' columns and rows, a rank's part stays the same."""
    rng = np.random.default_rng(0)
    x, a, b = rng.integers(-3, 4, (2, 4)), rng.integers(-3, 4, (4, 6)), rng.integers(-3, 4, (6, 4))
    cuts = shards(6, 2)
    changed_a, changed_b = a.copy(), b.copy()
    changed_a[:, cuts[1].start :] += 7
    changed_b[cuts[1].start :] += 7
    before, after = tp.multiply(x, a, b, cuts)[1], tp.multiply(x, changed_a, changed_b, cuts)[1]
    assert np.array_equal(before[0], after[0]) and not np.array_equal(before[1], after[1])


def test_a_layer_of_llama_70b_by_rank():
    """855,638,016 weights less two norms of 8192; at 16 ranks each of 8 KV heads is held twice."""
    one, two, _, eight, sixteen = tp.simulate(tp.Options()).layer
    assert one.total_bytes == 2 * (855_654_400 - 2 * 8192) and two.total_bytes * 2 == one.total_bytes == eight.total_bytes * 8
    assert (eight.kv_heads, sixteen.kv_heads) == (1, 1)
    assert sixteen.total_bytes - one.total_bytes / 16 == 8 * 2 * 2 * 8192 * 128 / 16


def test_replicas_go_to_the_expert_with_the_most_for_each():
    assert experts.replicate([10, 4, 1], 6) == [3, 2, 1]  # 10 -> 5; 5 -> 10/3; then 4 -> 2
    assert experts.pack([10, 4, 1, 1], [1, 1, 1, 1], 2) == [[0, 3], [1, 2]]
    load = [random.Random(1).randrange(1, 1000) for _ in range(32)]
    counts = experts.replicate(load, 48)
    assert sum(counts) == 48 and min(counts) >= 1
    most = max(one / n for one, n in zip(load, counts, strict=True))
    greedy_is_best = min(max(one / n for one, n in zip(load, other, strict=True)) for other in _neighbours(counts))
    assert most <= greedy_is_best


def _neighbours(counts):
    for a in range(len(counts)):
        for b in range(len(counts)):
            if a != b and counts[a] > 1:
                other = list(counts)
                other[a], other[b] = other[a] - 1, other[b] + 1
                yield other


@pytest.mark.parametrize("zipf", [0.5, 0.8, 1.2])
def test_spreading_the_popular_experts_pays(zipf):
    result = experts.simulate(experts.Options(zipf=zipf, tokens=512))
    in_order, packed, replicas = (p.max_over_mean for p in result.placed)
    assert in_order > packed > replicas >= 1
    assert sum(result.seen) == sum(result.later) == 512 * 4 and max(result.seen) <= 512
    for placed in result.placed:
        assert sum(placed.rank_tokens) == pytest.approx(512 * 4)
        assert {expert for held in placed.slots for expert in held} == set(range(64))
        assert len({len(held) for held in placed.slots}) == 1


def test_nothing_to_spread_without_skew():
    result = experts.simulate(experts.Options(zipf=0, tokens=1024, redundant=0))
    assert result.placed[0].max_over_mean < 1.1
    assert "popular as 1/k^0" in experts.report(result)


@pytest.mark.parametrize("ranks", [1, 2, 3, 7, 12])
def test_the_merge_is_exact(ranks):
    result = context.simulate(context.Options(ranks=ranks, seed=ranks))
    assert result.merged == result.whole and all(isinstance(value, Fraction) for value in result.whole)
    assert result.float_error < 1e-14 and result.order_error < 1e-14
    assert "yes" in context.report(result)


def test_a_merge_without_the_weights_is_wrong():
    result = context.simulate(context.Options())
    mean = tuple(sum(part.output[d] for part in result.parts) / len(result.parts) for d in range(3))
    assert mean != result.whole


def test_context_counts():
    """Llama 70B at TP 8: one KV head of 128 in 80 layers, 40,960 bytes a token and rank; 131,072 tokens are 5 GiB."""
    one, two, four, *_ = context.simulate(context.Options()).shares
    assert (one.kv_bytes, two.kv_bytes, four.kv_bytes) == (5 << 30, 5 << 29, 5 << 28)
    assert one.decode_bytes == 0 and two.decode_bytes == 8 * (256 + 4) * 80 // 2
    assert four.prefill_kv_bytes == 3 * four.kv_bytes and two.prefill_merge_bytes == 2048 * two.decode_bytes


@pytest.fixture(scope="module")
def routed():
    return {x.policy: x for x in simulate_data.simulate(data.Options(requests=800)).outcomes}


def test_looking_at_loads_beats_taking_turns(routed):
    assert routed["shortest_queue"].max_over_mean < routed["power_of_two"].max_over_mean * 1.05
    assert routed["power_of_two"].max_over_mean < routed["round_robin"].max_over_mean
    assert routed["shortest_queue"].ttft_p99_s < routed["round_robin"].ttft_p99_s


def test_affinity_finds_prefixes_and_its_bound_keeps_the_balance(routed):
    bound, none, blind = routed["prefix_affine"], routed["prefix_unbounded"], routed["shortest_queue"]
    assert blind.hit_share < bound.hit_share < none.hit_share
    assert none.max_over_mean > 1.5 * bound.max_over_mean and none.ttft_p99_s > bound.ttft_p99_s


def test_old_knowledge_makes_a_herd_of_the_shortest_queue(routed):
    options = data.Options(requests=800, stale_ms=200)
    load = data.requests(options)
    stale = {name: data.route(name, simulate_data.POLICIES[name](0), load, options) for name in ("shortest_queue", "power_of_two")}
    assert stale["shortest_queue"].max_over_mean > stale["power_of_two"].max_over_mean > routed["power_of_two"].max_over_mean
    assert stale["shortest_queue"].ttft_p99_s > stale["power_of_two"].ttft_p99_s


def test_a_replica_counts_what_it_carries():
    replica = data.Replica()
    wait, hit = replica.take(data.Request(0.0, 0, 1000, 1000, 10), keep=1)
    assert (wait, hit) == (2000 / data.TOKENS_PER_S, 0)
    assert replica.look(0.0) == data.View(2000, 0, 1)
    assert replica.look(wait) == data.View(0, 2010, 1)
    assert replica.look(wait + 10 * data.TOKEN_S) == data.View(0, 0, 0)
    assert replica.take(data.Request(1.0, 0, 1000, 500, 10), keep=1)[1] == 1000
    assert replica.take(data.Request(1.0, 1, 1000, 500, 10), keep=1)[1] == 0


@pytest.mark.parametrize(
    ("module", "wrong"),
    [
        (tp, {"ranks": 7, "inner": 6}), (tp, {"tokens": 0}), (tp, {"sizes": "0"}), (experts, {"ranks": 7}), (experts, {"topk": 0}),
        (experts, {"redundant": 3}), (context, {"tokens": 0}), (context, {"ranks": 13}), (context, {"context": 0}),
        (simulate_data, {"load": 0}), (simulate_data, {"requests": 1}),
    ],
)  # fmt: skip
def test_impossible_settings_are_refused_by_name(module, wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        module.simulate(module.Options(**wrong))
