"""Measured samples beside a formula: exact where they are, smooth between, gone where there are none; and how a device carries them."""

import json
import math
from dataclasses import replace
from itertools import pairwise

import pytest

from lockstep.config.errors import ConfigError
from lockstep.planner import catalogue, collectives, families, ops, plan, samples
from lockstep.planner.entry import from_entry, to_entry
from lockstep.planner.find import find_model
from lockstep.planner.hardware import ErrorBand, Tried, make_cluster
from lockstep.planner.layer import Setting, Work
from lockstep.planner.layout import Layout
from lockstep.planner.price import Price
from lockstep.planner.report import report
from lockstep.planner.step import Pricer
from lockstep.planner.tables import Table, rising
from lockstep.planner.terms import operation_error, total_s
from lockstep.testing import planner_tables as measured

ROWS = [(1.0, 10.0, 2.0), (4.0, 10.0, 8.0), (1.0, 1000.0, 2.0), (4.0, 1000.0, 8.0)]


@pytest.fixture
def h100():
    return catalogue.device_shipped("H100")


def factor(table, *args):
    return math.exp(table.correction(args)[0])


def test_a_table_is_exact_at_samples_smooth_between_and_nothing_far_from_them():
    table = Table(ROWS, lambda args: 1.0, (0, 1))
    for *args, seconds in ROWS:
        assert factor(table, *args) == pytest.approx(seconds) and table.correction(args)[1] == 1
    assert factor(table, 2.0, 100.0) == pytest.approx(4.0)  # half way in the logarithm
    assert table.correction((33.0, 100.0)) == table.correction((4.0, 8001.0)) == table.correction((0.1, 100.0)) == (0.0, 0.0)
    fading = [factor(table, 4.0, 1000.0 * 8 ** (i / 16)) for i in range(17)]
    assert fading == sorted(fading, reverse=True) and (fading[0], fading[-1]) == (pytest.approx(8.0), pytest.approx(1.0))
    assert max(a / b for a, b in pairwise(fading)) < 1.2, "no step on the way"
    assert factor(table, 1.0, 0.001) == pytest.approx(2.0), "a size below the smallest one is a launch, which was measured"


def test_arguments_that_are_sizes_keep_their_smallest_samples_wherever_they_stand():
    assert factor(Table(ROWS, lambda args: 1.0, (0, 1), (0,)), 0.1, 10.0) == pytest.approx(2.0)


def test_not_every_combination_needs_a_sample():
    """Each curve ends by itself: where only one side of the square has samples, the other side is the formula's."""
    table = Table([(1.0, 1.0, 2.0), (1.0, 64.0, 2.0), (4.0, 1.0, 2.0)], lambda args: 1.0, (0, 1))
    assert table.correction((2.0, 64.0)) == (pytest.approx(math.log(2) / 2), pytest.approx(0.5))


def test_samples_that_fall_with_their_size_are_pooled():
    assert rising([1.0, 3.0, 2.0, 2.5, 7.0]) == [1.0, 2.5, 2.5, 2.5, 7.0]
    assert rising([3.0, 2.0, 1.0]) == [2.0, 2.0, 2.0]
    table = Table([(1, 3e-6), (2, 1e-6), (4, 4e-6)], lambda args: 1e-6)
    assert factor(table, 1) == factor(table, 2) == pytest.approx(math.sqrt(3))


def test_no_samples_make_no_table():
    with pytest.raises(ValueError, match="at least one sample"):
        Table([], lambda args: 1.0)


def test_the_same_table_from_samples_in_any_order(h100):
    family, found = measured.gemm()
    rows = samples.rows_of(found)
    there, back = (families.table_of(family, replace(h100, tables={}), each) for each in (rows, rows[::-1]))
    for args in ((3, 1500, 5000), (100, 20000, 700), (16384, 1024, 1024)):
        assert there.correction(args) == pytest.approx(back.correction(args))


def test_prices_are_the_samples_where_there_are_some_and_the_formula_s_far_from_them(h100):
    bare = replace(h100, tables={}, tried={})
    family, found = measured.gemm()
    exact = [abs(math.log(family.predict(h100, s) / s.seconds)) for s in found]
    assert sorted(exact)[len(exact) // 2] < 1e-4, "but for those that a larger product beat"
    assert ops.gemm_s(h100, 64, 4096, 64) == ops.gemm_s(bare, 64, 4096, 64)
    assert ops.gemm_s(h100, 64, 4096, 4096) != ops.gemm_s(bare, 64, 4096, 4096)
    for other in ({"dtype": "float16"}, {"weight_dtype": "int8"}):
        assert ops.gemm_s(h100, 64, 4096, 4096, **other) == ops.gemm_s(bare, 64, 4096, 4096, **other), "another type was not measured"
    chunk = [ops.prefill_attention_s(h100, 1, 1024, 16, 2, 128, context) for context in (0, 256, 16384)]
    plain = [ops.prefill_attention_s(bare, 1, 1024, 16, 2, 128, context) for context in (0, 256, 16384)]
    assert chunk[0] != plain[0] and chunk[2] == plain[2], "samples have no older tokens"
    assert abs(math.log(chunk[1] / plain[1])) < abs(math.log(chunk[0] / plain[0]))


def test_another_fabric_has_no_samples(h100):
    sampled = families.with_table(families.between(), h100, [families.Sample(1.0, (1e6,), 1.0)])
    own = make_cluster(sampled, 2)
    assert collectives.p2p_s(own, 1e6, "between") == pytest.approx(1.0)
    assert collectives.p2p_s(own.with_links(inter=h100.scale_out.scaled(1.0)), 1e6, "between") < 1e-3


def test_a_price_adds_up_with_its_memory():
    by_table, by_formula = Price(2.0, 2.0, 2.0, 0.1), Price(1.0, 0.0, 1.0, 0.2)
    for both in (by_table + by_formula, sum([by_table, by_formula])):
        assert (both, both.table_s, both.known_s, both.error_s) == (3.0, 2.0, 3.0, pytest.approx(0.3))
    assert (3 * by_table).table_s == (by_table * 3).table_s == 6.0
    unknown = 1.0 + by_table
    assert (unknown, unknown.known_s) == (3.0, 2.0) and max(by_table, by_formula) is by_table


def test_the_error_is_that_of_the_method(h100):
    tried = {"gemm bfloat16": Tried(0.5, 0.25)}
    device = replace(h100, tried=tried)
    inside, outside = ops.gemm_s(device, 64, 4096, 4096), ops.gemm_s(device, 64, 4096, 64)
    assert isinstance(inside, Price) and inside.error_s == pytest.approx(0.25 * inside) and inside.table_s == inside
    assert isinstance(outside, Price) and outside.error_s == pytest.approx(0.5 * outside) and outside.table_s == 0


@pytest.mark.parametrize("work", [Work(True, 16, 1000.0), Work(False, 2048, 0.0)], ids=str)
def test_every_operation_says_what_priced_it_and_how_far_off_that_is(work):
    pricer = Pricer(Setting(find_model("llama-3.1-70b")[0], catalogue.cluster("2x8xH100")))
    terms = {term.name: term for term in pricer.terms(Layout(tp=8, pp=2), work)}
    assert terms["MLP"].method == terms["all-reduce after the MLP"].method == "table"
    assert terms["norms, rope, activation"].method == "formula"
    assert terms["MLP"].error_s / terms["MLP"].seconds == pytest.approx(pricer.setting.device.tried["gemm bfloat16"].table)
    assert terms["embedding"].error_s / terms["embedding"].seconds == pytest.approx(pricer.setting.device.band.operation)
    assert all(0 <= term.table_s <= term.seconds * (1 + 1e-12) and term.error_s > 0 for term in terms.values())
    assert 0.02 < operation_error(terms.values()) < 0.1
    assert total_s(terms.values()) == pytest.approx(pricer.step(Layout(tp=8, pp=2), work).sum_s, rel=1e-12)


def test_a_plan_says_how_much_of_it_was_measured():
    ask = {"input_len": 500, "output_len": 100, "fixed": {"tp": 2}}
    known, unknown = plan("llama-3.1-8b", "1x8xH100", **ask), plan("llama-3.1-8b", "1x8xMI300X", **ask)
    assert known.by_samples > 0.5 > unknown.by_samples == 0
    assert known.band["operation"] < unknown.band["operation"] == pytest.approx(0.2)
    data = known.to_json()
    assert {term["method"] for term in data["tpot_terms"]} >= {"table", "formula"} and data["by_samples"] == known.by_samples
    json.dumps(data)


def test_where_nobody_knows_an_error_nothing_is_measured():
    device = replace(catalogue.device_shipped("MI300X"), band=ErrorBand(operation=0.0, tpot=0.3, ttft=0.5))
    found = plan("llama-3.1-8b", make_cluster(device, 1, 8), input_len=500, output_len=100, fixed={"tp": 2})
    assert found.operations == [] and found.by_samples == found.band["operation"] == 0.0
    assert "0% of their time in a token priced by measured samples" in report(found)


def test_nothing_is_read_before_a_price_is_asked_for(monkeypatch):
    opened = []
    monkeypatch.setattr(samples, "read", lambda path: opened.append(path) or {})
    device = from_entry(to_entry(catalogue.device_shipped("H100")) | {"name": "MINE"}, catalogue.device_shipped)
    assert not opened
    ops.gemm_s(device, 1, 1024, 1024)
    ops.decode_attention_s(device, 1, 1024, 8, 1, 128)
    assert len(opened) == 1


def test_what_is_shipped_is_small_and_known():
    size = sum(path.stat().st_size for path in samples.FOLDER.iterdir())
    assert size < 150_000
    for name in catalogue.names():
        device = catalogue.device_shipped(name)
        assert all(device.tried[family].table is not None for family in device.tables)
        for family in device.tables:
            assert families.named(family).name == family and device.tables[family] is not None


SIX = {"name": "X", "flops": 4e14, "memory_bandwidth": 2e12, "capacity_bytes": 64 << 30, "scale_up": {"bandwidth": 2e11, "latency_s": 4e-6}}


def test_an_entry_may_carry_its_own_samples():
    rows = {"gemm bfloat16": [[8, 4096, 4096, 1.0], [16, 4096, 4096, 1.0]]}
    device = from_entry(SIX | {"samples": rows}, catalogue.device_shipped)
    assert ops.gemm_s(device, 12, 4096, 4096) == pytest.approx(1.0, rel=0.3)
    again = from_entry(json.loads(json.dumps(to_entry(device))), catalogue.device_shipped)
    assert ops.gemm_s(again, 8, 4096, 4096) == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("rows", "words"),
    [
        ({"gem bfloat16": [[1, 1, 1, 1.0]]}, "'gem bfloat16' is no family: write gemm DTYPE"),
        ({"gemm bfloat16": [[1, 1, 1.0]]}, r"\[1, 1, 1.0\] is not 3 positive arguments and the seconds"),
        ({"gemm bfloat16": [[1, 1, 0, 1.0]]}, "positive arguments"),
        ({"gemm bfloat16": []}, "are none: leave the family out"),
        ({"gemm bfloat16": "fast"}, "are no lists of numbers"),
        (["gemm"], "samples is a list: write"),
        ("other.json.gz", "samples is 'other.json.gz': it must be a mapping, or a file in"),
    ],
)
def test_samples_that_are_none_are_refused_in_words(rows, words):
    with pytest.raises(ConfigError, match=words):
        from_entry(SIX | {"samples": rows}, catalogue.device_shipped)


def test_a_device_with_other_numbers_keeps_no_samples_of_the_one_it_is_like():
    other = from_entry({"like": "H100", "memory_bandwidth": 4e12}, catalogue.device_shipped)
    same = from_entry({"like": "H100", "price_per_hour": 2.0}, catalogue.device_shipped)
    assert not other.tables and not other.tried
    assert ops.gemm_s(same, 64, 4096, 4096) == ops.gemm_s(catalogue.device_shipped("H100"), 64, 4096, 4096)
