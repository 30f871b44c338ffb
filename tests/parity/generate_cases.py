"""One engine life that meets everything at once, and what transformers generates for the same prompts.

Wave 1: mixed prompts in a cache too small for them (preemption), under a budget smaller than most (chunked prefill).
Wave 2: one of them again, and one that begins like another: both find blocks in the prefix cache.
"""

from __future__ import annotations

import random
from collections import deque
from pathlib import Path
from typing import Any

import torch

from lockstep.config.tree import CacheConfig, EngineConfig, ModelConfig, ParallelConfig, RuntimeConfig, SchedulerConfig
from lockstep.engine.core import EngineCore
from lockstep.protocol import EngineRequest, SamplingParams

NEW_TOKENS = 24
LENGTHS = (3, 17, 40, 90, 1, 33)
SHARED = 32  # tokens that the last prompt of wave 2 has in common with one of wave 1
TIGHT = {"block_size": 4, "blocks": 48, "budget": 24, "seqs": 6}  # 192 tokens of KV cache for 328 tokens of requests
ROOMY = {"block_size": 16, "blocks": 64, "budget": 512, "seqs": 16}


def make_prompts(vocab: int, seed: int = 0) -> list[list[int]]:
    """Wave 1's prompts, then wave 2's two."""
    rng = random.Random(seed)
    first = [[rng.randrange(1, vocab) for _ in range(n)] for n in LENGTHS]
    return [*first, first[2], first[3][:SHARED] + [rng.randrange(1, vocab) for _ in range(20)]]


def engine_config(
    folder: str | Path, tp: int, size: dict[str, int], *, device: str = "cpu", length: int = 160, **parallel: Any
) -> EngineConfig:
    """fp32; every size of `size` set by hand."""
    return EngineConfig(
        model=ModelConfig(model=str(folder), dtype="float32", max_model_len=length),
        parallel=ParallelConfig(tensor_parallel_size=tp, threads_per_rank=1, check_collectives=tp > 1, **parallel),
        cache=CacheConfig(block_size=size["block_size"], num_gpu_blocks_override=size["blocks"]),
        scheduler=SchedulerConfig(max_num_seqs=size["seqs"], max_num_batched_tokens=size["budget"]),
        runtime=RuntimeConfig(device=device),  # type: ignore[arg-type]
    )


def request(name: str, prompt: list[int], max_tokens: int = NEW_TOKENS, **sampling: Any) -> EngineRequest:
    """A greedy request that stops for nothing but its length, unless `sampling` says otherwise."""
    params = SamplingParams(**({"temperature": 0.0, "ignore_eos": True, "max_tokens": max_tokens} | sampling))
    return EngineRequest(request_id=name, prompt_token_ids=prompt, sampling=params, seed=params.seed or 0)


def drain(core: EngineCore) -> dict[str, list[int]]:
    """Step until nothing is unfinished; every request's tokens. Asserts that none ended badly."""
    tokens: dict[str, list[int]] = {}
    while core.has_unfinished():
        for out in core.step():
            assert out.error is None and out.finish_reason in (None, "length", "stop"), out
            tokens.setdefault(out.request_id, []).extend(out.new_token_ids)
    return tokens


def run_waves(core: EngineCore, prompts: list[list[int]]) -> list[list[int]]:
    """Both waves through one engine; the tokens of each prompt, in order."""
    waves = deque([range(len(LENGTHS)), range(len(LENGTHS), len(prompts))])
    tokens: dict[str, list[int]] = {}
    while waves:
        for i in waves.popleft():
            core.add_request(request(str(i), prompts[i]))
        tokens |= drain(core)
    return [tokens[str(i)] for i in range(len(prompts))]


def check_stress(core: EngineCore) -> None:
    """The engine's life really had preemptions and prefix-cache hits: otherwise the test would prove less than it says."""
    stats = core.stats()
    assert stats.preemptions > 0, "the cache was meant to be too small"
    assert stats.prefix_hit_tokens > 0, "the second wave was meant to hit the prefix cache"
    assert stats.kv_blocks_used == 0, "every block comes back"


def hf_generate(folder: str | Path, prompts: list[list[int]], max_new_tokens: int = NEW_TOKENS) -> list[list[int]]:
    """What transformers generates greedily in fp32, each prompt alone."""
    from lockstep.testing.tiny import load_hf

    torch.set_num_threads(1)  # on a busy machine threads wait for each other far longer than they work
    model = load_hf(folder)
    model.generation_config.eos_token_id = None
    with torch.inference_mode():
        outs = [
            model.generate(torch.tensor([p]), attention_mask=torch.ones(1, len(p)), max_new_tokens=max_new_tokens, do_sample=False)
            for p in prompts
        ]
    return [out[0, len(p) :].tolist() for out, p in zip(outs, prompts, strict=True)]
