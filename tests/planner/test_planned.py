"""The analytic answer against the engine's own scheduler on a virtual clock, with the same prices."""

import json
from dataclasses import replace

import pytest

from lockstep.cli.main import main
from lockstep.planner.answer import plan, pricer_of
from lockstep.planner.words import ms
from lockstep.simulation.planned import simulate_plan


@pytest.mark.parametrize("ask", [{"rate": 8.0, "fixed": {"tp": 4}}, {"fixed": {"tp": 8, "pp": 2}, "tpot": 0.02}], ids=str)
def test_time_per_token_and_rate_agree_with_the_scheduler(ask):
    found = plan("llama-3.1-70b", "2x8xH100", input_len=512, output_len=128, **ask)
    done = simulate_plan(found, pricer_of("llama-3.1-70b", "2x8xH100"))
    assert not [r for r in done.report.requests if r.refused]
    assert done.window.tpot_s(0.5) == pytest.approx(found.tpot_s, rel=0.2)
    assert done.window.throughput * found.layout.dp == pytest.approx(found.rate * 128, rel=0.2)


@pytest.mark.parametrize(("split", "rate", "input_len"), [((2, 2), 2.0, 2000), ((2, 4), 10.0, 512), ((1, 4), 0.4, 8000)], ids=str)
def test_a_prompt_holds_up_a_pipeline_for_as_long_as_the_schedule_says(split, rate, input_len):
    """Chunks of a prompt delay every stage in turn: without that, the answer is half of what the scheduler shows."""
    tp, pp = split
    ask = {"tp": tp, "pp": pp, "dp": 1, "cp": 1}
    found = plan("llama-3.1-70b", "8xH100" if tp > 1 else "8xH200", input_len=input_len, output_len=200, rate=rate, fixed=ask)
    window = simulate_plan(found, pricer_of("llama-3.1-70b", "8xH100" if tp > 1 else "8xH200")).window
    assert window.tpot_s(0.5) == pytest.approx(found.tpot_s, rel=0.15)


def run(capsys, *argv: str) -> str:
    assert main(["plan", "qwen3-0.6b", "--cluster", "1x1xH100", "--output-len", "8", "--no-draw", "--simulate", *argv]) == 0
    return capsys.readouterr().out


def test_simulate_is_printed_after_the_plan(capsys):
    out = run(capsys, "--rate", "20", "--tpot", "0.002")
    shown = out[out.index("on a virtual clock") :]
    assert "20 requests/s, at random" in shown and "stages busy" not in shown, "one request at a time keeps a stage as busy as many do"
    data = json.loads(run(capsys, "--rate", "20", "--tpot", "0.002", "--json"))
    simulation, added = data["simulation"], [t["seconds"] for t in data["ttft_terms"] if t["name"] == "arrival"]
    assert simulation["analytic_ttft_without_server_s"] == pytest.approx(data["ttft_s"] - sum(added)) and len(added) == 1
    assert any(t["name"] == "waiting for prompts before it" for t in data["ttft_terms"]), "that the simulation has, too"
    assert f"{ms(simulation['analytic_ttft_without_server_s'])} without a server's arrival, which is not here" in shown
    assert simulation["rate_simulated"] == simulation["rate_asked"] == 20 and simulation["seconds"] >= 60
    assert simulation["requests_of_a_replica"] >= 300 and not simulation["short"]
    assert simulation["misses"] == [] and "p50, p90 and p99 keep them" in shown


def test_without_a_rate_nothing_simulated_has_a_server_s_queue(capsys):
    data = json.loads(run(capsys, "--tpot", "0.002", "--json"))
    added = [t["seconds"] for t in data["ttft_terms"] if t["name"] in ("arrival", "queue")]
    assert data["simulation"]["analytic_ttft_without_server_s"] == pytest.approx(data["ttft_s"] - sum(added)) and len(added) == 2
    assert "without a server's arrival and queue" in run(capsys, "--tpot", "0.002")


def test_one_token_has_no_time_between_tokens_here_either(capsys):
    out = run(capsys, "--rate", "20", "--output-len", "1", "--tpot", "1e-9")
    assert "TPOT          -" in out[out.index("on a virtual clock") :] and "p50, p90 and p99 keep them" in out
    assert set(json.loads(run(capsys, "--rate", "20", "--output-len", "1", "--json"))["simulation"]["tpot_s"].values()) == {None}


def test_percentiles_are_held_against_the_promises():
    found = plan("qwen3-0.6b", "1x1xH100", output_len=8, rate=20.0)
    done = simulate_plan(found, pricer_of("qwen3-0.6b", "1x1xH100"))
    between = (done.window.ttft_s(0.5) + done.window.ttft_s(0.9)) / 2
    asked = replace(done, plan=replace(found, work=replace(found.work, ttft_s=between, tpot_s=1e-6)))
    median, p90 = done.window.tpot_s(0.5), done.window.ttft_s(0.9)
    assert asked.misses() == [f"p90 TTFT {ms(p90)} misses {ms(between)}", f"p50 TPOT {ms(median)} misses 0.00 ms"]
    assert asked.misses()[0] in asked.describe() and asked.to_json()["misses"] == asked.misses()


def test_a_load_that_is_not_the_one_asked_for_is_said(capsys):
    out = run(capsys, "--rate", "100000")
    rate = json.loads(run(capsys, "--rate", "100000", "--json"))["simulation"]["rate_simulated"]
    assert f"{rate:.3g} requests/s, what this plan carries; not the 100000 asked for" in out and rate < 100_000


def test_clients_that_ask_again_begin_one_after_the_other_and_only_the_steady_middle_counts():
    """All at once, the last prompt waits for all others: a hundred times the wait that the load has."""
    found = plan("llama-3.1-8b", "2xH100", input_len=1000, output_len=100, tpot=0.02)
    done = simulate_plan(found, pricer_of("llama-3.1-8b", "2xH100"))
    running = found.point.concurrency
    assert found.layout.dp == 2 and {r.replica for r in done.report.requests} == {0}, "replicas are equal: one of them is played"
    first = [r.arrival_s for r in done.report.requests[: running // 2]]
    assert len(set(first)) == len(first) and first == sorted(first)
    assert done.window.ttft_s(0.9) < 5 * done.analytic_ttft_s
    assert done.window.rate * 2 == pytest.approx(found.rate, rel=0.2)
    assert all(done.window.since_s < r.token_s[-1] <= done.window.until_s for r in done.window.ended)


def test_a_load_that_would_take_minutes_is_refused_with_what_to_do(capsys):
    argv = ["plan", "llama-3.1-70b", "--cluster", "8xH200", "--fix", "tp=8", "--input-len", "10", "--output-len", "3000", "--simulate"]
    assert main(argv) == 2
    error = capsys.readouterr().err
    assert "--simulate" in error and "give a lower --rate" in error and error.count("\n") == 1


@pytest.mark.parametrize(
    ("fix", "lengths"), [("tp=2,pp=4", (1024, 256)), ("tp=4,pp=2", (1024, 256)), ("tp=2,pp=4", (256, 256)), ("tp=1,pp=8", (2000, 300))]
)
def test_a_pipeline_carries_what_the_scheduler_gets_done(capsys, fix, lengths):
    """Steps with two prompts hold up those with one: formulas that leave it out give the first of these 15 % more than it carries."""
    lengths = ["--input-len", str(lengths[0]), "--output-len", str(lengths[1])]
    argv = ["plan", "llama-3.1-70b", "--cluster", "8xH100", "--fix", f"{fix},dp=1,cp=1,dcp=1", *lengths, "--simulate", "--json"]
    assert main(argv) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["rate"] == pytest.approx(found["simulation"]["rate"], rel=0.06)
    assert found["tpot_s"] == pytest.approx(found["simulation"]["tpot_s"]["mean"], rel=0.08)
    assert found["band"]["tpot"] > 0.25 and any("--simulate" in note for note in found["notes"])


@pytest.mark.parametrize(("rate", "overloaded"), [("10", False), ("30", True)])
def test_a_queue_that_does_not_grow_is_no_overload(capsys, rate, overloaded):
    argv = ["plan", "llama-3.1-70b", "--cluster", "8xH100", "--fix", "pp=8,dp=1,cp=1,dcp=1", "--rate", rate, "--simulate", "--json"]
    assert main(argv) == 0
    assert json.loads(capsys.readouterr().out)["simulation"]["overloaded"] is overloaded
