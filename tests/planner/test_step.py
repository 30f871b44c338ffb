"""A step's terms add up; pipelines are priced as they run; TP in a node and PP across is a result."""

import math
from dataclasses import replace
from pathlib import Path

import pytest

from lockstep.planner.catalogue import cluster
from lockstep.planner.crossover import REQUESTS, tp_or_pp
from lockstep.planner.find import find_model
from lockstep.planner.hardware import Link
from lockstep.planner.layer import Setting, Work
from lockstep.planner.layout import Layout
from lockstep.planner.load import Replica, Serving, Workload
from lockstep.planner.step import Pricer, Step
from lockstep.planner.terms import total_s
from lockstep.planner.words import ms

ROOT = Path(__file__).parents[2]
LAYOUTS = [Layout(), Layout(tp=8), Layout(tp=16), Layout(tp=4, pp=3), Layout(tp=8, pp=2), Layout(tp=4, cp=2), Layout(tp=16, dcp=2)]
ROUTED = [Layout(tp=4), Layout(tp=8, ep=8), Layout(tp=2, dp=4, ep=8), Layout(tp=4, pp=2, dp=2, ep=8, cp=1), Layout(tp=2, cp=2, dp=2, ep=8)]
CASES = [(m, x) for m in ("llama-3.1-70b", "gpt-oss-120b") for x in LAYOUTS]
CASES += [(m, x) for m in ("deepseek-v3", "mixtral-8x7b", "gpt-oss-120b") for x in ROUTED]


@pytest.mark.parametrize(("model", "layout"), CASES, ids=str)
def test_terms_add_up_to_what_the_search_used(model, layout):
    """Each time's terms, recomputed layer by layer, against the sums that the search keeps."""
    pricer = Pricer(Setting(find_model(model)[0], cluster("2x8xH100")))
    serving = Serving(step_overhead_s=0.001)
    replica = Replica(pricer, layout, Workload(3000, 200), 512, serving)
    for running in (1, 5, 64):
        point = replica.at(running)
        assert math.isclose(total_s(replica.tpot_terms(running)), point.tpot_s, rel_tol=1e-12)
        assert math.isclose(total_s(replica.ttft_terms(running)), point.ttft_s, rel_tol=1e-12)
        for term in replica.tpot_terms(running) + replica.ttft_terms(running):
            assert term.formula and term.source.startswith("docs/planner.md#"), term


def test_steady_decode_is_not_fill_and_drain():
    """Four equal stages of 1 ms: with 4 micro-batches in flight nothing idles; with 1, three quarters do."""
    step = Step(sum_s=4e-3, beat_s=1e-3, hop_s=0.0)
    for m in range(1, 9):
        assert math.isclose(m * 1e-3 / step.round_s(m), min(1.0, m / 4))  # what a stage works, of the time
    assert step.drain_s(8) == pytest.approx((4 - 1 + 8) * 1e-3)


def test_latencies_and_rate_grow_with_the_load():
    replica = Replica(
        Pricer(Setting(find_model("llama-3.1-70b")[0], cluster("8xH100"))), Layout(tp=8), Workload(2000, 300), 2048, Serving()
    )
    points = [replica.at(b) for b in (1, 2, 4, 8, 16, 32, 64, 128)]
    for name in ("ttft_s", "tpot_s", "rate"):
        values = [getattr(p, name) for p in points]
        assert values == sorted(values), name


def test_between_samples_a_larger_load_is_never_much_faster():
    """The search bisects over the load. Samples rise with their size; between two of them the formula may bend the other way."""
    for layout in (Layout(tp=2), Layout(tp=8), Layout(tp=4, pp=2)):
        replica = Replica(Pricer(Setting(find_model("llama-3.1-70b")[0], cluster("8xH100"))), layout, Workload(2000, 300), 2048, Serving())
        points = [replica.at(b).tpot_s for b in range(1, 200)]
        assert all(point >= 0.98 * max(points[: i + 1]) for i, point in enumerate(points)), layout


def crossover(machines):
    return tp_or_pp(Pricer(Setting(find_model("llama-3.1-70b")[0], machines)), 2150)


def test_tp_in_a_node_and_pp_across_is_a_result_and_flips_with_the_fabric(capsys):
    """On the reference cluster stages win; with links between nodes as fast as inside, and messages that hardly wait, the TP group does."""
    reference = cluster("2x8xH100")
    here = crossover(reference)
    assert here.from_requests is not None and here.rows[-1][1] > here.rows[-1][2]
    fast = Link(reference.inter.launch_s / 50, reference.inter.step_s / 50, 450e9)
    flipped = crossover(replace(reference, inter=fast))
    assert flipped.rows[0][1] < flipped.rows[0][2], "at one request half the weights are read by each rank"
    assert (flipped.from_requests or math.inf) > here.from_requests
    quick = crossover(replace(reference, inter=Link(0.0, 0.0, reference.inter.bandwidth)))
    assert quick.rows[0][1] < quick.rows[0][2] and (quick.from_requests or math.inf) > here.from_requests
    slow = crossover(replace(reference, inter=replace(reference.inter, bandwidth=7.8e9)))
    assert slow.from_requests == REQUESTS[0] and slow.rows[-1][1] / slow.rows[-1][2] > here.rows[-1][1] / here.rows[-1][2]
    print(here, flipped, quick, sep="\n")
    assert "sooner" in capsys.readouterr().out


def test_the_crossover_is_named_to_one_request_with_what_was_compared():
    reference = cluster("2x8xH100")
    large = tp_or_pp(Pricer(Setting(find_model("llama-3.1-405b")[0], reference)), 2150)
    start = large.from_requests
    (before, after), (last, first) = (next((tp, pp) for n, tp, pp in large.rows if n == at) for at in (start - 1, start))
    assert start not in REQUESTS and before <= after and first < last
    assert f"from {start} running requests on (steps without prompts: " in str(large)
    slow = crossover(reference)
    assert "at every load up to 256 running requests" in str(slow) and "if messages between nodes took no time, only from" in str(slow)
    assert ms(slow.rows[0][1]) in str(slow) and slow.free[0][1] < slow.free[0][2] < slow.rows[0][1]
    quicker = crossover(reference.with_links(inter=Link(0.0, 0.0, reference.inter.bandwidth)))
    assert quicker.from_requests > REQUESTS[0] and "below, the TP group over both nodes does" in str(quicker)


def test_a_window_bounds_what_a_layer_reads():
    shape = find_model("gpt-oss-120b")[0]
    pricer = Pricer(Setting(shape, cluster("8xH100")))

    def attention(context: float) -> float:
        return next(t.bytes for t in pricer.terms(Layout(tp=8), Work(True, 16, context)) if t.name == "attention")

    per_token = (attention(9000) - attention(8000)) / 1000
    assert per_token == pytest.approx(18 * 16 * 2 * 64 * 2)  # 18 full layers, 16 requests, K and V of one head of 64 in bf16


def test_every_term_names_a_section_of_the_document():
    headings = {
        line.lstrip("# ").strip().lower() for line in (ROOT / "docs" / "planner.md").read_text().splitlines() if line.startswith("## ")
    }
    for model, layout in CASES:
        replica = Replica(Pricer(Setting(find_model(model)[0], cluster("2x8xH100"))), layout, Workload(3000, 200), 512, Serving())
        for term in replica.tpot_terms(8) + replica.ttft_terms(8):
            assert term.source.removeprefix("docs/planner.md#") in headings, term
