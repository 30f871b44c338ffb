"""Kernels and collectives: what must hold of any price."""

from dataclasses import replace
from itertools import pairwise

import pytest

from lockstep.planner import catalogue, collectives, ops
from lockstep.planner.hardware import Cluster, Link, make_cluster


@pytest.fixture(scope="module")
def h100():
    return catalogue.device_shipped("H100")


@pytest.fixture(scope="module")
def two_nodes():
    return make_cluster(catalogue.device_shipped("H100"), 2)


@pytest.mark.parametrize("window", [None, 1, 3, 8, 100])
def test_attended_pairs_are_those_of_the_mask(window):
    for context in (0, 1, 5, 9):
        for tokens in (1, 2, 7):
            mask = [(q, k) for q in range(context, context + tokens) for k in range(q + 1) if window is None or q - k < window]
            assert ops.attended_pairs(tokens, context, window) == len(mask)


def test_active_experts():
    assert ops.active_experts(8, 2, 1) == pytest.approx(2)
    assert ops.active_experts(8, 2, 2) == pytest.approx(8 * (1 - 0.75**2))
    assert ops.active_experts(128, 8, 10_000) == pytest.approx(128)
    assert ops.active_experts(4, 4, 3) == 4


def test_more_work_takes_longer(h100, two_nodes):
    for price in (
        lambda x: ops.gemm_s(h100, x, 4096, 4096),
        lambda x: ops.prefill_attention_s(h100, 1, x, 32, 8, 128),
        lambda x: ops.decode_attention_s(h100, x, 1000, 32, 8, 128),
        lambda x: ops.decode_attention_s(h100, 8, x, 32, 8, 128),
        lambda x: ops.moe_s(h100, x, 4096, 1536, 128, 8),
        lambda x: ops.elementwise_s(h100, x),
        lambda x: collectives.all_reduce_s(two_nodes, 8, 1, x),
        lambda x: collectives.all_reduce_s(two_nodes, 8, 2, x),
        lambda x: collectives.all_gather_s(two_nodes, 8, 2, x),
        lambda x: collectives.reduce_scatter_s(two_nodes, 4, 1, x),
        lambda x: collectives.all_to_all_s(two_nodes, 8, 2, x),
        lambda x: collectives.p2p_s(two_nodes, x),
        lambda x: collectives.p2p_s(two_nodes, x, "between"),
        lambda x: collectives.dispatch_s(two_nodes, 8, 2, x, 7168, 8),
        lambda x: collectives.combine_s(two_nodes, 8, 2, x, 7168, 8),
    ):
        seconds = [price(2**i) for i in range(0, 24, 2)]
        assert all(0 < a <= b * (1 + 1e-12) for a, b in pairwise(seconds)), seconds  # samples that were pooled are equal but for rounding


def test_nothing_costs_nothing(h100, two_nodes):
    assert ops.gemm_s(h100, 0, 10, 10) == 0
    assert ops.prefill_attention_s(h100, 1, 0, 8, 8, 128) == 0
    assert ops.decode_attention_s(h100, 0, 10, 8, 8, 128) == 0
    assert ops.moe_s(h100, 0, 10, 10, 8, 2) == 0
    assert collectives.all_reduce_s(two_nodes, 1, 1, 1 << 20) == 0
    assert collectives.all_gather_s(two_nodes, 8, 1, 0) == 0


def test_a_window_is_never_dearer(h100):
    for context in (0, 1000, 100_000):
        narrow = ops.prefill_attention_s(h100, 1, 512, 64, 8, 64, context, window=128)
        assert narrow <= ops.prefill_attention_s(h100, 1, 512, 64, 8, 64, context)
        assert ops.decode_attention_s(h100, 8, context, 64, 8, 64, window=128) <= ops.decode_attention_s(h100, 8, context, 64, 8, 64)


def test_weights_stored_narrow_are_read_faster(h100):
    assert ops.gemm_s(h100, 1, 8192, 8192, "bfloat16", "int8") < ops.gemm_s(h100, 1, 8192, 8192)


def test_skewed_routing_costs_more_across_ranks(h100):
    even = ops.moe_s(h100, 8192, 4096, 1536, 128, 8, ep=8, routing="balanced")
    assert ops.moe_s(h100, 8192, 4096, 1536, 128, 8, ep=8, routing="skewed") > even


def test_crossing_nodes_is_dearer_and_two_levels_add_up(two_nodes):
    for size in (1 << 14, 1 << 20, 1 << 26):
        inside = collectives.all_reduce_s(two_nodes, 8, 1, size)
        across = collectives.all_reduce_s(two_nodes, 8, 2, size)
        assert across > inside
        ring = collectives.ring_s(two_nodes.inter, 2, size / 8, 2)
        halves = collectives.reduce_scatter_s(two_nodes, 8, 1, size) + collectives.all_gather_s(two_nodes, 8, 1, size)
        assert across == pytest.approx(ring + halves)


def test_a_better_fabric_shows(two_nodes):
    better = two_nodes.with_links(inter=Link(1e-6, 1e-6, 450e9))
    assert collectives.all_reduce_s(better, 8, 2, 1 << 24) < collectives.all_reduce_s(two_nodes, 8, 2, 1 << 24)
    wider = two_nodes.with_links(intra=Link(1e-6, 1e-7, 900e9))
    assert collectives.all_reduce_s(wider, 8, 1, 1 << 28) < collectives.all_reduce_s(two_nodes, 8, 1, 1 << 28)


def test_the_bare_link_is_the_ring_of_the_text_book():
    link = Link(3e-6, 2e-6, 1e11)
    assert collectives.ring_s(link, 4, 1e6, 2) == pytest.approx(3e-6 + 6 * 2e-6 + 2 * 3 / 4 * 1e6 / 1e11)


def test_where_all_reach_all_small_messages_need_no_ring():
    """Devices without constants of their own: one step for small messages, the ring's traffic for large ones."""
    device = replace(catalogue.device_shipped("H100"), collectives={})
    bare = Cluster(16, 8, device, Link(3e-6, 2e-6, 1e11), Link(5e-6, 10e-6, 4e10))
    one, two = collectives.direct_s(bare.intra, 8, 1024.0)
    assert collectives.all_reduce_s(bare, 8, 1, 1024.0) == one < two < collectives.ring_s(bare.intra, 8, 1024.0, 2)
    large = 1e9
    assert collectives.all_reduce_s(bare, 8, 1, large) == pytest.approx(collectives.ring_s(bare.intra, 8, large, 2), rel=0.01)
    assert collectives.across_s(bare.inter, 16, 1024.0) < collectives.ring_s(bare.inter, 16, 1024.0, 2), "a tree"
    assert collectives.across_s(bare.inter, 16, large) == collectives.ring_s(bare.inter, 16, large, 2)


def test_exchanges_of_experts_follow_the_fabric_and_the_kernel(two_nodes):
    few = collectives.dispatch_s(two_nodes, 8, 2, 128, 7168, 8)
    assert few == pytest.approx(collectives.measured_s(two_nodes.device, "deepep_dispatch", 2, 128 * 7168 * 8.0))
    many = [collectives.dispatch_s(two_nodes, 8, 2, 4096, 7168, 8, mode) for mode in ("low_latency", "normal")]
    assert many[1] < many[0], "many tokens have kernels of their own"
    slow = two_nodes.with_links(inter=Link(1e-3, 1e-3, 1e9))
    assert collectives.dispatch_s(slow, 8, 2, 128, 7168, 8) > 2 * few


@pytest.mark.parametrize("size", [1 << 16, 1 << 25])
@pytest.mark.parametrize("name", ["8xH100", "8xL40S"])
def test_a_number_of_ranks_that_was_not_measured_lies_between_those_that_were(name: str, size: int) -> None:
    cluster = catalogue.cluster(name)
    seconds = {n: collectives.all_reduce_s(cluster, n, 1, size) for n in range(2, 9)}
    for below, between, above in ((2, (3,), 4), (4, (5, 6, 7), 8)):
        low, high = sorted((seconds[below], seconds[above]))
        assert all(low <= seconds[n] <= high for n in between)
        line = [seconds[n] for n in (below, *between, above)]
        assert line in (sorted(line), sorted(line, reverse=True)), "one way from one to the other"
