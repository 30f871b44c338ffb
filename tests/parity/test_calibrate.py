"""Calibration on real ranks: every kind of operation is found, and the whole verb writes an entry that prices a step."""

from __future__ import annotations

import time
from pathlib import Path

import msgspec
import pytest

from lockstep.cli import main as cli
from lockstep.cli.calibrate_engine import IN_CACHES
from lockstep.config.tree import CacheConfig, EngineConfig, ModelConfig, ParallelConfig, RuntimeConfig, SchedulerConfig
from lockstep.executor.factory import make_executor
from lockstep.llm import LLM
from lockstep.planner import calibration
from lockstep.planner.cpu import CpuModel
from lockstep.planner.layout import Layout
from lockstep.planner.memory import weight_bytes
from lockstep.planner.model import from_spec
from lockstep.protocol import SamplingParams
from lockstep.simulation import measure
from lockstep.simulation.rounds import TINY

KINDS = {"angles", "embed", "norm", "qkv", "rope", "attention", "out", "gate_up", "down", "head"}


@pytest.mark.parametrize("ranks", [1, 2])
def test_ranks_time_every_kind_of_operation(ranks: int, tmp_path: Path):
    config = EngineConfig(
        model=ModelConfig(dtype="bfloat16", load_format="dummy", max_model_len=256),
        parallel=ParallelConfig(tensor_parallel_size=ranks, threads_per_rank=1),
        cache=CacheConfig(num_gpu_blocks_override=16),
        scheduler=SchedulerConfig(max_num_seqs=4, max_num_batched_tokens=256),
        runtime=RuntimeConfig(device="cpu"),
    )
    executor = make_executor(config, TINY, tmp_path)
    try:
        whole = measure.ask(executor, TINY, [measure.READ, measure.MULTIPLY], 0.2, tp=1, alone=True)
        cut = measure.ask(executor, TINY, [(2, 1, 8)], 0.1, tp=ranks, alone=False)
        lone = measure.ask(executor, TINY, [(1, 1, 8)], 0.1, tp=1, alone=True, only=1)
    finally:
        executor.shutdown()
    for times in (*whole.times, *cut.times, *lone.times):
        assert set(times) == KINDS and all(value > 0 for value in times.values())
    mode = measure.mode_of([whole], ranks=ranks, busy=ranks, threads=1, cache_bytes=32 << 20)
    assert [rates.rows for rates in mode.products] == [1, 256] and mode.bandwidth > 1e6 and mode.flops > 1e8


@pytest.mark.parametrize("ranks", [1, 2])
def test_an_engine_notes_how_much_of_its_steps_is_operations(ranks: int):
    """Every step while it is asked to, less than the steps took; and nothing of it stays."""
    params = SamplingParams(max_tokens=6, ignore_eos=True, temperature=0.0, detokenize=False)
    with LLM("", tensor_parallel_size=ranks, dtype="bfloat16", device="cpu", max_model_len=64, num_gpu_blocks_override=16) as llm:

        def tokens() -> list[int]:
            return llm.generate({"prompt_token_ids": [1, 2, 3]}, params)[0].outputs[0].token_ids

        plain = tokens()
        for _ in range(2):
            llm.collective_rpc("start_step_clock")
            began = time.perf_counter()
            assert tokens() == plain
            wall_s = time.perf_counter() - began
            for seconds in llm.collective_rpc("take_step_clock"):
                assert len(seconds) == 6 and min(seconds) > 0 and sum(seconds) < wall_s
        assert tokens() == plain


@pytest.mark.full
def test_the_verb_writes_an_entry_that_prices_a_step(tmp_path: Path):
    path = tmp_path / "here.json"
    assert cli.main(["calibrate", "--budget-seconds", "44", "--out", str(path)]) == 0
    found = calibration.load(path)
    assert [(mode.ranks, mode.busy) for mode in found.modes] == [(1, 1), (2, 2), (2, 1)]
    large = weight_bytes(from_spec(measure.MODELS[2], "large"), Layout())
    for mode in found.modes:
        assert mode.far_bytes == large and [(rows, prompt) for rows, prompt, _ in mode.small_steps] == list(IN_CACHES)
        assert min(seconds for *_, seconds in mode.small_steps) > 0
    assert found.device().calibrated and min(s for _, s in (*found.all_reduce, *found.send_recv)) > 0
    shape = from_spec(msgspec.convert(msgspec.to_builtins(measure.MODELS[1]), type(TINY)), "another")
    for layout in (Layout(), Layout(tp=2), Layout(pp=2), Layout(dp=2)):
        model = CpuModel(found, shape, layout)
        one, many = sum(model.stage_s([1], [64], 1)), sum(model.stage_s([1] * 16, [64] * 16, 16))
        assert 0 < one < many
