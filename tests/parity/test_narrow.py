"""The last layer computes only the tokens that are asked for: the same bits as when all of them are."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from lockstep import LLM, SamplingParams
from lockstep.kernels.library import library
from lockstep.kernels.program import Program, StepArgs
from lockstep.testing.tiny import make_tiny

PROMPTS = [[5, 9, 17, 3, 88, 41, 7], [12, 4], list(range(20, 60)), [33]]


SPLITS = [("llama", {}), ("gemma2", {"tensor_parallel_size": 2}), ("llama", {"pipeline_parallel_size": 2})]


@pytest.mark.parametrize(("arch", "split"), SPLITS)
def test_tokens_and_logprobs_are_those_of_a_step_in_which_all_rows_are_asked_for(arch: str, split: dict[str, int], tmp_path: Path) -> None:
    """prompt_logprobs asks for every row of its step, so the whole layer is computed there."""
    room = {"max_num_batched_tokens": 32, "max_model_len": 128, "kv_cache_memory_bytes": 8 << 20}  # the longest prompt is cut
    llm = LLM(make_tiny(arch, tmp_path), enable_prefix_caching=False, device="cpu", threads_per_rank=1, **room, **split)  # type: ignore[arg-type]
    prompts: Any = [{"prompt_token_ids": p} for p in PROMPTS]

    def run(prompt_logprobs: int | None) -> list[Any]:
        params = SamplingParams(max_tokens=6, temperature=0, ignore_eos=True, logprobs=3, prompt_logprobs=prompt_logprobs)
        return llm.generate(prompts, params, use_tqdm=False)

    few, all_rows = run(None), run(0)
    llm.shutdown()
    for a, b in zip(few, all_rows, strict=True):
        assert a.outputs[0].token_ids == b.outputs[0].token_ids
        assert a.outputs[0].logprobs == b.outputs[0].logprobs
        assert a.prompt_logprobs is None and b.prompt_logprobs is not None


@pytest.mark.parametrize("wanted", [None, [0], [5], [0, 1, 2], [1, 4, 6], [0, 1, 2, 3, 4, 5, 6]])
def test_operations_after_narrow_see_the_wanted_rows_first(wanted: list[int] | None) -> None:
    lib: Any = library()
    assert lib is not None
    source, other, norm = torch.randn(7, 24), torch.randn(7, 5), torch.ones(24)
    out, before = torch.zeros(7, 24), source.clone()
    was = other.clone()
    program, step = Program(lib), StepArgs(lib)
    seen: list[int] = []
    program.add_stop("before", seen.append)
    program.narrow("narrow", source, other)
    program.add("norm", lib.op_norm(source.data_ptr(), 24, norm.data_ptr(), out.data_ptr(), 24, 24, 1e-6, False, 0))
    program.add_stop("after", seen.append)
    one, rows = np.ones(1, np.int64), np.array(wanted if wanted is not None else range(7), np.int64)
    step.set(
        ids=None,
        query_lens=one * 7,
        seq_lens=one * 7,
        block_tables=np.zeros((1, 1), np.int32),
        block_size=16,
        wanted=None if wanted is None else rows,
    )
    program.run(step)
    assert seen == [7, len(rows)] and step.wanted == len(rows)
    assert torch.equal(source[: len(rows)], before[rows]) and torch.equal(other[: len(rows)], was[rows])
    assert (out[: len(rows)] != 0).any(1).all() and not out[len(rows) :].any()


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_rows_are_moved_whole_by_any_number_of_threads(threads: int) -> None:
    """Each thread moves some columns of every row."""
    lib: Any = library()
    stream, heads, rows = torch.randn(40, 333), torch.randn(40, 17).bfloat16(), np.array([3, 4, 9, 20, 38], np.int64)
    wanted = stream[rows].clone(), heads[rows].clone()
    program, step = Program(lib), StepArgs(lib)
    program.narrow("narrow", stream, heads)
    one = np.ones(1, np.int64)
    tables = np.zeros((1, 1), np.int32)
    step.set(ids=None, query_lens=one * 40, seq_lens=one * 40, block_tables=tables, block_size=64, wanted=rows)
    lib.team_set(threads, 0, 0)
    try:
        program.run(step)
    finally:
        lib.team_set(1, 0, 0)
    assert torch.equal(stream[:5], wanted[0]) and torch.equal(heads[:5], wanted[1])


@pytest.mark.parametrize("wanted", [[], [1, 1], [2, 1], [-1], [7]])
def test_wanted_tokens_are_checked(wanted: list[int]) -> None:
    with pytest.raises(AssertionError):
        _set([7], [7], wanted=np.array(wanted, np.int64))


@pytest.mark.parametrize(
    ("queries", "seqs", "message"),
    [
        ([0], [7], "at least one token"),
        ([1, 8], [3, 7], "at most its length"),
        ([1], [17], "fewer blocks"),
        ([-1], [7], "at least one token"),
    ],
)
def test_rows_are_checked(queries: list[int], seqs: list[int], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        _set(queries, seqs)


def _set(queries: list[int], seqs: list[int], **more: Any) -> None:
    """Each row has one block of 16 tokens."""
    rows, tables = [np.array(numbers, np.int64) for numbers in (queries, seqs)], np.zeros((len(seqs), 1), np.int32)
    StepArgs(library()).set(ids=None, query_lens=rows[0], seq_lens=rows[1], block_tables=tables, block_size=16, **more)


def test_the_model_returns_the_wanted_rows_only(tmp_path: Path) -> None:
    """The steps of prompts, as the runner asks for them."""
    llm = LLM(make_tiny("llama", tmp_path), device="cpu", threads_per_rank=1, max_model_len=128, kv_cache_memory_bytes=8 << 20)
    runner = llm._client.core.executor._worker.runner  # type: ignore[attr-defined]
    seen: list[tuple[int, int]] = []
    forward = runner.model.forward

    def watched(ids: Any, *rest: Any) -> Any:
        hidden = forward(ids, *rest)
        seen.append((len(ids), len(hidden)))
        return hidden

    runner.model.forward = watched
    llm.generate([{"prompt_token_ids": p} for p in PROMPTS], SamplingParams(max_tokens=2, temperature=0), use_tqdm=False)
    logprobs = SamplingParams(max_tokens=3, temperature=0, ignore_eos=True, prompt_logprobs=0)
    llm.generate([{"prompt_token_ids": PROMPTS[0]}], logprobs, use_tqdm=False)
    llm.shutdown()
    total = sum(map(len, PROMPTS))
    assert seen == [(total, len(PROMPTS)), (len(PROMPTS), len(PROMPTS)), (len(PROMPTS[0]), len(PROMPTS[0])), (1, 1), (1, 1)], seen
