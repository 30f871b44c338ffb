"""The analytic answer against the engine's own scheduler on a virtual clock, with the same prices."""

import pytest

from lockstep.cli.main import main
from lockstep.planner.answer import plan, pricer_of
from lockstep.simulation.planned import simulate_plan


@pytest.mark.parametrize("ask", [{"rate": 8.0, "fixed": {"tp": 4}}, {"fixed": {"tp": 8, "pp": 2}, "tpot": 0.02}], ids=str)
def test_time_per_token_and_rate_agree_with_the_scheduler(ask):
    found = plan("llama-3.1-70b", "2x8xH100", input_len=512, output_len=128, **ask)
    report = simulate_plan(found, pricer_of("llama-3.1-70b", "2x8xH100"))
    assert not [r for r in report.requests if r.refused]
    assert report.tpot_s(0.5) == pytest.approx(found.tpot_s, rel=0.2)
    assert report.throughput == pytest.approx(found.rate * 128, rel=0.2)


@pytest.mark.parametrize(("split", "rate", "input_len"), [((2, 2), 2.0, 2000), ((2, 4), 10.0, 512), ((1, 4), 0.4, 8000)], ids=str)
def test_a_prompt_holds_up_a_pipeline_for_as_long_as_the_schedule_says(split, rate, input_len):
    """Chunks of a prompt delay every stage in turn: without that, the answer is half of what the scheduler shows."""
    tp, pp = split
    ask = {"tp": tp, "pp": pp, "dp": 1, "cp": 1}
    found = plan("llama-3.1-70b", "8xH100" if tp > 1 else "8xH200", input_len=input_len, output_len=200, rate=rate, fixed=ask)
    report = simulate_plan(found, pricer_of("llama-3.1-70b", "8xH100" if tp > 1 else "8xH200"))
    assert report.tpot_s(0.5) == pytest.approx(found.tpot_s, rel=0.15)


def test_simulate_is_printed_after_the_plan(capsys):
    assert main(["plan", "qwen3-0.6b", "--cluster", "1x1xH100", "--output-len", "8", "--rate", "20", "--no-draw", "--simulate"]) == 0
    out = capsys.readouterr().out
    assert "stages busy" in out[out.index("on a virtual clock") :]
