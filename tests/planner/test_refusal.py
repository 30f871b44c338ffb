"""What cannot be planned: which rule refuses it, in the words of whoever asked."""

import json
from pathlib import Path

import pytest

from lockstep.cli.main import main
from lockstep.config.errors import ConfigError
from lockstep.planner import plan
from lockstep.planner.find import catalogue
from lockstep.planner.model import from_config
from tests.planner.test_host import SHAPE, entry, mode

RULES = [
    ("llama-3.1-8b", "3x8xH100", {"tp": 12}, "takes all 8 devices of each; use tp=8 or less, or a multiple of 8"),
    ("llama-3.1-8b", "8x8xH100", {"tp": 40}, "the model has 32 query heads to share out; use tp=32 at most"),
    ("llama-3.1-8b", "8xH100", {"tp": 4, "pp": 3}, "tp x cp x pp = 12 devices is more than the 8 there are"),
    ("llama-3.1-8b", "3x8xH100", {"tp": 4, "pp": 3, "cp": 1}, "12 devices is neither inside a node of 8 nor on whole nodes"),
    ("llama-3.1-8b", "3x8xH100", {"tp": 3, "pp": 8}, "groups of tp=3, cp=1 cut up by the border of a node of 8 devices"),
    ("llama-3.1-8b", "5x8xH100", {"pp": 12}, "its largest stage has 3 layers, as with fewer stages; use pp=11"),
    ("llama-3.1-8b", "5x8xH100", {"pp": 33}, "the model has 32 layers; use pp=32 at most"),
    ("llama-3.1-8b", "8xH100", {"ep": 2}, "the model has no experts; leave ep out"),
    ("mixtral-8x7b", "2x8xH100", {"ep": 16}, "the model has 8 experts; use ep=8 at most"),
    ("llama-3.1-8b", "8xH100", {"cp": 3}, "context groups are of 2, 4, 8 ... ranks; use cp=2"),
    ("llama-3.1-8b", "8xH100", {"cp": 8}, "must have 256 of the prompt's 1024 tokens or more; use cp=4 at most"),
    ("llama-3.1-8b", "8xH100", {"tp": 8, "dcp": 2}, "must repeat the same KV heads; use tp=16"),
    ("llama-3.1-8b", "8xH100", {"tp": 3, "dp": 3}, "there is room for 2 replicas of 3 devices"),
]


@pytest.mark.parametrize(("model", "where", "fixed", "words"), RULES, ids=str)
def test_an_axis_that_no_layout_has_is_refused_by_its_own_rule(model, where, fixed, words):
    with pytest.raises(ConfigError) as e:
        plan(model, where, fixed=fixed)
    assert words in str(e.value) and all(f"{axis}={n}" in str(e.value) for axis, n in fixed.items())


def test_a_calibrated_machine_says_how_many_ranks_were_measured(tmp_path: Path):
    with pytest.raises(ConfigError, match="measured 1 and 2 ranks, and tp x pp x dp = 4 or more is none of them"):
        plan(SHAPE, entry(tmp_path, mode(1), mode(2)), input_len=100, output_len=20, fixed={"tp": 4})


@pytest.mark.parametrize(
    ("ask", "words"),
    [
        ({"max_model_len": 0}, "max_model_len=0 must be at least 1"),
        ({"input_len": 100.5}, "input_len=100.5 must be at least 1 and whole"),
        ({"output_len": True}, "output_len=True must be"),
        ({"rate": True}, "rate=True must be more than 0"),
        ({"rate": "5"}, "rate='5' must be more than 0"),
        ({"price": -1.0}, "price=-1 must be 0 or more"),
        ({"margin": False}, "margin=False must be"),
        ({"fixed": {"foo": 1}}, "'foo': 1 is no axis with a size"),
        ({"fixed": {"tp": 2.0}}, "'tp': 2.0 is no axis with a size"),
        ({"hosts": ["a", "a"]}, "hosts=a,a names 1 different hosts"),
        ({"hosts": ["a", ""]}, "name each of them, once"),
    ],
    ids=str,
)
def test_what_python_may_hand_over_is_checked_as_the_command_line_is(ask, words):
    with pytest.raises(ConfigError) as e:
        plan("llama-3.1-8b", "2x8xH100", **ask)
    assert words in str(e.value)


@pytest.mark.parametrize(
    ("name", "digits", "words"),
    [
        ("rate", 400, "rate=1e+400 must be more than 0 and finite"),
        ("tpot", 400, "tpot=1e+400 must be more than 0 and finite"),
        ("price", 309, "price=1e+309 must be 0 or more and finite"),
        ("margin", 5000, "margin=1e+5000 must be at least 0 and below 1"),
        ("memory_share", 400, "gpu_memory_utilization=1e+400 must be greater than 0 and at most 1"),
    ],
)
def test_numbers_that_no_float_can_hold_are_refused_in_few_digits(name: str, digits: int, words: str):
    with pytest.raises(ConfigError) as e:
        plan("llama-3.1-8b", "2x8xH100", **{name: 10**digits})
    assert words in str(e.value)
    with pytest.raises(ConfigError, match=f"{words.partition('=')[0]}=-1e\\+{digits} "):
        plan("llama-3.1-8b", "2x8xH100", **{name: -(10**digits)})


@pytest.mark.parametrize("name", ["input_len", "output_len", "max_model_len"])
@pytest.mark.parametrize("digits", [30, 5000])
def test_lengths_that_no_context_has_are_refused_in_few_digits(name: str, digits: int):
    with pytest.raises(ConfigError, match=f"1e\\+{digits}") as e:
        plan("llama-3.1-8b", "2x8xH100", **{name: 10**digits})
    assert len(str(e.value)) < 200 and name in str(e.value)


def test_an_axis_that_no_cluster_has_is_refused_in_few_digits():
    for sign in ("-", ""):
        with pytest.raises(ConfigError, match=rf"'tp': {sign}1e\+5000 is no axis with a size from 1 to"):
            plan("llama-3.1-8b", "2x8xH100", fixed={"tp": int(f"{sign}1") * 10**5000})


def test_a_path_is_a_model_and_nothing_costs_nothing(tmp_path: Path):
    (tmp_path / "config.json").write_text(json.dumps(catalogue()["llama-3.1-8b"]["config"]))
    found = plan(tmp_path, "1xH100", price=0)
    assert found.cost_per_million == 0 and found.per_hour == 0 and found.model == str(tmp_path)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["llama-3.1-8b", "--input-len", "200000"], "error: --input-len=200000 and --output-len=256 make"),
        (["llama-3.1-8b", "--max-model-len", "9"], "--max-model-len=9 is less than --input-len=1024 and --output-len=256 together"),
        (["llama-3.1-8b", "--cluster", "2x8xH100", "--hosts", "a,a"], "--hosts=a,a names 1 different"),
    ],
)
def test_every_setting_of_a_message_is_spelled_as_its_flag(argv, words, capsys):
    assert main(["plan", *argv]) == 2
    assert words in capsys.readouterr().err


def test_a_folder_without_a_config_is_no_flag(tmp_path: Path, capsys):
    assert main(["plan", str(tmp_path)]) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"error: model {str(tmp_path)!r} has no config.json") and "--model" not in error


def test_a_model_whose_sizes_have_other_names_is_not_called_incomplete_alone(tmp_path: Path, capsys):
    (tmp_path / "config.json").write_text(json.dumps({"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12}))
    assert main(["plan", str(tmp_path)]) == 2
    assert "'hidden_size' is missing: this is not a complete model config, or model_type='gpt2' has other names" in capsys.readouterr().err


def test_no_cost_is_a_price(capsys):
    assert main(["plan", "llama-3.1-8b", "--price", "0", "--no-draw"]) == 0
    assert "$0.00 an hour" in capsys.readouterr().out


@pytest.mark.parametrize("change", [{"rope_scaling": {"rope_type": "yarn", "factor": 4.0}}, {"hidden_act": "relu"}, {"num_experts": 4}])
def test_what_the_engine_does_not_compute_is_planned_and_named(change):
    raw = {**catalogue()["qwen3-8b"]["config"]} | change | ({"num_experts_per_tok": 2} if "num_experts" in change else {})
    plain, shape = from_config(dict(catalogue()["qwen3-8b"]["config"]), "plain"), from_config(raw, "changed")
    found = plan(shape, "8xH100")
    assert shape.lacks and not found.startable and any("does not run" in note for note in found.notes)
    if "num_experts" in change:
        assert found.missing[0] == "MoE"
        return
    assert found.missing == [shape.lacks] and shape.params == plain.params
    assert found.tpot_s == plan(plain, "8xH100").tpot_s
