"""Which layout wins: against every layout, chunk and load, one after the other."""

import math

import pytest

from lockstep.planner import plan
from lockstep.planner.catalogue import cluster
from lockstep.planner.choose import EQUAL, runs
from lockstep.planner.find import find_model
from lockstep.planner.layer import Setting
from lockstep.planner.layout import Layout
from lockstep.planner.load import Serving, Workload
from lockstep.planner.pareto import Mark
from lockstep.planner.search import Search, last_good, loads
from lockstep.planner.step import Pricer
from lockstep.planner.tradeoff import trade_off

UNEVEN = 1e-3  # one request more than full micro-batches may carry a little less: bisection passes over such a step
W = {"input_len": 2000, "output_len": 300}


def search_of(model, where, **ask):
    work = Workload(ask["input_len"], ask["output_len"], ask.get("rate"), ask.get("ttft"), ask.get("tpot"))
    return Search(Pricer(Setting(find_model(model)[0], cluster(where))), work, Serving())


def most_of(search, layout):
    """Requests per second of one deployment, at its best chunk and load within the promises."""
    found = 0.0
    for chunk in search.chunks():
        replica = search.replica(layout, chunk)
        loads = range(1, search.room(layout, chunk)[0] + 1)
        found = max([found, *(p.rate * layout.dp for p in map(replica.at, loads) if not search.work.misses(p))])
    return found


@pytest.mark.parametrize(
    ("model", "where", "ask"),
    [
        ("llama-3.1-70b", "2x8xH100", {"rate": 6.0, "ttft": 0.5, "tpot": 0.03}),
        ("llama-3.1-70b", "2x8xH100", {"rate": 11.0, "ttft": 0.5, "tpot": 0.04}),
        ("llama-3.1-70b", "1x8xH200", {"ttft": 0.8, "tpot": 0.025}),
        ("qwen3-8b", "1x4xH100", {"rate": 11.0, "tpot": 0.02}),
        ("mixtral-8x7b", "1x8xH100", {"rate": 9.0, "ttft": 0.6, "tpot": 0.02}),
    ],
)  # fmt: skip
def test_the_plan_is_that_of_trying_every_load(model, where, ask):
    found = plan(model, where, **W, **ask)
    search, rate = search_of(model, where, **W, **ask), ask.get("rate")
    best = (math.inf, -math.inf)
    for c in search.all():
        each = most_of(search, c.layout)
        assert search.refined(c).rate == pytest.approx(each, rel=UNEVEN), c.layout
        count = math.ceil(rate / each - 1e-9) if rate and each else c.at_most
        if each and count <= c.at_most:
            best = min(best, (count * c.devices if rate else 0, -each * count))
    assert found.meets
    assert (found.devices if rate else 0, found.admits["both"]) == (best[0], pytest.approx(-best[1], rel=UNEVEN))


@pytest.mark.parametrize("rate", [2.0, 4.0, 6.0, 8.0, 12.0])
def test_a_larger_cluster_never_needs_more_devices(rate):
    plans = [plan("llama-3.1-70b", f"{n}x8xH100", **W, rate=rate, ttft=0.5, tpot=0.03) for n in (1, 2, 4)]
    devices = [p.devices for p in plans if p.meets]
    assert devices and devices == sorted(devices, reverse=True)
    assert [p.meets for p in plans] == sorted(p.meets for p in plans)


def test_the_nearest_plan_misses_by_least_and_is_of_use():
    ask = {"rate": 20.0, "ttft": 0.5, "tpot": 0.03}
    found = plan("llama-3.1-70b", "8xL40S", **W, **ask)
    search = search_of("llama-3.1-70b", "8xL40S", **W, **ask)
    points = [search.replica(c.layout, c.chunk).at(1) for c in search.all() if c.fits]
    least = min(max(p.ttft_s / 0.5, p.tpot_s / 0.03) for p in points)
    assert least > 1 and not found.meets and runs(found.layout)
    assert max(found.ttft_s / 0.5, found.tpot_s / 0.03) <= least * EQUAL**2
    assert found.rate > min(p.rate for p in points)
    best = min(p.tpot_s for p in points)
    assert any(f"cannot be kept at any load (best {best * 1e3:.3g} ms at one request)" in miss for miss in found.misses)


def test_where_what_runs_goes_first_the_others_say_that_they_do_not_run():
    found = plan("llama-3.1-70b", "2x8xH100", **W, rate=1.0, ttft=0.02, tpot=0.04, margin=0.3)
    better = [r for r in found.runners if not runs(r.layout)]
    assert not found.meets and runs(found.layout) and better
    assert all("this version does not run context parallelism" in r.reason for r in better)
    kept = plan("llama-3.1-70b", "2x8xH100", **W, rate=1.0, ttft=0.5, tpot=0.04)
    assert not any("does not run" in r.reason for r in kept.runners), "that decided nothing here"


@pytest.mark.parametrize("tp", [3, 5, 6, 7])
def test_tp_of_any_size_is_looked_at(tp):
    layouts = {c.layout for c in search_of("llama-3.1-70b", "8xH100", **W).all()}
    assert Layout(tp=tp) in layouts


def test_tp_of_three_is_chosen_where_it_needs_fewest_devices(tmp_path):
    ask = {"rate": 1.7, "ttft": 0.5, "tpot": 0.035}
    small = tmp_path / "three.yaml"
    small.write_text("device: H100\ndevices_per_node: 3\n")
    for where in ("8xH100", str(small)):
        found = plan("llama-3.1-70b", where, **W, **ask)
        assert found.meets and found.devices == 3 and found.layout == Layout(tp=3), where
        assert " -tp 3 " in found.commands[0].line
    assert plan("llama-3.1-70b", "3x8xH100", **W, fixed={"tp": 24}).layout.tp == 24


def test_the_trade_off_is_that_of_pricing_every_load():
    search = search_of("qwen3-8b", "1x4xH100", **W, ttft=1.0, tpot=0.05)
    everything, marks = search.all(), []
    for c in everything:
        r = search.replica(c.layout, c.chunk)
        for p in map(r.at, loads(c.layout.pp, min(c.fits, r.most))):
            marks.append(Mark(str(c.layout), p.concurrency, 1 / p.tpot_s, p.rate * W["output_len"] * c.layout.dp / c.devices, p.ttft_s))
    both = {(m.user, m.device) for m in marks}
    best = sorted(m for m in both if not any(a >= m[0] and b >= m[1] and (a, b) != m for a, b in both))
    assert sorted((m.user, m.device) for m in trade_off(search, everything)) == best and len(best) > 5


@pytest.mark.parametrize("good", range(6))
def test_the_last_good_one_is_found_from_any_guess(good):
    for guess in range(9):
        asked: list[int] = []

        def bad(i: int, asked: list[int] = asked) -> bool:
            asked.append(i)
            return i >= good

        assert last_good(bad, 5, guess) == min(good, 5) - 1
        assert len(set(asked)) == len(asked) <= 5 and all(0 <= i < 5 for i in asked)


def test_with_one_token_there_is_no_time_between_tokens():
    asked = plan("llama-3.1-8b", "1x8xH100", input_len=500, output_len=1, rate=30.0, ttft=0.3, tpot=1e-9)
    free = plan("llama-3.1-8b", "1x8xH100", input_len=500, output_len=1, rate=30.0, ttft=0.3)
    assert asked.meets and (asked.layout, asked.point) == (free.layout, free.point)
    assert asked.to_json()["tpot_s"] is None
    assert not any("TPOT" in runner.reason for runner in asked.runners)


@pytest.mark.parametrize(("where", "fixed"), [
    ("2x8xH100", {"dp": 3}), ("2x8xH100", {"tp": 4, "dp": 3}), ("3x7xH100", {}), ("2x6xH100", {"dp": 5}), ("2x8xH100", {"pp": 3, "dp": 2}),
    ("3x8xH100", {"tp": 4, "dp": 5}), ("3x7xH100", {"ep": 4}), ("3x6xH100", {"ep": 4}), ("4x3xH100", {"ep": 2}), ("2x6xH100", {"cp": 2}),
])  # fmt: skip
def test_odd_splits_have_a_command_on_every_node_they_use(where, fixed):
    for ask in ({}, {"rate": 10.0, "ttft": 0.5, "tpot": 0.04}):
        found = plan("gpt-oss-20b" if "ep" in fixed else "llama-3.1-8b", where, **W, **ask, fixed=fixed)
        assert all(getattr(found.layout, axis) == size for axis, size in fixed.items())
        per_node = cluster(where).devices_per_node
        assert -(-found.devices // per_node) <= len({c.node for c in found.commands}) <= cluster(where).nodes


@pytest.mark.parametrize(("rate", "tpot"), [(2.0, 0.03), (0.5, 0.0375), (2.0, 0.035)])
def test_no_looser_promise_gives_a_nearer_plan(rate, tpot):
    found = plan("llama-3.1-405b", "2x8xH100", **W, rate=rate, ttft=0.5, tpot=tpot)
    looser = plan("llama-3.1-405b", "2x8xH100", **W, rate=0.1, ttft=0.5, tpot=0.0375)
    assert max(found.ttft_s / looser.ttft_s, found.tpot_s / looser.tpot_s) <= EQUAL**2, "of any chunk, not of the smallest only"
