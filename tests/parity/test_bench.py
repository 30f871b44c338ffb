"""The benchmarks run, alternate with their peer, and give lines that say what they were measured on."""

import json
import subprocess
import sys

import pytest

from lockstep.cli.bench.latency import LatencyArgs, emit
from lockstep.cli.bench.result import Reporter
from lockstep.config.tree import EngineConfig
from lockstep.testing.tiny import make_tiny


def bench(*argv: str) -> tuple[int, list[dict], str]:
    done = subprocess.run(
        [sys.executable, "-m", "lockstep", "bench", *argv, "--json"], capture_output=True, text=True, timeout=170, check=False
    )
    return done.returncode, [json.loads(line) for line in done.stdout.splitlines()], done.stderr


@pytest.fixture(scope="module")
def model(tmp_path_factory):
    return make_tiny("llama", tmp_path_factory.mktemp("bench") / "tiny-llama", seed=0)


def test_throughput_beside_transformers(model):
    argv = ["throughput", str(model), "--num-prompts", "3", "--input-len", "20", "--output-len", "8", "--repetitions", "2"]
    code, lines, err = bench(*argv, "--compare", "transformers", "--dtype", "float32")
    assert code == 0, err
    by = {(line["engine"], line["metric"]): line for line in lines}
    ours, peer, ratio = (
        by["lockstep", "output_tokens_per_s"],
        by["transformers", "output_tokens_per_s"],
        by["lockstep/transformers", "ratio"],
    )
    assert len(ours["all"]) == len(peer["all"]) == len(ratio["all"]) == 2
    assert ratio["all"][0] == pytest.approx(ours["all"][0] / peer["all"][0], rel=1e-2)
    assert ratio["identical_outputs"] == 1.0
    assert ours["machine"]["commit"] and ours["tp"] == 1 and ours["output_tokens"] == 24
    assert "tiny-llama" in ours["command"] and str(model.parent) not in json.dumps(lines)
    assert {metric for engine, metric in by if engine == "limit"} == {"read_bandwidth_start", "read_bandwidth_end"}


def test_latency(model):
    code, lines, err = bench("latency", str(model), "--batch-size", "2", "--input-len", "8", "--output-len", "200", "--repetitions", "2")
    assert code == 0, err
    by = {line["metric"]: line for line in lines}
    assert {"time_to_first_token", "time_per_output_token", "decode_tokens_per_s", "end_to_end"} <= by.keys()
    assert by["end_to_end"]["value"] > 0 and by["time_to_first_token"]["batch_size"] == 2


def test_a_decode_that_drowns_in_noise_is_not_reported(capsys):
    report = Reporter(EngineConfig(), "demo", "lockstep bench latency", as_json=False)
    emit([(0.10, 0.11), (0.12, 0.11)], LatencyArgs(output_len=2), report)
    out, err = capsys.readouterr()
    assert "time_to_first_token" in out and "end_to_end" in out and "decode" not in out
    assert "--output-len must be larger" in err


@pytest.mark.parametrize(
    "argv,words",
    [
        (["latency", "--output-len", "1"], "--output-len=1"),
        (["latency", "--input-len", "2047"], "--input-len=2047 and --output-len=128 make 2175 tokens, more than the model's 2048"),
        (["throughput", "--input-len", "2000", "--output-len", "64"], "--output-len=64 make 2064 tokens"),
        (["collectives", "--budget-seconds", "nan"], "--budget-seconds=nan"),
        (["throughput", "--num-prompts", "0"], "--num-prompts=0"),
        (["thruput"], "Did you mean 'throughput'"),
    ],
)
def test_wrong_numbers_are_refused(argv, words):
    code, lines, err = bench(*argv)
    assert code == 2 and not lines and words in err and "Traceback" not in err
