"""Embeddings: transformers' last hidden states, and the same bits for every split, chunking, company and cache."""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch

from lockstep import LLM, SamplingParams
from lockstep.engine.errors import RequestError
from lockstep.protocol import Pooling
from lockstep.testing.tiny import VOCAB_SIZE, load_hf, make_tiny

POOLINGS: tuple[Pooling, ...] = ("last", "mean")
SMALL: dict[str, Any] = {"device": "cpu", "max_model_len": 160, "num_gpu_blocks_override": 60, "block_size": 16}
SPLITS: dict[str, dict[str, Any]] = {
    "tp2": {"tensor_parallel_size": 2},
    "tp3": {"tensor_parallel_size": 3},
    "pp2": {"pipeline_parallel_size": 2},
    "chunks of 7": {"max_num_batched_tokens": 7, "max_num_seqs": 3},
    "no cache": {"enable_prefix_caching": False},
}


def prompts() -> list[list[int]]:
    """Lengths of a chunk, a block, more and less; two with a beginning in common."""
    rng = np.random.default_rng(3)
    made = [rng.integers(1, VOCAB_SIZE - 8, n).tolist() for n in (1, 16, 33, 90, 7, 150)]
    return [*made, [*made[3][:64], 5, 6, 7]]


def embed(llm: LLM, given: Any, pooling: Pooling, **options: Any) -> list[list[float]]:
    return [o.outputs.embedding for o in llm.embed(given, pooling=pooling, use_tqdm=False, **options)]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return cache(lambda arch: make_tiny(arch, tmp_path_factory.mktemp(arch)))


@pytest.fixture(scope="module")
def llm(folders: Any) -> Iterator[LLM]:
    with LLM(str(folders("llama")), **SMALL) as made:
        yield made


@pytest.fixture(scope="module")
def alone(llm: LLM) -> dict[Pooling, list[list[float]]]:
    """One rank, one prompt at a time."""
    return {pooling: [embed(llm, prompt, pooling, normalize=False)[0] for prompt in prompts()] for pooling in POOLINGS}


@pytest.mark.parametrize("arch", ["llama", "gemma2", "qwen3"])
def test_vectors_are_transformers(arch: str, folders: Any) -> None:
    model = load_hf(folders(arch)).model
    with LLM(str(folders(arch)), dtype="float32", **SMALL) as llm:
        found = {pooling: embed(llm, prompts(), pooling, normalize=False) for pooling in POOLINGS}
    for i, prompt in enumerate(prompts()):
        with torch.no_grad():
            states = model(torch.tensor([prompt])).last_hidden_state[0].double()
        assert found["last"][i] == pytest.approx(states[-1].tolist(), rel=1e-3, abs=2e-3 * float(states.abs().max()))
        assert found["mean"][i] == pytest.approx(states.mean(0).tolist(), rel=1e-3, abs=2e-3 * float(states.abs().max()))


@pytest.mark.parametrize("split", SPLITS)
def test_no_split_and_no_chunking_changes_a_bit(split: str, folders: Any, alone: dict[Pooling, list[list[float]]]) -> None:
    with LLM(str(folders("llama")), **(SMALL | SPLITS[split])) as llm:
        for pooling in POOLINGS:
            assert embed(llm, prompts(), pooling, normalize=False) == alone[pooling]
            assert embed(llm, prompts(), pooling, normalize=False) == alone[pooling], "again, with all of it in the cache"
        assert llm.stats().kv_blocks_used == 0


def test_beside_requests_that_generate(llm: LLM, alone: dict[Pooling, list[list[float]]]) -> None:
    """They run in the same steps, and neither notices."""
    greedy = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    expected = [o.outputs[0].token_ids for o in llm.generate(prompts()[1:4], greedy, use_tqdm=False)]
    jobs = llm._jobs(prompts()[1:4], greedy, None, None)
    wanted = llm._jobs(prompts(), SamplingParams(max_tokens=1, detokenize=False), None, None, pooling="mean")
    last = {output.request_id: output for output in llm._run(jobs[:2] + wanted + jobs[2:])}
    assert [last[job.request_id].outputs[0].token_ids for job in jobs] == expected
    for job, vector in zip(wanted, alone["mean"], strict=True):
        packed = last[job.request_id].embedding
        assert packed is not None and np.frombuffer(packed, "<f4").tolist() == vector
        assert last[job.request_id].outputs[0].token_ids == [] and last[job.request_id].outputs[0].finish_reason == "stop"


def test_the_last_position_uses_the_cache_and_the_mean_does_not(llm: LLM) -> None:
    prompt = [9] * 100
    llm.embed(prompt, pooling="mean", use_tqdm=False)
    hits = llm.stats().prefix_hit_tokens
    llm.embed(prompt, pooling="mean", use_tqdm=False)
    assert llm.stats().prefix_hit_tokens == hits
    llm.embed(prompt, pooling="last", use_tqdm=False)
    assert llm.stats().prefix_hit_tokens == hits + 96


def test_length_and_dimensions(llm: LLM) -> None:
    (whole,) = embed(llm, "hello", "last")
    (cut,) = embed(llm, "hello", "last", dimensions=5)
    (raw,) = embed(llm, "hello", "last", normalize=False)
    assert len(whole) == len(raw) == 64 and math.hypot(*whole) == pytest.approx(1, abs=1e-6)
    assert cut == pytest.approx([x / math.hypot(*raw[:5]) for x in raw[:5]], abs=1e-6)


def test_what_cannot_be_is_refused(llm: LLM) -> None:
    with pytest.raises(ValueError, match="pooling='sum' is invalid"):
        llm.embed("a", pooling="sum")  # type: ignore[arg-type]
    with pytest.raises(ValueError, match="dimensions=65 is invalid"):
        llm.embed("a", dimensions=65)
    with pytest.raises(RequestError, match="161 tokens, and it exceeds max_model_len=160: shorten the prompt by 1 tokens"):
        llm.embed([5] * 161)
    assert len(embed(llm, [5] * 160, "mean")[0]) == 64, "the whole context fits: nothing is generated after it"


def test_a_replica_that_dies_is_not_seen(folders: Any, alone: dict[Pooling, list[list[float]]]) -> None:
    import os
    import signal

    with LLM(str(folders("llama")), data_parallel_size=2, **(SMALL | {"max_num_batched_tokens": 7, "max_num_seqs": 3})) as llm:
        jobs = llm._jobs(prompts(), SamplingParams(max_tokens=1, detokenize=False), None, None, pooling="mean")
        found: dict[str, bytes] = {}
        for output in llm._run(jobs):
            if not found:
                os.kill(llm._client.pids()[0], signal.SIGKILL)  # type: ignore[attr-defined]
            assert output.embedding is not None, output.error
            found[output.request_id] = output.embedding
    assert [np.frombuffer(found[job.request_id], "<f4").tolist() for job in jobs] == alone["mean"]
