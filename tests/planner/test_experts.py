"""Experts over many ranks: each works on what it is sent, exchanges follow the fabric, and published runs are near."""

from dataclasses import replace
from itertools import pairwise

import pytest

from lockstep.planner import catalogue, collectives, ops, plan
from lockstep.planner.catalogue import cluster
from lockstep.planner.entry import from_entry
from lockstep.planner.find import find_model
from lockstep.planner.hardware import make_cluster
from lockstep.planner.layer import Setting, Work
from lockstep.planner.layout import Layout
from lockstep.planner.step import Pricer

H100 = catalogue.device_shipped("H100")
V3 = find_model("deepseek-v3")[0]
# LMSYS, "Deploying DeepSeek with PD disaggregation and large-scale expert parallelism on 96 H100 GPUs", 2025-05-05: tokens per
# second of a node, prompts of 2000 tokens; prompts on 4 nodes (EP=32), decode on 9 (EP=72), 256 requests a device.
PUBLISHED_PREFILL, PUBLISHED_DECODE = 52_300, 22_300
# deepseek-ai/DeepEP, docs/legacy.md: us of a low-latency exchange of 128 tokens on H800, by nodes: (dispatch, combine)
PUBLISHED_EXCHANGE = {1: (77, 114), 2: (118, 195), 4: (155, 273), 8: (173, 314), 16: (192, 369), 32: (194, 360)}


def exchange(nodes, tokens=128, mode="low_latency", on=None, ranks=8):
    machines = on or make_cluster(H100, nodes)
    return [price(machines, ranks, nodes, tokens, 7168, 8, mode) for price in (collectives.dispatch_s, collectives.combine_s)]


def test_a_rank_that_is_sent_its_rows_does_not_pass_over_those_of_others():
    shape = (7168, 2048, 256, 8)
    sent, all_of_them = (ops.moe_s(H100, 32 * 2000, *shape, ep=32, dtype="fp8", dispatched=d) for d in (True, False))
    assert sent < all_of_them / 5
    assert ops.moe_s(H100, 2000, *shape, dispatched=True) == ops.moe_s(H100, 2000, *shape), "one rank has all rows"
    double = ops.moe_s(H100, 64 * 2000, *shape, ep=64, dtype="fp8", dispatched=True)
    assert double == pytest.approx(sent, rel=0.05), "as many tokens of each of twice as many ranks: as much work, and fewer experts"


def test_dispatched_layers_are_priced_by_what_each_rank_is_sent():
    """The term grows with the tokens of a rank, not with those of the group; where TP ranks have all tokens, it does not change."""
    pricer = Pricer(Setting(V3, cluster("8x8xH200"), weight_dtype="fp8"))

    def experts(layout):
        return next(t.seconds for t in pricer.terms(layout, Work(False, 2000, 0.0)) if t.name == "experts")

    wide = experts(Layout(dp=64, ep=64))
    assert wide == pytest.approx(experts(Layout(dp=32, ep=32)), rel=0.1)
    moe = V3.moe
    passed = ops.moe_s(pricer.setting.device, 2000, 7168, moe.columns, moe.experts, moe.per_token, 1, 8, "fp8", compute="fp8")
    assert experts(Layout(tp=8, ep=8)) == pytest.approx(passed * V3.kinds.count((True, 0))), "all tokens on each rank"


def test_a_published_run_of_prompts_is_near():
    found = plan("deepseek-v3", "4x8xH100", input_len=2000, output_len=1, fixed={"ep": 32, "tp": 1, "pp": 1, "cp": 1})
    assert found.layout == Layout(dp=32, ep=32)
    assert found.rate * 2000 / 4 == pytest.approx(PUBLISHED_PREFILL, rel=0.15)


def test_a_published_run_of_decode_is_near():
    pricer = Pricer(Setting(V3, make_cluster(H100, 9), weight_dtype="fp8"))
    seconds = pricer.step(Layout(dp=72, ep=72), Work(True, 256, 2050.0)).sum_s
    assert 8 * 256 / seconds == pytest.approx(PUBLISHED_DECODE, rel=0.1)


@pytest.mark.parametrize("nodes", [8, 16, 32])
def test_exchanges_over_more_nodes_than_were_measured_are_near_the_published_ones(nodes):
    for found, published in zip(exchange(nodes), PUBLISHED_EXCHANGE[nodes], strict=True):
        assert found * 1e6 == pytest.approx(published, rel=0.15)


@pytest.mark.parametrize(("mode", "tokens"), [("low_latency", 128), ("low_latency", 8), ("normal", 4096)])
def test_an_exchange_does_not_jump_where_its_table_ends(mode, tokens):
    """A node more than were measured costs a little more, and so does every further one."""
    for of in (0, 1):
        times = [exchange(nodes, tokens, mode)[of] for nodes in range(2, 33)]
        assert all(a <= b * 1.001 for a, b in pairwise(times)), "more nodes are never cheaper"
        assert all(b / a < 1.1 for a, b in pairwise(times[6:])), "from 8 nodes on"
        assert times[30] / times[6] < 1.6


def test_measured_numbers_of_nodes_stay_as_they_are():
    for nodes in (1, 2, 4, 8):
        size = 128 * 7168 * 8.0
        assert exchange(nodes) == [
            collectives.measured_s(H100, "deepep_dispatch", nodes, size),
            collectives.measured_s(H100, "deepep_combine", nodes, 2 * size),
        ]


def test_where_nothing_was_measured_a_token_crosses_once_for_each_node_and_messages_start_together():
    bare = make_cluster(replace(H100, collectives={}), 16)
    few, many = exchange(16, 1, on=bare)[0], exchange(16, 4096, "normal", on=bare)[0]
    assert few < 3 * collectives.p2p_s(bare, 1024.0, "between"), "not one after the other"
    assert many < exchange(16, 4096, on=bare)[0]
    assert collectives.leaving("deepep_normal_dispatch", 2, 8) == pytest.approx((1 - 0.5**8) / 8)
    assert collectives.leaving("deepep_dispatch", 4, 8) == 0.75


@pytest.mark.parametrize("fabric", [{"scale": 0.01}, {"bandwidth": 0.36e9, "latency_s": 20e-6}])
def test_another_fabric_between_nodes_reaches_the_exchange_of_experts(fabric):
    device = from_entry({"like": "H100", "scale_out": fabric}, catalogue.device)
    slow = make_cluster(device, 4)
    assert all(there > 20 * here for here, there in zip(exchange(4), exchange(4, on=slow), strict=True))
    assert exchange(4, on=slow) == exchange(4, on=make_cluster(H100, 4).with_links(inter=device.scale_out))
    assert exchange(1, on=slow) == exchange(1), "inside a node nothing changed"
    message = collectives.p2p_s(slow, 1 << 24, "between")
    assert message == pytest.approx(device.scale_out.seconds(1 << 24, 1 << 24)), "messages do not follow samples of the old one"
