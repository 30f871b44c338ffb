"""How far the shipped constants are off, on the sizes that they were not fitted to. Arithmetic on committed tables: no clock."""

from dataclasses import replace

import pytest

from lockstep.planner import catalogue
from lockstep.planner.families import family_errors
from lockstep.testing import planner_accuracy as accuracy
from lockstep.testing import planner_tables as tables

BOUNDS = {
    "all-reduce": 0.06,
    "all-reduce (NCCL)": 0.06,
    "all-gather": 0.07,
    "reduce-scatter": 0.07,
    "all-to-all": 0.13,
    "GEMM bf16 (n, k >= 1024)": 0.075,
    "GEMM fp8": 0.20,
    "prefill attention": 0.095,
    "decode attention": 0.09,
    "MoE balanced, fitted per model": 0.09,
    "MoE skewed, fitted per model": 0.09,
    "point-to-point": 0.05,
    "DeepEP": 0.05,
    "DeepEP normal": 0.05,
}


@pytest.fixture(scope="module")
def lines():
    return accuracy.all_lines(catalogue.device_shipped("H100"))


BOTH_WAYS = ("point-to-point",)  # a half has 13 sizes, of which one that is 20 % off moves the mean by 1.5


@pytest.mark.parametrize("group", BOUNDS)
def test_held_out_error_of_the_formula(lines, group):
    ways = (0, 1) if group in BOTH_WAYS else (0,)
    found = accuracy.pooled(line.ways[i].formula for line in lines if line.group == group for i in ways)
    assert found.n >= 30
    assert found.mape <= BOUNDS[group], f"{group}: {found.mape:.2%} on {found.n} rows"


@pytest.mark.parametrize("group", BOUNDS)
def test_held_out_error_as_priced(lines, group):
    """By the table where one is shipped: each half by constants and samples of the other."""
    ways = [[line.used[i] for line in lines if line.group == group] for i in (0, 1)]
    for each in [ways[0] + ways[1]] if group in BOTH_WAYS else ways:
        found = accuracy.pooled(each)
        assert found.mape <= BOUNDS[group], f"{group}: {found.mape:.2%} on {found.n} rows"


def test_every_model_with_even_routing(lines):
    errors = {line.name: line.ways[0].formula.mape for line in lines if line.group == "MoE balanced, fitted per model"}
    assert len(errors) == 4
    assert max(errors.values()) <= 0.09, errors


@pytest.mark.parametrize("routing", ["balanced", "skewed"])
def test_every_model_as_priced(lines, routing):
    """Which experts are hot is not in the formula: two of the four models need their own samples to come below 9 %."""
    found = [line for line in lines if line.group == f"MoE {routing}, fitted per model"]
    assert len(found) == 4 and all(line.by_table for line in found)
    errors = {line.name: [half.mape for half in line.used] for line in found}
    assert max(map(max, errors.values())) <= 0.09, errors


def test_measured_samples_beat_the_formula(lines):
    """Where many samples exist, whichever half gives them; of a few noisy ones (all-to-all of 8) the formula is the better mean."""
    many = [line for line in lines if line.ways[0].formula.n >= 90]
    assert len(many) == 20
    assert all(way.table.mape < way.formula.mape for line in many for way in line.ways)


def test_samples_are_shipped_where_they_were_better_both_ways_together(lines):
    for line in lines:
        if not line.group.endswith("one fit for all models"):
            formula, table = (accuracy.pooled(way[i] for way in line.ways).mape for i in (0, 1))
            assert line.by_table == (table < formula), line.name
    assert {line.name for line in lines if not line.by_table} >= {"all-to-all n=8", "message between nodes"}


def test_every_fit_beats_the_data_sheet(lines):
    assert all(line.ways[0].formula.mape < line.sheet.mape for line in lines)


def test_the_bounds_can_be_broken():
    """The same rows with an eighth more of everything than there is: the check is not blind."""
    h100 = catalogue.device_shipped("H100")
    faster = replace(h100, memory_bandwidth=h100.memory_bandwidth * 1.125, flops={k: v * 1.125 for k, v in h100.flops.items()})
    family, samples = tables.gemm()
    faster = replace(faster, tables={}, tried={})
    assert family_errors(family, faster, samples).mape > BOUNDS["GEMM bf16 (n, k >= 1024)"]
