"""How many KV blocks, sequences and tokens: exact numbers from what the ranks report."""

from __future__ import annotations

import logging
from dataclasses import replace

import pytest

from lockstep.config.defaults import activation_bytes_per_token, default_token_budget, most_num_seqs
from lockstep.config.errors import ConfigError
from lockstep.config.model_spec import ModelSpec
from lockstep.config.tree import CacheConfig, EngineConfig, ModelConfig, ParallelConfig, RuntimeConfig, SchedulerConfig
from lockstep.engine.sizing import plan_memory
from lockstep.executor.contract import RankMemory

SPEC = ModelSpec("LlamaForCausalLM", 64, 2, 4, 2, 16, 128, 258, 1024)


def config(*, length: int | None = 1024, cache: dict | None = None, **scheduler) -> EngineConfig:
    return EngineConfig(model=ModelConfig(max_model_len=length), cache=CacheConfig(**(cache or {})), scheduler=SchedulerConfig(**scheduler))


def rank(number: int = 0, free: int = 1 << 20, per_block: int = 1000) -> RankMemory:
    return RankMemory(rank=number, weight_bytes=5000, free_bytes=free, kv_bytes_per_block=per_block)


def test_blocks_are_what_fits_rounded_down():
    plan = plan_memory(config(), SPEC, [rank(free=100_999)])
    assert (plan.num_blocks, plan.kv_tokens) == (100, 1600)
    assert plan.kv_bytes(plan.ranks[0]) == 100_000
    assert "rank 0" in plan.limited_by


def test_the_rank_that_can_hold_the_fewest_blocks_decides_not_the_one_with_the_least_memory():
    ranks = [rank(0, free=90_000, per_block=500), rank(1, free=100_000, per_block=1000), rank(2, free=10**9)]
    plan = plan_memory(config(), SPEC, ranks)
    assert plan.num_blocks == 100 and "rank 1" in plan.limited_by
    assert [plan.kv_bytes(r) for r in ranks] == [50_000, 100_000, 100_000]


def test_a_rank_without_attention_layers_does_not_count():
    plan = plan_memory(config(), SPEC, [rank(0, free=100_000), rank(1, free=-5, per_block=0)])
    assert plan.num_blocks == 100
    assert plan_memory(config(max_num_seqs=2), SPEC, [rank(0, per_block=0)]).num_blocks == 128


def test_never_more_than_the_requests_can_use():
    plan = plan_memory(config(max_num_seqs=3, length=100), SPEC, [rank(free=10**9)])
    assert plan.num_blocks == 3 * 7 and "max_num_seqs=3" in plan.limited_by


def test_kv_cache_memory_bytes_replaces_what_is_free():
    assert plan_memory(config(cache={"kv_cache_memory_bytes": 70_500}), SPEC, [rank(free=10**9)]).num_blocks == 70
    assert plan_memory(config(cache={"kv_cache_memory_bytes": 70_500}), SPEC, [rank(free=0)]).num_blocks == 70


def test_memory_that_was_given_and_is_not_taken_is_told(caplog, monkeypatch):
    monkeypatch.setattr(logging.getLogger("lockstep"), "propagate", True)
    assert plan_memory(config(max_num_seqs=2, cache={"kv_cache_memory_bytes": 128_000}), SPEC, [rank()]).num_blocks == 128
    assert plan_memory(config(max_num_seqs=2), SPEC, [rank(free=10**9)]).num_blocks == 128
    assert not caplog.text
    assert plan_memory(config(max_num_seqs=2, cache={"kv_cache_memory_bytes": 1 << 20}), SPEC, [rank()]).num_blocks == 128
    assert "kv_cache_memory_bytes=1048576 (1.0 MiB): only 125.0 KiB are taken, because max_num_seqs=2 " in caplog.text


def test_num_gpu_blocks_override_is_taken_at_its_word():
    for blocks in (5, 10**6):
        plan = plan_memory(config(cache={"num_gpu_blocks_override": blocks}), SPEC, [rank()])
        assert plan.num_blocks == blocks
    assert "ends at 80 tokens" in plan_memory(config(cache={"num_gpu_blocks_override": 5}), SPEC, [rank()]).describe()
    with pytest.raises(ConfigError, match="num_gpu_blocks_override=0"):
        plan_memory(config(cache={"num_gpu_blocks_override": 0}), SPEC, [rank()])


@pytest.mark.parametrize(
    ("free", "fits", "missing"), [(63_999, 1008, "1 bytes"), (10_000, 160, "54,000 bytes"), (-1, None, "64,001 bytes")]
)
def test_when_not_one_request_fits_the_error_says_what_would(free, fits, missing):
    with pytest.raises(ConfigError) as caught:
        plan_memory(config(), SPEC, [rank(0, free=10**9), rank(1, free=free)])
    text = str(caught.value)
    assert "max_model_len=1024" in text and "rank 1" in text and f"{missing} are missing" in text
    assert f"{(fits or 0) // 16} blocks (" in text
    if fits is not None:
        assert f"at most {fits}" in text
        smaller = plan_memory(config(length=fits), SPEC, [rank(0, free=10**9), rank(1, free=free)])
        assert smaller.kv_tokens >= fits
        with pytest.raises(ConfigError):
            plan_memory(config(length=fits + 1), SPEC, [rank(0, free=10**9), rank(1, free=free)])


def test_one_request_that_just_fits_is_accepted():
    assert plan_memory(config(), SPEC, [rank(free=64_000)]).num_blocks == 64


@pytest.mark.parametrize(("free", "seqs"), [(10**9, 256), (64_000, 2), (320_000, 10)])
def test_the_default_number_of_requests_follows_the_memory(free, seqs):
    assert plan_memory(config(), SPEC, [rank(free=free)]).max_num_seqs == seqs
    assert plan_memory(config(max_num_seqs=77), SPEC, [rank(free=free)]).max_num_seqs == 77


def test_the_default_number_of_requests_is_at_most_the_token_budget():
    assert plan_memory(config(max_num_batched_tokens=100), SPEC, [rank(free=10**9)]).max_num_seqs == 100
    assert most_num_seqs(config(), 2048) == 256


def test_the_length_is_the_models_own_when_not_set():
    assert plan_memory(config(length=None), SPEC, [rank()]).max_model_len == 1024


def test_the_summary_has_every_number_exactly():
    text = plan_memory(config(), SPEC, [rank(0, free=2**21), rank(1, free=2**20 + 7, per_block=2048)]).describe()
    for part in ("512 blocks of 16 tokens = 8,192 tokens", "8.0 requests of 1,024", "2,048 tokens", "rank 0", "rank 1", "(5,000 B)"):
        assert part in text
    assert "1.0 MiB (1,048,576 B) (512 x 2,048 B)" in text and "(1,048,583 B)" in text and "0.5 MiB (512,000 B)" in text


def test_the_token_budget_follows_the_device_and_the_memory():
    cpu, cuda = config(), replace(config(), runtime=RuntimeConfig(device="cuda"))
    assert default_token_budget(cpu, SPEC) == 2048
    assert default_token_budget(cuda, SPEC) == 8192
    per_token = activation_bytes_per_token(cpu, SPEC)
    assert default_token_budget(cpu, SPEC, memory_bytes=16 * per_token * 2048) == 2048
    assert default_token_budget(cpu, SPEC, memory_bytes=16 * per_token * 2048 - 1) == 1024
    assert default_token_budget(cuda, SPEC, memory_bytes=1) == 512


def test_the_token_budget_as_set_is_kept_and_holds_every_row_and_whole_prompts():
    assert default_token_budget(config(max_num_batched_tokens=7), SPEC) == 7
    assert default_token_budget(config(max_num_seqs=3000), SPEC) == 3000
    assert default_token_budget(config(enable_chunked_prefill=False, length=5000), SPEC) == 5000
    assert default_token_budget(config(enable_chunked_prefill=False, length=None), SPEC) == 2048


def test_activations_shrink_with_the_split():
    one = activation_bytes_per_token(config(), SPEC)
    two = activation_bytes_per_token(replace(config(), parallel=ParallelConfig(tensor_parallel_size=2)), SPEC)
    half = activation_bytes_per_token(replace(config(), model=ModelConfig(dtype="bfloat16")), SPEC)
    # float32: 6 hidden sizes, and 4 times the MLP's columns, which here are more than 3 times all heads
    assert one == 4 * (6 * 64 + max(3 * 8 * 16, 4 * 128)) and two == 4 * (6 * 64 + max(3 * 4 * 16, 4 * 64))
    # the stream and attention are counted in float32, which norms and scores need
    assert half == 4 * (6 * 64 + 3 * 8 * 16)
