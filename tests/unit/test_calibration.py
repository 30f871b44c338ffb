"""Calibration's arithmetic: constants are found again, entries kept, steps add up. What ranks measure is tested in tests/parity."""

from __future__ import annotations

import itertools
import json
import math
import os
import random
import signal
import sys
import time
from dataclasses import replace
from pathlib import Path

import msgspec
import pytest

from lockstep.cli import main as cli
from lockstep.cli.calibrate import peak_flops, table
from lockstep.config.errors import ConfigError
from lockstep.config.model_spec import ModelSpec
from lockstep.planner import calibration, catalogue
from lockstep.planner.calibration import AttentionRates, Calibration, Line, Mode, ProductRates
from lockstep.planner.cpu import CpuModel, Scales
from lockstep.planner.cpu_ops import attention_s, far_share, pairs_of, product_s
from lockstep.planner.cpu_tables import GATED, PLAIN, ROW, corrected
from lockstep.planner.layout import Layout
from lockstep.planner.memory import weight_bytes
from lockstep.planner.model import from_spec
from lockstep.simulation import rates_fit
from lockstep.simulation.engine_steps import Run, speed, with_steps
from lockstep.simulation.measure import Answer, disturbed, joined, mode_of
from lockstep.simulation.rates_fit import Product
from lockstep.simulation.samples_kept import with_samples

SPEC = ModelSpec("LlamaForCausalLM", 256, 6, 8, 4, 32, 768, 8000, 4096, layer_kinds=("full",) * 6, dtype="bfloat16")
SHAPE = from_spec(SPEC, "small")


def mode(ranks: int = 1, busy: int | None = None, cached_s: float = 1e-9, **more: object) -> Mode:
    """Round numbers: a weight costs 1 ns at one row, in caches and from memory alike, unless cached_s says what it costs there."""
    rates = [ProductRates(r, 1e-6, 0.0, [(1e6, cached_s * r), (1e9, 1e-9 * r)], 0.0, 0.0) for r in (1, 8, 64)]
    flat, none = AttentionRates(1e-6, 1e-10, 1e-12, 0.0), Line()
    settings = {"flops": 1e11, "rope": none, "angles": none, "embed": none, "norm": none, "choose": none, **more}
    return Mode(ranks=ranks, busy=busy or ranks, threads=2 // ranks, bandwidth=1e10, products=rates, decode=flat, prefill=flat, **settings)


def machine(*modes: Mode, cache: int = 1 << 40) -> Calibration:
    return Calibration(
        name="this", machine="a test", cores=2, kernels="none", dtype="bfloat16", capacity_bytes=1 << 30, memory_bandwidth=2e10,
        cache_bytes=cache, flops={"bfloat16": 1e12}, all_reduce=[(256, 2e-6), (1 << 20, 1e-4)], send_recv=[(256, 3e-6), (1 << 20, 8e-5)],
        modes=list(modes),
    )  # fmt: skip


def test_constants_are_found_again():
    """Products made from known constants, of shapes and sets that calibration uses: other shapes are predicted within 1 %."""
    truth = [
        ProductRates(rows, 2e-6, 3e-10 * rows, [(1e6, rows * 2e-12 + 4e-12), (1e8, rows * 2e-12 + 5e-11)], 1e-9 * rows, 2e-9 * rows)
        for rows in (1, 8, 64, 512)
    ]
    shapes = [(256, 256), (512, 256), (256, 768), (1536, 1024), (1024, 4096), (8192, 1024)]
    samples = [
        Product(rates.rows, n, k, work, gated=gated, row=row, seconds=product_s([rates], rates.rows, n, k, work, gated=gated, row=row))
        for rates, (n, k), (work, _), (gated, row) in itertools.product(truth, shapes, truth[0].work, ((0, 0), (1, 0), (0, 1)))
    ]
    found = rates_fit.products(samples)
    for rows, (n, k) in itertools.product((1, 8, 64, 512), ((320, 640), (2048, 512))):
        for gated, row in ((True, False), (False, True)):
            want = product_s(truth, rows, n, k, 1e7, gated=gated, row=row)
            assert product_s(found, rows, n, k, 1e7, gated=gated, row=row) == pytest.approx(want, rel=0.01)


def test_no_constant_is_negative():
    weights = rates_fit.fit([(1.0, x) for x in (1.0, 2.0, 3.0)], [3.0, 2.0, 1.0])
    assert min(weights) == 0.0 and max(weights) > 0
    assert rates_fit.line([(x, 5.0 + 2.0 * x) for x in (1.0, 10.0, 100.0)]).at(1000) == pytest.approx(2005, rel=1e-3)
    assert rates_fit.line([]) == Line()


def test_between_measured_rows_seconds_lie_between():
    table_ = mode().products
    assert product_s(table_, 1, 100, 100, 1e6) == pytest.approx(11e-6)
    assert product_s(table_, 1, 100, 100, 1e6) < product_s(table_, 3, 100, 100, 1e6) < product_s(table_, 8, 100, 100, 1e6)
    assert product_s(table_, 128, 100, 100, 1e6) == pytest.approx(2 * product_s(table_, 64, 100, 100, 1e6)), "beyond: in proportion"


def test_rows_are_free_until_multiplying_takes_longer_than_reading():
    """A weight takes 100 ps to read and 5 to multiply by a row: at 16 rows it is read, at 32 multiplied, and at 18 still read."""
    weights = [ProductRates(r, 0.0, 0.0, [(1e6, 5e-12 * r), (1e9, max(1e-10, 5e-12 * r))], 0.0, 0.0) for r in (16, 32)]

    def each(rows: int, work: float) -> float:
        return product_s(weights, rows, 1000, 1000, work) / 1e6

    assert [each(rows, 1e9) for rows in (16, 18, 24, 32)] == pytest.approx([1e-10, 1e-10, 1.2e-10, 1.6e-10])
    assert [each(rows, 1e6) for rows in (16, 32)] == pytest.approx([8e-11, 1.6e-10])
    slower = [weights[0], msgspec.structs.replace(weights[1], work=[(1e6, 2e-10), (1e9, 1.6e-10)])]  # in the small model, for noise
    first, near_first, near_last, last = (product_s(slower, rows, 1000, 1000, 1e9) for rows in (16, 17, 31, 32))
    assert (first, last) == pytest.approx((1e-4, 1.6e-4))
    assert near_first == pytest.approx(first, rel=0.03) and near_last == pytest.approx(last, rel=0.06), "no jump at what was measured"


def test_of_a_larger_model_the_last_cache_keeps_less():
    """10 ps a weight in caches, 100 from memory: of the largest model that was measured, twice the cache, it still kept a third."""
    cache, fast, slow = 1e8, 1e-11, 1e-10
    measured = fast + (slow - fast) * far_share(2 * cache, cache)
    (found,) = rates_fit.with_far([ProductRates(1, 0.0, 0.0, [(1e6, fast), (2 * cache, measured)], 0.0, 0.0)], 1, cache)
    assert product_s([found], 1, 1000, 1000, 1e4 * cache) / 1e6 == pytest.approx(slow, rel=0.02)
    assert product_s([found], 1, 1000, 1000, 2 * cache) / 1e6 == pytest.approx(measured), "what was measured stands"
    two = rates_fit.with_far([ProductRates(1, 0.0, 0.0, [(1e6, fast), (cache, measured)], 0.0, 0.0)], 2, cache)
    assert product_s(two, 1, 1000, 1000, 1e4 * cache) / 1e6 == pytest.approx(slow, rel=0.02), "two ranks share it"
    for work in ([(1e6, fast), (cache / 2, slow)], [(2 * cache, fast), (3 * cache, slow)], [(1e6, slow), (2 * cache, fast)]):
        assert rates_fit.with_far([ProductRates(1, 0.0, 0.0, work, 0.0, 0.0)], 1, cache)[0].work == work, "nothing says what it keeps"


def test_a_part_that_is_lost_in_noise_is_found_as_a_mean():
    """A tenth of what it was found in, which is 15 % off in turn: it is below zero half of the time."""
    points = [(x, 0.1 * x + sign * 0.15 * x, x) for x in (1.0, 2.0, 4.0, 8.0, 16.0) for sign in (1, -1)]
    assert rates_fit.rest_line(points).at(10) == pytest.approx(1.0, rel=1e-3)
    assert rates_fit.rest_line([]) == Line()


def test_tokens_that_are_far_apart_in_the_cache_take_longer_to_store():
    def rope_s(queries: list[int]) -> float:
        model = CpuModel(machine(mode(rope=Line(1e-6, 1e-9), rope_one=Line(2e-6, 5e-9))), SHAPE, Layout())
        return next(op.seconds for op in model.operations(0, queries, [64] * len(queries), 1) if op.name == "rope")

    width = 8 * 32 + 2 * 4 * 32
    assert rope_s([1, 1, 1]) == pytest.approx(6 * (2e-6 + 5e-9 * 3 * width)) and rope_s([64]) == pytest.approx(
        6 * (1e-6 + 1e-9 * 64 * width)
    )
    assert rope_s([1, 64, 1]) == pytest.approx(rope_s([1, 1]) + rope_s([64]))


def test_pairs_are_counted_as_attention_sees_them():
    for queries, context, window in itertools.product((1, 3, 7), (7, 20), (0, 5)):
        by_hand = sum(1 for q in range(context - queries, context) for k in range(q + 1) if not window or q - k < window)
        assert pairs_of(queries, context, window) == by_hand


def test_a_step_is_the_sum_of_what_is_in_it():
    """Every product by hand: launch of 1 us, 1 ns a weight and row."""
    model = CpuModel(machine(mode(step=Line(1e-4, 1e-5))), SHAPE, Layout())
    weights = 256 * (512 + 256 + 1536) + 256 * 768
    attention = attention_s(mode().decode, 100 * 2 * 128 * 2, 100 * 256, 0)
    want = (1e-4 + 1e-5) + 6 * (4e-6 + weights * 1e-9 + attention) + (1e-6 + 8000 * 256 * 1e-9)
    assert sum(model.stage_s([1], [100], 1)) == pytest.approx(want)
    assert sum(model.stage_s([1], [100], 0)) == pytest.approx(want - (1e-6 + 8000 * 256 * 1e-9)), "nothing is sampled: no head"


def test_stages_share_the_layers_and_hops_have_a_price():
    whole = CpuModel(machine(mode(), mode(2)), SHAPE, Layout())
    halves = CpuModel(machine(mode(), mode(2, hop=Line(1e-5, 1e-9))), SHAPE, Layout(pp=2))
    assert len(halves.stage_s([1], [50], 1)) == 2
    assert sum(halves.stage_s([1], [50], 1)) == pytest.approx(sum(whole.stage_s([1], [50], 1)))
    assert halves.hop_s(10) == pytest.approx(1e-5 + 10 * 512 * 1e-9) and whole.hop_s(10) == 0


def test_ranks_that_share_a_layer_pay_for_sums():
    plain, summed = mode(2), mode(2, combine=Line(1e-5))
    seconds = [sum(CpuModel(machine(mode(), m), SHAPE, Layout(tp=2)).stage_s([1], [50], 1)) for m in (plain, summed)]
    assert seconds[1] - seconds[0] == pytest.approx((2 * 6 + 1) * 1e-5), "two sums a layer, and the embedding's"
    assert seconds[0] < sum(CpuModel(machine(mode(), plain), SHAPE, Layout()).stage_s([1], [50], 1)), "half of each matrix"


def test_who_works_alone_has_a_mode_of_its_own():
    found = machine(mode(), mode(2), mode(2, busy=1))
    assert (found.mode(2).busy, found.mode(2, 1).busy, found.mode(4).ranks) == (2, 1, 2)
    assert CpuModel(found, SHAPE, Layout(pp=2), alone=True).mode.busy == 1


def test_bandwidth_now_scales_what_is_read_from_memory_only():
    """A weight takes 0.2 ns to read: that is hidden where its product takes 1 ns without it, until reading takes longer than that."""

    def step(scale: float, cache: int, cached_s: float) -> float:
        found = machine(mode(cached_s=cached_s), cache=cache)
        return sum(CpuModel(found, SHAPE, Layout(), scales=Scales(bandwidth=scale)).stage_s([1], [1], 1))

    for cached_s in (1e-9, 0.8e-9):
        assert step(0.5, 1 << 40, cached_s) == pytest.approx(step(1.0, 1 << 40, cached_s), rel=0.01), "weights in the caches"
    assert step(0.5, 0, 1e-9) == pytest.approx(step(1.0, 0, 1e-9), rel=0.01), "hidden"
    assert step(0.1, 0, 1e-9) == pytest.approx(2 * step(1.0, 0, 1e-9), rel=0.05), "not hidden any more"
    read_s = step(0.1, 0, 1e-9) / 10
    assert step(0.5, 0, 0.1e-9) == pytest.approx(step(1.0, 0, 0.1e-9) + read_s, rel=0.02), "one after the other"


def test_flops_now_scale_what_is_multiplied_only():
    def step(rows: int, compute: float) -> float:
        found = machine(mode(flops=2e9))  # what these rates do: a weight and a row in a nanosecond
        return sum(CpuModel(found, SHAPE, Layout(), scales=Scales(compute=compute)).stage_s([rows], [rows], 1))

    assert 1.8 * step(64, 1.0) < step(64, 0.5) <= 2 * step(64, 1.0), "a prompt is products and attention"
    narrow = mode(flops=1e15)
    slow, usual = (sum(CpuModel(machine(narrow), SHAPE, Layout(), scales=Scales(compute=c)).stage_s([1], [1], 1)) for c in (0.5, 1.0))
    assert slow == pytest.approx(usual, rel=0.01), "multiplying is no part of one row here"


@pytest.mark.parametrize("cache", [0, 1 << 40])
@pytest.mark.parametrize("rows", [1, 64])
def test_all_three_speeds_at_half_are_twice_the_time(rows: int, cache: int):
    found = machine(mode(flops=2e9, cached_s=0.7e-9), cache=cache)

    def step(*speeds: float) -> float:
        return sum(CpuModel(found, SHAPE, Layout(), scales=Scales(*speeds)).stage_s([rows], [rows], 1))

    assert step(0.5, 0.5, 0.5) == pytest.approx(2 * step(1.0, 1.0, 1.0))
    one = mode(flops=1e15)
    hops = [CpuModel(machine(mode(2, hop=Line(1e-5))), SHAPE, Layout(pp=2), scales=Scales(others=o)).hop_s(1) for o in (0.5, 1.0)]
    assert hops == pytest.approx([2e-5, 1e-5])
    alone = [sum(CpuModel(machine(one), SHAPE, Layout(), scales=Scales(others=o)).stage_s([1], [1], 1)) for o in (0.5, 1.0)]
    assert alone[0] == pytest.approx(2 * alone[1], rel=0.01), "one row from the caches is neither memory nor multiplying"


def test_attention_knows_scores_from_widths():
    """Made of both, over two head widths, it is predicted for a third one, by the constants and by the samples."""
    truth, rows = AttentionRates(2e-6, 1e-11, 1e-12, 0.0, 0.0, 5e-11), []
    for width in (32, 128):
        for tokens in (64, 128, 256, 512, 1024, 2048):
            for heads in (4, 8):
                pairs = float(pairs_of(tokens, tokens) * heads * width)
                args = (2.0 * 4 * width * tokens, pairs, float(tokens * heads * width), 0.0, pairs / width)
                rows.append((*args, pairs / args[0], attention_s(truth, *args)))
    found = with_samples(mode(), {"prefill attention": rows})
    fitted = rates_fit.attention([[r[0], r[1], r[2], r[0] * r[3], r[4]] for r in rows], [r[-1] for r in rows])
    assert fitted.score_s == pytest.approx(5e-11, rel=0.05) and found.tried["prefill attention"][0] < 0.02
    pairs = float(pairs_of(700, 700) * 8 * 64)
    args = (2.0 * 4 * 64 * 700, pairs, 700.0 * 8 * 64, 0.0, pairs / 64)
    assert attention_s(fitted, *args) == pytest.approx(attention_s(truth, *args), rel=0.02)
    kept = msgspec.structs.replace(found, samples={"prefill attention": [list(r) for r in rows]}, prefill=fitted)
    priced = corrected(kept, "prefill attention", attention_s(fitted, *args), *args, pairs / args[0])
    assert priced == pytest.approx(attention_s(truth, *args), rel=0.02)


def test_more_rows_than_were_asked_of_a_large_model_cost_it_as_much_more():
    def products(rows: int, work: float, weight_s: float) -> list[Product]:
        return [Product(rows, n, k, work, gated=False, row=False, seconds=n * k * weight_s) for n in (256, 2048) for k in (512, 4096)]

    found = rates_fit.products([*products(1024, 1e6, 1e-9), *products(1024, 1e8, 2e-9), *products(2048, 1e6, 3e-9)])
    assert [work for work, _ in found[-1].work] == [1e6, 1e8]
    assert [weight_s for _, weight_s in found[-1].work] == pytest.approx([3e-9, 6e-9], rel=0.05)


def test_what_a_step_costs_beyond_its_operations_is_that_of_undisturbed_rounds():
    """Rounds of which one is twice as slow in all its parts. Operations take 0.2 ms longer in the engine than by themselves, and what is
    none takes twice as long with a model that fills the caches."""
    runs, longer = [(1, 64), (4, 64), (16, 64), (1, 512), (4, 512)], 2e-4
    alone = Answer(from_spec(SPEC, "small"), 1, [(n, 1, p) for n, p in runs + runs], [{"embed": s} for s in [2e-3] * 5 + [1e-2] * 5])

    def one(slow: float, cold: float = 1.0) -> list[Run]:
        beyond = [(cold * (1e-3 + 1e-5 * n), 1e-4 * n + 1e-6 * n * (p - 1)) for n, p in runs]
        times = [(1e-2 + longer + step + prompts, 2e-3 + longer + step, step) for step, prompts in beyond]
        return [Run(n, p, *(slow * s for s in each)) for (n, p), each in zip(runs, times, strict=True)]

    rounds = (1.0, 2.0, 1.0)
    found = with_steps(mode(), [one(slow) for slow in rounds], [one(slow, cold=2.0) for slow in rounds], alone, 9e7)
    assert found.step.base_s == pytest.approx(1.2e-3, rel=0.01) and found.step.per_s == pytest.approx(1e-5, rel=0.05)
    assert found.step_far.base_s == pytest.approx(2.2e-3, rel=0.01) and found.step_far.per_s == pytest.approx(2e-5, rel=0.05)
    assert found.prompt_s == pytest.approx(1e-4, rel=0.05) and found.prompt_token_s == pytest.approx(1e-6, rel=0.05)
    assert speed(found, [one(slow) for slow in (2.5, 3.0, 1.25)]) == pytest.approx(0.4), "the usual look"
    assert speed(found, [one(1.0)[:1]]) == pytest.approx(1.0), "some of the runs do"
    larger, small = (machine(found, cache=cache) for cache in (0, 1 << 40))
    engine = [next(iter(CpuModel(each, SHAPE, Layout()).operations(0, [1], [1], 1))).seconds for each in (small, larger)]
    assert engine == pytest.approx([found.step.at(1), found.step_far.at(1)])


def test_weights_a_little_beyond_the_caches_leave_the_engine_some_of_them():
    """Nothing jumps: a byte more than the caches hold costs no more, and from the model that was measured on everything is cold."""
    weights = weight_bytes(SHAPE, Layout())

    def engine(cache: float, far: float) -> float:
        found = machine(mode(step=Line(1e-3), step_far=Line(3e-3), far_bytes=far), cache=int(cache))
        operations = {op.name: op.seconds for op in CpuModel(found, SHAPE, Layout()).operations(0, [1], [1], 1)}
        return operations["engine, executor and worker"]

    assert engine(weights + 1, 4 * weights) == pytest.approx(1e-3) and engine(weights - 1, 4 * weights) == pytest.approx(1e-3, rel=1e-4)
    assert engine(weights / 2, 2 * weights) == pytest.approx(2e-3)
    assert [engine(weights / 2, far) for far in (weights - 1, 0.9 * weights, 0.0)] == pytest.approx([3e-3] * 3)
    assert engine(0, 2 * weights) == pytest.approx(3e-3)


@pytest.mark.parametrize("layout", [Layout(dp=2), Layout(tp=2), Layout(pp=2)], ids=["dp=2", "tp=2", "pp=2"])
def test_ranks_share_the_caches(layout):
    """What the step of a rank finds in the last cache depends on what all of them read."""
    stage = layout.pp - 1
    every = 2 * weight_bytes(SHAPE, layout, stage, 0, "balanced")
    part = mode(ranks=2, step=Line(1e-3), step_far=Line(3e-3), choose=Line(1e-4), choose_far_s=1e-4, far_bytes=2.0 * every)

    def costs(cache: float) -> tuple[float, float]:
        operations = {op.name: op.seconds for op in CpuModel(machine(part, cache=int(cache)), SHAPE, layout).operations(stage, [1], [1], 1)}
        return operations["engine, executor and worker"], operations["choice"]

    assert costs(every + 1) == pytest.approx((1e-3, 1e-4))
    assert costs(every / 2) == pytest.approx((2e-3, 2e-4)), "half cold; what choosing takes more is all there, as it was measured"


def test_neighbours_are_left_out_and_told():
    """Of eight rounds three are half as slow again: operations are those of the others, and how much usual steps are above them is said."""
    shape, cases = from_spec(SPEC, "small"), [(1, 1, 64), (4, 1, 64)]

    def one(slow: float) -> Answer:
        return Answer(shape, 1, cases, [{"embed": slow * 1e-3, "qkv": slow * 1e-4}, {"embed": slow * 2e-3, "qkv": slow * 3e-4}])

    some, most = ([one(slow) for slow in (1.0,) * quick + (1.5,) * (8 - quick)] for quick in (5, 3))
    for answers, longer in ((some, 1.0), (most, 1.5)):
        assert joined(answers).times == one(1.0).times
        assert disturbed(answers) == pytest.approx(longer)
    told = machine(msgspec.structs.replace(mode(), disturbed=disturbed(most)))
    assert "x1.50 as long" in table(told) and "as long" not in table(machine(mode()))


def test_choosing_costs_more_where_a_step_leaves_no_caches():
    """Logits and choice of models on both sides of the cache: what the latter costs more is found, and priced."""
    spec, cases = replace(SPEC, vocab_size=4000), [(1, 1, 64), (8, 1, 64), (32, 1, 64), (4, 64, 64)]
    answers = []
    for one, more_s in ((spec, 0.0), (SPEC, 0.0), (replace(SPEC, hidden_size=1024, intermediate_size=4096), 3e-4)):
        times = []
        for rows, tokens, _ in cases:
            kinds = dict.fromkeys(("qkv", "out", "gate_up", "down", "rope", "attention"), 1e-4 * rows * tokens)
            times.append({**kinds, "embed": 1e-6, "angles": 1e-6, "norm": 1e-6, "head": 1e-2 + rows * one.vocab_size * 1e-10 + more_s})
        answers.append(Answer(from_spec(one, "m"), 1, cases, times))
    found = mode_of(answers, ranks=1, busy=1, threads=1, cache_bytes=(answers[1].work + answers[2].work) // 2)
    assert found.choose_far_s > 0

    def choice(cache: int) -> float:
        operations = CpuModel(machine(found, cache=cache), SHAPE, Layout()).operations(0, [1], [1], 1)
        return next(op.seconds for op in operations if op.name == "choice")

    assert choice(0) - choice(1 << 40) == pytest.approx(found.choose_far_s)


def test_an_entry_is_kept_and_read_as_a_device(tmp_path: Path):
    found, path = machine(mode(), mode(2)), tmp_path / "devices" / "here.json"
    calibration.save(found, path)
    assert msgspec.to_builtins(calibration.load(path)) == msgspec.to_builtins(found) and [p.name for p in path.parent.iterdir()] == [
        "here.json"
    ]
    device = catalogue.cluster(str(path)).device
    assert device.calibrated and device.memory_bandwidth == 2e10 and device.peak("float16") == 1e12
    assert 0 < device.roofline("bfloat16").flop_efficiency <= 1
    assert device.scale_up.seconds(1 << 20, 1 << 20) == pytest.approx(1e-4, rel=0.01)
    assert "GB/s" in table(found) and peak_flops(found.modes) == pytest.approx(2 * 2e9)


def test_what_is_no_entry_is_refused(tmp_path: Path):
    with pytest.raises(ConfigError, match="run `lockstep calibrate`"):
        calibration.load(tmp_path / "none.json")
    for text in (b"{", b"[]", msgspec.json.encode({"engine": msgspec.structs.replace(machine(mode()), format=99)})):
        (tmp_path / "bad.json").write_bytes(text)
        with pytest.raises(ConfigError, match="calibrate` again"):
            calibration.load(tmp_path / "bad.json")


@pytest.mark.parametrize("value", [math.nan, math.inf, -1e-6])
def test_numbers_that_nobody_measured_are_refused(value: float, tmp_path: Path):
    path = tmp_path / "bad.json"
    calibration.save(machine(mode()), path)
    entry = json.loads(path.read_text())
    entry["engine"]["modes"][0]["decode"]["byte_s"] = value
    path.write_text(json.dumps(entry))
    with pytest.raises(ConfigError, match=r"has engine.modes.decode.byte_s=.*calibrate` again"):
        calibration.of_device(catalogue.cluster(str(path)).device)


def test_a_file_that_is_no_text_is_refused_by_name(tmp_path: Path):
    (tmp_path / "bad.json").write_bytes(b"\x7fELF\xe2")
    with pytest.raises(ConfigError, match=r"bad.json is not a text file"):
        catalogue.cluster(str(tmp_path / "bad.json"))


def test_a_place_that_cannot_be_written_is_refused_before_anything_is_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]):
    nowhere = [("/proc/c.json", "cannot be written")] if sys.platform == "linux" else []
    for out, rule in ((tmp_path, "is a folder"), (tmp_path / "none" / "c.json", "is in a folder that is not there"), *nowhere):
        assert cli.main(["calibrate", "--out", str(out)]) == 2
        shown = capsys.readouterr().err
        assert f"--out={out} {rule}" in shown and "ranks" not in shown
    assert not list(tmp_path.iterdir())


def test_a_measurement_that_is_told_to_end_cleans_up(monkeypatch: pytest.MonkeyPatch, tmp_path: Path):
    cleaned = []

    def measured(*_: object) -> Calibration:
        try:
            os.kill(os.getpid(), signal.SIGTERM)
            time.sleep(30)
            raise AssertionError("nothing ended it")
        finally:
            cleaned.append(True)

    monkeypatch.setattr("lockstep.cli.calibrate.calibrate", measured)
    before = signal.getsignal(signal.SIGTERM)
    assert cli.main(["calibrate", "--out", str(tmp_path / "c.json")]) == 143
    assert cleaned and signal.getsignal(signal.SIGTERM) == before


def test_too_little_time_is_refused(capsys: pytest.CaptureFixture[str]):
    assert cli.main(["calibrate", "--budget-seconds", "1"]) == 2
    assert "--budget-seconds=1 must be a number of seconds, at least 40" in capsys.readouterr().err


def sampled(quirk):
    """The samples of products and attention that calibration takes, `quirk(rows, n, k, seconds)` being what was measured."""
    made, found = mode(), []
    for n, k, work in itertools.product((320, 768), (192, 384), (1e6, 4e6)):
        for rows in (1, 2, 4, 8, 16, 32, 64):
            found.append((rows, n, k, work, PLAIN, quirk(rows, n, k, product_s(made.products, rows, n, k, work))))
    return made, {"product": found}


def test_samples_that_tell_more_than_the_constants_are_kept_and_price_what_they_are_of():
    made, rows = sampled(lambda rows, n, k, seconds: seconds * (1.4 if (n, k) == (768, 192) else 1.0))
    found = with_samples(made, rows)
    constants, samples = found.tried["product"]
    assert samples < constants and len(found.samples["product"]) == 56
    again = msgspec.json.decode(msgspec.json.encode(found), type=Mode)  # as an entry keeps it
    for *args, seconds in rows["product"]:
        price = corrected(again, "product", product_s(made.products, *args[:4]), *args)
        assert price == pytest.approx(seconds) and price.table_s == price and price.error_s == pytest.approx(samples * seconds)
    far = corrected(again, "product", 1.0, 8, 9000, 9000, 1e9, PLAIN)
    assert (far, far.table_s, far.error_s) == (1.0, 0.0, pytest.approx(constants))
    other = corrected(again, "product", 1.0, 8, 768, 384, 2e6, GATED)
    assert other == 1.0, "what follows a product in place is not in these samples"


def test_samples_that_are_noise_are_not_kept():
    draw = random.Random(7)
    made, rows = sampled(lambda rows, n, k, seconds: seconds * math.exp(draw.gauss(0, 0.2)))
    found = with_samples(made, rows)
    assert found.samples == {} and found.tried["product"][0] < found.tried["product"][1]
    assert with_samples(made, {"product": rows["product"][:4]}).tried == {}, "too few to say"


def test_a_step_of_a_model_like_a_measured_one_takes_its_samples():
    """Every product of the small model measured at three times the constants: the step's products are three times as dear."""
    plain, work = mode(), weight_bytes(SHAPE, Layout())
    ops = CpuModel(machine(plain), SHAPE, Layout()).operations(0, [1], [100], 1)
    rows = [[1, n, k, work, kind, 3 * product_s(plain.products, 1, n, k, work)] for n, k, kind in
            ((512, 256, PLAIN), (256, 256, ROW), (1536, 256, GATED), (256, 768, ROW), (8000, 256, PLAIN))]  # fmt: skip
    slow = msgspec.structs.replace(plain, samples={"product": rows}, tried={"product": (0.2, 0.1)})
    for before, after in zip(ops, CpuModel(machine(slow), SHAPE, Layout()).operations(0, [1], [100], 1), strict=True):
        product = before.name in ("qkv", "out", "gate and up", "down", "head")
        assert after.seconds == pytest.approx((3 if product else 1) * before.seconds)
        assert (after.table, after.error) == ((pytest.approx(1), pytest.approx(0.1)) if product else (0, 0))
