"""`distributed_executor_backend="external_launcher"`: every rank of a torchrun job has the answers of one process alone."""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

from lockstep.config.errors import ConfigError
from lockstep.llm import LLM
from lockstep.testing.ranks import run_ranks
from lockstep.testing.tiny import VOCAB_SIZE, make_tiny
from tests.distributed import external_script

JOBS = "tests.distributed.external_jobs"
ROOT = Path(__file__).parents[2]
GREEDY = {"temperature": 0.0, "max_tokens": 20, "ignore_eos": True}
SAMPLED = {"temperature": 0.9, "top_p": 0.95, "repetition_penalty": 1.2, "max_tokens": 12, "logprobs": 2, "prompt_logprobs": 1}
# 128 tokens of KV cache for 300 tokens of requests, in steps shorter than most prompts: chunks and preemption.
TIGHT = {"block_size": 16, "num_gpu_blocks_override": 8, "max_num_batched_tokens": 24, "max_num_seqs": 6, "max_model_len": 128}
ROOMY = {"kv_cache_memory_bytes": 4 << 20, "max_model_len": 128}


def prompts() -> list[list[int]]:
    rng = random.Random(1)
    return [[rng.randrange(1, VOCAB_SIZE - 5) for _ in range(n)] for n in (3, 17, 40, 90, 5, 33)]


def launch(tmp_path: Path, ranks: int, job: dict[str, Any], **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the job under torchrun, on a port that it finds."""
    (tmp_path / "job.json").write_text(json.dumps(job))
    command = [
        *(sys.executable, "-m", "torch.distributed.run", f"--nproc-per-node={ranks}", "--rdzv-backend=c10d"),
        *("--rdzv-endpoint=localhost:0", external_script.__file__, str(tmp_path / "job.json"), str(tmp_path)),
    ]
    environ = {**os.environ, "PYTHONPATH": str(ROOT), **variables}
    return subprocess.run(command, capture_output=True, text=True, timeout=150, cwd=ROOT, env=environ)


def lives_of(tmp_path: Path, ranks: int) -> list[list[dict[str, Any]]]:
    return [json.loads((tmp_path / f"rank{rank}.json").read_text()) for rank in range(ranks)]


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    folder = make_tiny("llama", tmp_path_factory.mktemp("llama"), num_hidden_layers=4)
    return {"model": str(folder), "threads_per_rank": 1}


@pytest.fixture(scope="module")
def alone(model: dict[str, Any]) -> list[Any]:
    """What one process with a roomy cache answers to GREEDY and SAMPLED, as it would come out of a file."""
    job = {"model": model, "prompts": prompts(), "params": [GREEDY, SAMPLED]}
    return json.loads(msgspec.json.encode(external_script.live(job, ROOMY)["outputs"]))


SPLITS = [
    pytest.param(2, 1, 1, ""),
    pytest.param(1, 2, 1, ""),
    pytest.param(1, 1, 2, ""),
    pytest.param(2, 2, 1, "", marks=pytest.mark.full),
    pytest.param(2, 1, 2, "", marks=pytest.mark.full),
    pytest.param(1, 2, 1, "gloo", marks=pytest.mark.full),
    pytest.param(2, 2, 1, "gloo", marks=pytest.mark.full),
]


@pytest.mark.parametrize(("tp", "pp", "dp", "communicator"), SPLITS)
def test_every_rank_answers_as_one_process_does(
    tp: int, pp: int, dp: int, communicator: str, model: dict[str, Any], alone: list[Any], tmp_path: Path
) -> None:
    """Two LLMs one after the other: a cache too small, then a roomy one with every comparison on."""
    sizes = {"tensor_parallel_size": tp, "pipeline_parallel_size": pp, "data_parallel_size": dp}
    common = {"distributed_executor_backend": "external_launcher", "distributed_timeout_seconds": 60.0, **sizes}
    lives = [{**common, **TIGHT}, {**common, **ROOMY, "check_collectives": True}]
    ranks = tp * pp * dp
    job = {"model": model, "prompts": prompts(), "params": [GREEDY, SAMPLED], "lives": lives}
    done = launch(tmp_path, ranks, job, **({"LOCKSTEP_COMMUNICATOR": communicator} if communicator else {}))
    assert done.returncode == 0, done.stderr[-4000:]
    for rank, (tight, roomy) in enumerate(lives_of(tmp_path, ranks)):
        replica = rank // (tp * pp)
        for life in (tight, roomy):
            assert (life["replica"], life["pings"], life["depth"]) == (replica, list(range(tp * pp)), pp)
            assert [m["rank"] for m in life["memory"]] == list(range(tp * pp))
        assert tight["outputs"][0] == roomy["outputs"][0] == alone[0][replica::dp]
        if dp == 1:  # else requests have other numbers, and so other seeds
            assert tight["outputs"][1] == roomy["outputs"][1] == alone[1]
            assert tight["preemptions"] > 0, "the cache was meant to be too small"


def test_ranks_of_a_replica_have_the_same_everything(model: dict[str, Any], tmp_path: Path) -> None:
    """Sizes found from the memory that is free, too: each rank looked at another moment. And a rank that raises ends the job."""
    settings = {"tensor_parallel_size": 2, "distributed_executor_backend": "external_launcher", "gpu_memory_utilization": 0.05}
    job = {"model": model, "prompts": prompts()[:2], "params": [GREEDY], "lives": [{**settings, "max_model_len": 128}]}
    done = launch(tmp_path, 2, job)
    assert done.returncode == 0, done.stderr[-4000:]
    (first,), (second,) = lives_of(tmp_path, 2)
    assert first == second
    began = time.monotonic()
    done = launch(tmp_path, 2, {**job, "params": [SAMPLED], "raise": 0})
    assert done.returncode != 0
    assert "rank 0 raised AttributeError in step 0" in done.stderr
    assert time.monotonic() - began < 60


@pytest.mark.full
def test_the_demo_model(tmp_path: Path) -> None:
    room = {"kv_cache_memory_bytes": 32 << 20, "max_model_len": 256}
    code = ["def add(a, b):", "import os", "class Foo"]
    job = {"model": {"threads_per_rank": 1}, "prompts": code, "params": [{"temperature": 0.0, "max_tokens": 24}]}
    want = json.loads(msgspec.json.encode(external_script.live(job, room)["outputs"]))
    split = {"tensor_parallel_size": 2, "distributed_executor_backend": "external_launcher", **room}
    done = launch(tmp_path, 2, {**job, "lives": [split]})
    assert done.returncode == 0, done.stderr[-4000:]
    assert [lives[0]["outputs"] for lives in lives_of(tmp_path, 2)] == [want, want]


@pytest.mark.full
def test_too_many_processes_are_refused_by_name(model: dict[str, Any], tmp_path: Path) -> None:
    settings = {"distributed_executor_backend": "external_launcher", **ROOMY}
    done = launch(tmp_path, 2, {"model": model, "prompts": prompts(), "params": [GREEDY], "lives": [settings]})
    assert done.returncode != 0
    assert "the launcher started WORLD_SIZE=2 processes" in done.stderr and "torchrun --nproc-per-node=1" in done.stderr


def test_without_a_launcher_it_says_how_to_start(model: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    with pytest.raises(ConfigError, match=r"RANK, .* are not in the environment: start it with torchrun --nproc-per-node=2"):
        LLM(**model, tensor_parallel_size=2, distributed_executor_backend="external_launcher")


@pytest.mark.parametrize(("ranks", "pp"), [(1, 1), (2, 1), (2, 2), pytest.param(4, 2, marks=pytest.mark.full)])
def test_the_executors_contract_on_every_rank(ranks: int, pp: int) -> None:
    reports = run_ranks(f"{JOBS}:contract", ranks, pp)
    for report in reports:
        assert report["memory"] == [(rank, 7 * 64) for rank in range(ranks)]
        assert report["tokens"] == [[step * 1000, step * 1000 + 3] for step in range(20)]
        assert report["depth"] == pp
        assert report["raised"] == "rank 0 raised KeyError in call misbehave: 'oops'"
        assert report["echo"] == [[rank, [[1, "a", None]], {"k": rank}] for rank in range(ranks)]


@pytest.mark.parametrize("communicator", ["shm", "gloo"])
@pytest.mark.parametrize(
    ("how", "culprit", "words"),
    [
        ("step", 0, "rank 0 raised KeyError in step 1: 'broken'"),
        ("plan", 1, "rank 1 planned step 1 of 5 tokens"),
        ("call", 1, "rank 1 called ping, but rank 0 called seen_steps"),
    ],
)
def test_a_rank_that_goes_its_own_way_is_named_on_all(how: str, culprit: int, words: str, communicator: str) -> None:
    for report in run_ranks(f"{JOBS}:failing", 2, how, environ={"LOCKSTEP_COMMUNICATOR": communicator}):
        assert words in report["error"] and report["rank"] == culprit
        assert report["seconds"] < 20


def test_what_ranks_or_programs_do_not_agree_on_is_refused() -> None:
    for differs, second, sizes in run_ranks(f"{JOBS}:refused", 2):
        assert "execute_model_timeout_seconds is 10.0 on rank 0 and 11.0 on rank 1" in differs
        assert "another LLM of this process" in second and "shutdown()" in second
        assert "tensor parallel group already initialized" in sizes and "initialize_model_parallel()" in sizes
