"""`lockstep bench --profile`: a track for each process, spans inside each other, and hardly a moment unaccounted for."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections import defaultdict
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest

from lockstep import LLM, SamplingParams
from lockstep.kernels.library import library
from lockstep.testing.tiny import make_tiny

Span = dict[str, Any]
PARTS = {
    "kernels": ["embed", "layers.0.qkv", "layers.1.attention", "layers.1.down", "logits"],
    "torch": ["embed_tokens", "layers.0", "layers.1.self_attn", "layers.1.mlp", "norm", "logits"],
}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return make_tiny("llama", tmp_path_factory.mktemp("profile") / "tiny-llama", seed=0)


def recorded(model: Path, folder: Path, verb: str, *argv: str, kernels: str = "") -> tuple[list[dict[str, Any]], str]:
    """The events of the trace, and what was said."""
    command = [sys.executable, "-m", "lockstep", "bench", verb, str(model), "--repetitions", "1", "--json", *argv]
    environment = {**os.environ, "LOCKSTEP_KERNELS": kernels}
    done = subprocess.run([*command, "--profile", str(folder)], capture_output=True, text=True, timeout=170, check=False, env=environment)
    assert done.returncode == 0, done.stderr
    (path,) = folder.glob("trace-*.json")
    assert str(path) in done.stderr and all(json.loads(line)["metric"] for line in done.stdout.splitlines())
    document = json.loads(path.read_text())
    assert document["otherData"]["left_out"] == {} and "tiny-llama" in document["otherData"]["command"]
    return document["traceEvents"], done.stderr


def tracks(events: list[dict[str, Any]]) -> dict[str, list[Span]]:
    """Each process's spans by its name, outer ones before what is inside them."""
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    found: dict[str, list[Span]] = defaultdict(list)
    for e in events:
        if e["ph"] == "X":
            began = round(e["ts"] * 1e3)
            found[names[e["pid"]]].append({**e, "began": began, "ended": began + round(e["dur"] * 1e3)})
    return {name: sorted(spans, key=lambda s: (s["began"], -s["ended"])) for name, spans in found.items()}


def check_nesting(spans: list[Span]) -> None:
    """Each span lies beside the one before it, or wholly inside."""
    open_spans: list[Span] = []
    for span in spans:
        while open_spans and open_spans[-1]["ended"] <= span["began"]:
            open_spans.pop()
        assert not open_spans or span["ended"] <= open_spans[-1]["ended"], (open_spans[-1], span)
        open_spans.append(span)


def covered(step: Span, spans: list[Span], category: str) -> float:
    """The share of `step` that spans of `category` inside it account for. They must not overlap."""
    inside = [s for s in spans if s["cat"] == category and s["args"].get("step") == step["args"]["step"] and s is not step]
    assert all(a["ended"] <= b["began"] for a, b in pairwise(inside))
    return sum(s["ended"] - s["began"] for s in inside) / (step["ended"] - step["began"])


@pytest.mark.parametrize(("tp", "kernels"), [(1, ""), (1, "torch"), (2, "torch"), (2, "")])
def test_every_rank_has_a_track_that_accounts_for_its_steps(model: Path, tmp_path: Path, tp: int, kernels: str) -> None:
    way = "torch" if kernels == "torch" or library() is None else "kernels"
    argv = ["--batch-size", "2", "--input-len", "8", "--output-len", "6", "-tp", str(tp)]
    events, said = recorded(model, tmp_path, "latency", *argv, kernels=kernels)
    found = tracks(events)
    assert list(found) == ["engine", *(f"rank {rank}" for rank in range(tp))]
    for spans in found.values():
        check_nesting(spans)
    for rank in range(tp):
        spans = found[f"rank {rank}"]
        steps = [s for s in spans if s["name"] == f"step {s['args'].get('step')}"]
        assert [s["args"]["tokens"] for s in steps if s["args"]["tokens"]] == [16, 2, 2, 2, 2, 2]
        assert {"apply", "inputs", "forward", "sample"} <= {s["name"] for s in spans}
        for step in steps:
            assert covered(step, spans, "step") > 0.95
        per_step = len([s for s in steps if s["args"]["tokens"]])
        for part in PARTS[way]:
            assert [s["name"] for s in spans].count(part) == per_step, part
        collectives = [s for s in spans if s["cat"] == "collective"]
        assert bool(collectives) == (tp > 1)
        if way == "torch" and tp > 1:
            reduced = [s for s in collectives if s["name"] == "tp.all_reduce"]
            layers = json.loads((model / "config.json").read_text())["num_hidden_layers"]
            assert len(reduced) == per_step * (1 + 2 * layers), "the embedding, and each layer's attention and MLP"
            assert reduced[0]["args"]["bytes"] > reduced[-1]["args"]["bytes"] > 0
    check_engine(found, tp)
    assert f"rank {tp - 1}  forward" in said, "the table"


def check_engine(found: dict[str, list[Span]], tp: int) -> None:
    """The engine's steps are the ranks', and clocks agree: no rank begins a step before the engine gave it."""
    given = {s["args"]["step"]: s for s in found["engine"] if s["name"] == ("broadcast plan" if tp > 1 else "run step")}
    assert {"schedule", "wait for the ranks", "update", "detokenize"} <= {s["name"] for s in found["engine"]}
    for rank in range(tp):
        begun = {s["args"]["step"]: s for s in found[f"rank {rank}"] if s["name"].startswith("step ")}
        assert begun.keys() == given.keys() and len(given) >= 6
        assert all(given[step]["began"] <= span["began"] for step, span in begun.items())
        if tp == 1:
            assert all(span["ended"] <= given[step]["ended"] for step, span in begun.items())


def test_throughput_is_recorded_too(model: Path, tmp_path: Path) -> None:
    argv = ["--num-prompts", "3", "--input-len", "20", "--output-len", "4"]
    found = tracks(recorded(model, tmp_path, "throughput", *argv)[0])
    assert sum(s["args"]["tokens"] for s in found["rank 0"] if s["name"].startswith("step ")) == 3 * 23


@pytest.mark.skipif(library() is None, reason="needs the kernels")
def test_recording_what_is_computed_does_not_end_a_profile(model: Path, tmp_path: Path) -> None:
    """Both look into the program of operations, and the second one builds it anew."""
    with LLM(str(model)) as llm:
        llm.start_profile()
        llm.collective_rpc("record", ("",))
        llm.generate([[5, 6, 7]], SamplingParams(max_tokens=3, ignore_eos=True), use_tqdm=False)
        llm.collective_rpc("record", (str(tmp_path / "seen"),))
        path = llm.stop_profile().write(tmp_path)
    names = {event.get("name") for event in json.loads(Path(path).read_text())["traceEvents"]}
    assert "layers.0.qkv" in names and (tmp_path / "seen-rank0.npz").exists()


def test_a_folder_that_cannot_be_is_refused_before_anything_runs(model: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    command = [sys.executable, "-m", "lockstep", "bench", "latency", str(model), "--profile", str(tmp_path / "file" / "x")]
    done = subprocess.run(command, capture_output=True, text=True, timeout=100, check=False)
    assert done.returncode == 2 and "--profile=" in done.stderr and "Traceback" not in done.stderr
