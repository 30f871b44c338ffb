"""Collectives as messages: they sum right, and cost to the last digit what their formulas say."""

from __future__ import annotations

import json
from dataclasses import replace
from fractions import Fraction
from pathlib import Path

import pytest

from lockstep.config.errors import ConfigError
from lockstep.planner import collectives as planner
from lockstep.planner.hardware import Link
from lockstep.planner.teach import collectives, links, placement, roofline, schedules
from lockstep.planner.teach.collectives import Options
from lockstep.planner.teach.links import Wire

INSIDE = Wire(Fraction(7, 10**6), Fraction(1, 10**6), Fraction(350 * 10**9))
BETWEEN = Wire(Fraction(9, 10**6), Fraction(13, 10**6), Fraction(37 * 10**9))
SIZES = (1, 16_384, 1_000_003, 1 << 28)


@pytest.mark.parametrize("n", range(2, 65))
def test_the_ring_is_its_formula(n):
    ring = schedules.ring(n)
    assert ring.steps == 2 * (n - 1)
    for size in SIZES:
        assert ring.sent(size) == [Fraction(2 * (n - 1), n) * size] * n
        took = collectives.seconds(ring, size, n, INSIDE, BETWEEN)
        assert took == INSIDE.launch_s + 2 * (n - 1) * INSIDE.step_s + Fraction(2 * (n - 1), n) * size / INSIDE.bandwidth
        assert took == links.ring_line(n, INSIDE).seconds(size)


@pytest.mark.parametrize("n", range(2, 33))
def test_every_algorithm_in_a_node_sums_and_is_its_formula(n):
    for name, line in links.lines(1, n, INSIDE, BETWEEN).items():
        schedule = schedules.make(name, 1, n)
        assert collectives.sums(schedule), name
        for size in SIZES:
            assert collectives.seconds(schedule, size, n, INSIDE, BETWEEN) == line.seconds(size), name


@pytest.mark.parametrize(("nodes", "per_node"), [(2, 8), (2, 2), (3, 4), (4, 3), (5, 1), (8, 8), (2, 16)])
def test_every_algorithm_over_nodes_sums_and_is_its_formula(nodes, per_node):
    for name, line in links.lines(nodes, per_node, INSIDE, BETWEEN).items():
        schedule = schedules.make(name, nodes, per_node)
        assert collectives.sums(schedule), name
        for size in SIZES:
            assert collectives.seconds(schedule, size, per_node, INSIDE, BETWEEN) == line.seconds(size), name


@pytest.mark.parametrize("n", [2, 3, 4, 7, 8])
def test_a_lost_message_is_noticed(n):
    whole = schedules.ring(n)
    for lost in range(len(whole.messages)):
        messages = whole.messages[:lost] + whole.messages[lost + 1 :]
        assert not collectives.sums(replace(whole, messages=messages)), lost


def test_only_a_share_leaves_the_node():
    """Of S bytes, a rank of 8 sends 2 (g-1)/g S/8 to another node; in a flat ring the rank at the border sends 2(n-1)/n S."""

    def crossing(name: str) -> Fraction:
        found = [Fraction(0)] * 16
        schedule = schedules.make(name, 2, 8)
        for message in schedule.messages:
            if message.source // 8 != message.target // 8:
                found[message.source] += schedule.size(message, 1 << 20)
        return max(found) / (1 << 20)

    assert crossing("hierarchical") == Fraction(1, 8)
    assert crossing("ring") == Fraction(30, 16)


def test_the_planners_ring_is_the_same_ring():
    """The planner prices a ring with floats and without a knee as the messages do."""
    link, out = Link(6.86e-6, 0.84e-6, 358e9), Link(6.86e-6, 12.64e-6, 36e9)
    for n in (2, 4, 8):
        for size in (16_384, 1 << 24):
            exact = collectives.seconds(schedules.ring(n), size, n, Wire.of(link), Wire.of(out))
            assert planner.ring_s(link, n, size, 2) == pytest.approx(float(exact), rel=1e-12)


def test_crossovers_are_where_the_lines_meet():
    n = 8
    one, two = links.one_shot_line(n, INSIDE), links.two_shot_line(n, INSIDE)
    at = one.crossover_bytes(two)
    assert at == INSIDE.step_s * INSIDE.bandwidth * n / ((n - 1) * (n - 2))
    assert one.seconds(at) == two.seconds(at) and one.seconds(at - 1) < two.seconds(at - 1) and one.seconds(at + 1) > two.seconds(at + 1)
    ring = links.ring_line(n, INSIDE)
    assert ring.seconds(ring.balance_bytes) == 2 * ring.fixed_s
    assert two.crossover_bytes(ring) is None  # as many bytes, fewer steps: never dearer


def test_decode_is_bound_by_latency_and_prefill_by_bandwidth():
    result = collectives.simulate(Options())
    tokens = float(result.inside["ring"].balance_bytes) / (2 * result.options.hidden)
    assert 128 < tokens < 512  # on the measured pair of links: a batch of decodes below, a prefill chunk above
    text = collectives.report(result)
    assert f"= {tokens:.1f} tokens" in text
    assert all("exactly" in row for row in text.splitlines()[3 : 3 + len(result.played)])


def test_tensor_parallelism_belongs_inside_a_node_on_the_measured_links():
    placed = collectives.simulate(Options()).placed
    assert placed.crossover_tokens is None
    assert all(inside.total_s < over.total_s for inside, over in zip(placed.inside, placed.over_all, strict=True))
    assert all(inside.weights_s == pytest.approx(2 * over.weights_s) for inside, over in zip(placed.inside, placed.over_all, strict=True))


def test_and_outside_when_the_links_between_are_good_enough():
    """The same arithmetic flips: at 1 token when a step between nodes falls below what is printed, and only up to a batch."""
    flip = collectives.simulate(Options()).placed.flip_step_s
    assert flip is not None
    for step, winner_over_all in ((flip * 0.99, True), (flip * 1.01, False)):
        placed = collectives.simulate(Options(between_step_us=repr(step * 1e6), tokens="1")).placed
        assert (placed.over_all[0].total_s < placed.inside[0].total_s) == winner_over_all
    near = collectives.simulate(Options(between_step_us="0.84", tokens="1,16,64,256,1024")).placed
    at = near.crossover_tokens
    assert at is not None
    inside, between = Options(between_step_us="0.84").wires()
    ahead = [placement.ahead_s(Options().model(), 2, 8, inside, between, tokens) > 0 for tokens in (1, at - 1, at)]
    assert ahead == [False, False, True]
    fast = collectives.simulate(Options(between_step_us="0.84", between_gb_s="358", tokens="1,16,64,256,1024")).placed
    assert fast.crossover_tokens is None or fast.crossover_tokens > at


def test_the_scaling_book():
    """Step times of "How to scale your model", inference, to 0.01 ms; the quiz to the two digits that the book gives."""
    book = json.loads((Path(__file__).parent / "data" / "scaling_book_examples.json").read_text())
    for name in ("llama2_13b_8x_tpu_v5e", "llama2_13b_gqa5x"):
        one = book[name]
        for batch, step_ms, tokens_per_s in zip(one["batch"], one["step_ms"], one["tokens_per_s"], strict=True):
            step_s = roofline.decode_step_s(batch, one["param_bytes"], one["kv_bytes_per_seq_8192"], one["hbm_bw_total"])
            assert abs(step_s * 1e3 - step_ms) <= 0.01
            assert batch / step_s == pytest.approx(tokens_per_s, abs=0.01)
    quiz = book["pop_quiz"]
    bandwidth, flops = quiz["chips"] * quiz["bw_per_chip"], quiz["chips"] * quiz["flops_per_chip_bf16"]
    kv = quiz["kv_bytes_per_token"] * quiz["ctx"]
    for batch, step_ms in ((4, quiz["batch4_ms"]), (256, quiz["batch256_ms"])):
        step_s = roofline.decode_step_s(batch, quiz["params_bytes_int8"], kv, bandwidth, quiz["params_bytes_int8"], flops)
        assert abs(step_s * 1e3 - step_ms) < 0.1
    assert roofline.critical_batch(quiz["bw_per_chip"], quiz["flops_per_chip_bf16"]) == pytest.approx(book["b_crit_tpu_v5e_bf16"], rel=0.02)


def test_pictures_hold_every_rank_and_line():
    result = collectives.simulate(Options(nodes=1))
    assert all(name in collectives.picture(result) for name in ("ring", "tree", "one-shot", "two-shot"))
    assert schedules.picture(schedules.ring(4)).count(">rank ") == 4
    assert "nothing to place" in collectives.report(result)


@pytest.mark.parametrize(
    "wrong", [{"nodes": 0}, {"per_node": 0}, {"nodes": 64, "per_node": 64}, {"between_gb_s": "999"}, {"inside_gb_s": "0"}, {"sizes": "1,x"}]
)
def test_impossible_settings_are_refused_by_name(wrong):
    with pytest.raises(ConfigError, match=next(iter(wrong))):
        collectives.simulate(Options(**wrong))
