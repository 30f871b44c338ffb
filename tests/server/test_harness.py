"""An evaluation harness, lm-eval, against a real server: a task of ten questions, scored as offline inference scores them."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import subprocess
import sys
import venv
from pathlib import Path
from typing import Any

import pytest

from lockstep import LLM, SamplingParams
from lockstep.testing.server import running_server
from lockstep.utils import env

FOLDER = Path(__file__).parent / "harness"
QUESTIONS: list[dict[str, Any]] = [json.loads(line) for line in (FOLDER / "questions.jsonl").read_text().splitlines()]
TASK = "ten_questions"
SETTINGS = {
    "task": TASK,
    "dataset_path": "json",
    "dataset_kwargs": {"data_files": {"test": str(FOLDER / "questions.jsonl")}},
    "test_split": "test",
    "output_type": "multiple_choice",
    **{f"doc_to_{name}": f"{{{{{field}}}}}" for name, field in (("text", "question"), ("choice", "choices"), ("target", "answer"))},
    "metric_list": [{"metric": "acc"}],
}


def harness() -> Path:
    """The python of an environment with lm-eval (it needs no torch), in lockstep's cache folder; made on first use, in a minute."""
    wanted = hashlib.sha256((FOLDER / "requirements.txt").read_bytes()).hexdigest()[:12]
    folder = env.cache_folder() / f"harness-{wanted}"
    folder.mkdir(parents=True, exist_ok=True)
    python = folder / "bin" / "python"
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / ".ready").exists():
            venv.create(folder, with_pip=True)
            install = [str(python), "-m", "pip", "install", "-q", "-r", str(FOLDER / "requirements.txt")]
            done = subprocess.run(install, capture_output=True, text=True, timeout=600, stdin=subprocess.DEVNULL)
            assert done.returncode == 0, done.stderr[-2000:]
            (folder / ".ready").touch()
    return python


def evaluate(url: str, folder: Path) -> tuple[float, list[list[float]]]:
    """The harness's accuracy, and the log-likelihood of every choice of every question."""
    (folder / "task.yaml").write_text(json.dumps(SETTINGS))  # JSON is YAML
    served = f"model=lockstep-demo,base_url={url}/v1/completions,num_concurrent=4,max_retries=1"
    command = [str(harness()), "-m", "lm_eval", "run", "--model", "local-completions", "--model_args", served, "--tasks", TASK]
    command += ["--include_path", str(folder), "--output_path", str(folder / "found"), "--log_samples"]
    offline = {"HF_HUB_OFFLINE": "1", "HF_HOME": str(folder / "home"), "PYTHONPATH": ""}
    settings = {**os.environ, **offline}
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=300, stdin=subprocess.DEVNULL, cwd=folder)
    assert done.returncode == 0, done.stderr[-4000:]
    (results,) = (folder / "found").rglob("results_*.json")
    (samples,) = (folder / "found").rglob("samples_*.jsonl")
    told = sorted((json.loads(line) for line in samples.read_text().splitlines()), key=lambda sample: sample["doc_id"])
    likelihoods = [[float(choice[0]) for choice in sample["filtered_resps"]] for sample in told]
    return json.loads(results.read_text())["results"][TASK]["acc,none"], likelihoods


def offline() -> list[list[float]]:
    """The same numbers from the log-probabilities of prompts that `LLM` gives."""
    with LLM(cpu_binding=False) as llm:
        tokenizer = llm.get_tokenizer()

        def likelihood(question: str, choice: str) -> float:
            start = len(tokenizer(question, add_special_tokens=False)["input_ids"])
            ids = tokenizer(f"{question} {choice}", add_special_tokens=False)["input_ids"]
            sampling = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=0)
            found = llm.generate({"prompt_token_ids": ids}, sampling, use_tqdm=False)[0].prompt_logprobs or []
            return sum(at[token].logprob for at, token in zip(found[start:], ids[start:], strict=True) if at)

        return [[likelihood(one["question"], choice) for choice in one["choices"]] for one in QUESTIONS]


@pytest.mark.full
@pytest.mark.timeout(1200)
def test_the_harness_finds_what_offline_inference_finds(tmp_path: Path) -> None:
    expected = offline()
    right = [max(range(len(row)), key=row.__getitem__) == one["answer"] for row, one in zip(expected, QUESTIONS, strict=True)]
    with running_server() as server:
        accuracy, found = evaluate(server.url, tmp_path)
    assert [len(row) for row in found] == [len(one["choices"]) for one in QUESTIONS]
    for row, want in zip(found, expected, strict=True):
        assert row == pytest.approx(want, abs=1e-4)
    assert accuracy == pytest.approx(sum(right) / len(right))
    print(f"lm-eval: acc {accuracy:.2f} of {len(right)} questions, {sum(map(len, found))} choices", file=sys.stderr)
