"""What benchmarks/planner_vs_engine.py makes of its measurements, on made-up ones: which speeds scale which line, and what fails."""

import importlib.util
import json
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from lockstep.config.model_spec import ModelSpec
from lockstep.engine.admission import Limits
from lockstep.planner.cpu import Scales
from lockstep.simulation.engine_steps import Run
from lockstep.simulation.measure import Speeds

FILE = Path(__file__).parents[2] / "benchmarks" / "planner_vs_engine.py"
SPEC = ModelSpec("LlamaForCausalLM", 64, 2, 4, 4, 16, 128, 1000, 512, layer_kinds=("full",) * 2, dtype="bfloat16")
LIMITS = Limits(max_num_seqs=8, max_num_batched_tokens=64, max_model_len=512, vocab_size=1000, num_blocks=64, block_size=16)
MODE = SimpleNamespace(bandwidth=1e10, flops=1e12, small_steps=[(1, 64, 1e-3), (4, 64, 2e-3)])
CALIBRATION = SimpleNamespace(mode=lambda ranks, busy: MODE)


@pytest.fixture(scope="module")
def bench():
    spec = importlib.util.spec_from_file_location("planner_vs_engine", FILE)
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module  # where its dataclasses look for their types
    spec.loader.exec_module(module)
    yield module
    del sys.modules[spec.name]


def seen_of(bench):
    """Three looks: memory at half its speed, flop/s at 0.8, steps twice as long, and one look that all neighbours disturbed. Of three
    batches of two requests the usual one has its first tokens after 0.2 s, then one every 0.1 s."""
    looks = [(5e9, 8e11, 2.0), (1e9, 1e11, 9.0), (5e9, 8e11, 2.0)]
    return bench.Measured(
        batches=[[[s * t for t in (0.2, 0.3, 0.4)]] * 2 for s in (1.0, 0.5, 5.0)],
        speeds=[Speeds(read, multiply) for read, multiply, _ in looks],
        small=[[Run(rows, prompt, 0.1, slow * step_s, 0.0) for rows, prompt, step_s in MODE.small_steps] for *_, slow in looks],
        after=[0, 2, 3],
        others=[0.1, 0.3],
        spec=SPEC,
        limits=LIMITS,
    )


def test_each_line_is_scaled_by_the_speeds_that_it_names(bench, monkeypatch):
    monkeypatch.setattr(bench, "predict", lambda spec, limits, setting, found, scales: scales)
    result = bench.compared(bench.SETTINGS[0], seen_of(bench), CALIBRATION)
    predicted = {how: pair[0] for how, pair in result.pairs.items()}
    assert predicted == {
        "all settings": Scales(0.5, 0.8, 0.5),
        "as calibrated": Scales(),
        "by bandwidth alone": Scales(0.5),
        "by bandwidth and flop/s": Scales(0.5, 0.8),
    }
    assert all(measured is result.measured for _, measured in result.pairs.values())
    assert result.measured == pytest.approx({"ttft": 0.2, "tpot": 0.1, "throughput": 6 / 0.4})
    assert result.other_cores == 0.3


def test_a_run_is_compared_again_from_its_file(bench, monkeypatch, tmp_path):
    monkeypatch.setattr(bench, "predict", lambda *given: {"ttft": 0.1, "tpot": 0.1, "throughput": 15.0})
    setting, seen = bench.SETTINGS[0], seen_of(bench)
    result = bench.compared(setting, seen, CALIBRATION)
    (tmp_path / "run").write_text("{}\n" + json.dumps(bench.saved(result, seen)) + "\n")
    assert bench.read(tmp_path / "run") == {setting: seen}
    assert bench.compared(setting, bench.read(tmp_path / "run")[setting], CALIBRATION) == result


@pytest.mark.parametrize(("errors", "models", "keeps"), [
    ((0.0, 0.09, 0.09, 0.30), ("demo",) * 4, True),  # median 9 %, mean 12 %
    ((0.0, 0.11, 0.11, 0.12), ("demo",) * 4, False),  # the median is above 10 %
    ((0.0, 0.0, 0.0, 0.61), ("demo",) * 4, False),  # the mean is above 15 %
    ((0.0, 0.0, 0.0, 0.12), ("demo", "demo", "demo", "llama-tiny"), False),  # other models than the calibration's
])  # fmt: skip
@pytest.mark.parametrize("figure", ["ttft", "tpot", "throughput"])
def test_the_bound_is_on_every_figure_and_on_other_models_too(bench, capsys, errors, models, keeps, figure):
    results = []
    for error, model in zip(errors, models, strict=True):
        measured = dict.fromkeys(bench.FIGURES, 1.0)
        predicted = {**measured, figure: 1 + error}
        setting = bench.Setting(model, 1, 1, 1, 1, 8, 8)
        results.append(bench.Result(setting, measured, predicted, *[measured] * 3, scales=Scales(), other_cores=0.0))
    assert bench.kept(results) is keeps
    assert "by bandwidth alone" in capsys.readouterr().out


def test_a_missing_calibration_is_told_without_a_stack(bench, monkeypatch, capsys, tmp_path):
    monkeypatch.setattr(sys, "argv", ["planner_vs_engine.py", "--calibration", str(tmp_path / "none.json")])
    with pytest.raises(SystemExit) as left:
        bench.main()
    assert left.value.code == 2 and "none.json" in capsys.readouterr().err
