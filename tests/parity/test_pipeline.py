"""Pipeline stages change nothing but where layers run: tokens are transformers' own, bits those of one rank.

Every engine's life has chunked prefill, prefix hits, preemption and as many micro-batches in flight as stages.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from lockstep.cli.verify import VerifyOptions, verify
from lockstep.config.build import build_config
from lockstep.config.validate import resolve
from lockstep.engine.core import EngineCore
from lockstep.executor.factory import make_executor
from lockstep.protocol import SamplingParams
from lockstep.testing.tiny import VOCAB_SIZE, make_tiny
from tests.parity.generate_cases import ROOMY, TIGHT, check_stress, drain, engine_config, hf_generate, make_prompts, request, run_waves

# Seven layers over four stages are uneven; gemma3 ties its embedding, has sliding windows and norms of its own.
MODELS: dict[str, dict[str, Any]] = {
    "llama": {"num_hidden_layers": 7},
    "llama3": {"num_hidden_layers": 7, "tie_word_embeddings": True},
    "gemma3": {"num_hidden_layers": 5, "layer_types": ["sliding_attention", "full_attention"] * 2 + ["sliding_attention"]},
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> Any:
    return cache(lambda arch: make_tiny(arch, tmp_path_factory.mktemp(arch), **MODELS[arch]))


@pytest.fixture(scope="module")
def expected(folders: Any) -> Any:
    return cache(lambda arch: hf_generate(folders(arch), make_prompts(VOCAB_SIZE)))


@contextmanager
def engine(folder: Path, tp: int, pp: int, size: dict[str, int], **more: Any) -> Iterator[EngineCore]:
    config, spec, found = resolve(engine_config(folder, tp, size, pipeline_parallel_size=pp, **more))
    executor = make_executor(config, spec, found)
    try:
        yield EngineCore(config, spec, executor)
    finally:
        executor.shutdown()


QUICK = [("llama", 1, 2), ("llama3", 2, 2), ("gemma3", 1, 4)]
CASES = [
    pytest.param(arch, tp, pp, marks=() if (arch, tp, pp) in QUICK else pytest.mark.full)
    for arch in MODELS
    for tp in (1, 2)
    for pp in (2, 4)
]


@pytest.mark.parametrize(("arch", "tp", "pp"), CASES)
def test_tokens_are_those_of_transformers(arch: str, tp: int, pp: int, folders: Any, expected: Any) -> None:
    with engine(folders(arch), tp, pp, TIGHT) as core:
        assert core.depth == pp + 1
        assert run_waves(core, make_prompts(VOCAB_SIZE)) == expected(arch)
        check_stress(core)


def test_layers_dealt_out_by_hand(folders: Any, expected: Any) -> None:
    with engine(folders("llama"), 1, 3, ROOMY, pipeline_layer_partition="1,5,1") as core:
        assert run_waves(core, make_prompts(VOCAB_SIZE)) == expected("llama")


def test_aborts_in_flight_free_everything_and_disturb_nobody(folders: Any, expected: Any) -> None:
    prompts = make_prompts(VOCAB_SIZE)
    with engine(folders("llama"), 1, 2, TIGHT) as core:
        for i, prompt in enumerate(prompts):
            core.add_request(request(str(i), prompt))
        tokens: dict[str, list[int]] = {}
        for number in range(400):
            if not core.has_unfinished():
                break
            for out in core.step():
                tokens.setdefault(out.request_id, []).extend(out.new_token_ids)
            if number == 9:
                core.abort(["1", "3"])
        for i in (0, 2, 4, 5, 6, 7):
            assert tokens[str(i)] == expected("llama")[i]
        core.scheduler.check()
        assert core.stats().kv_blocks_used == 0


def test_sampled_tokens_do_not_depend_on_stages(folders: Any) -> None:
    """Penalties, seeds and prompt log-probabilities: everything that needs the tokens that came back through plans."""
    found = []
    sampling = {"temperature": 0.9, "top_p": 0.95, "repetition_penalty": 1.2, "presence_penalty": 0.4, "logprobs": 2, "prompt_logprobs": 1}
    for pp in (1, 3):
        with engine(folders("llama"), 1, pp, ROOMY) as core:
            for i, prompt in enumerate(make_prompts(VOCAB_SIZE)):
                core.add_request(request(str(i), prompt, 12, seed=i, **sampling))
            found.append(drain(core))
    assert found[0] == found[1]


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_every_bit(dtype: str, folders: Any, tmp_path: Path) -> None:
    room = {"kv_cache_memory_bytes": 8 << 20, "max_model_len": 512, "threads_per_rank": 1, "dtype": dtype}
    splits = ((1, 1), (1, 3), (2, 2)) if dtype == "bfloat16" else ((1, 1), (2, 2))
    model = str(folders("llama"))
    configs = [build_config(model=model, tensor_parallel_size=tp, pipeline_parallel_size=pp, **room) for tp, pp in splits]
    assert verify(configs, VerifyOptions(quiet=True, max_tokens=12, num_prompts=3, input_len=40), tmp_path) == 0


GREEDY = SamplingParams(temperature=0, max_tokens=48)
TEXTS = ["def add(a, b):", "import os", "class Foo", "for i in range(", "x = {", '"""A module that', "if __name__ ==", "try:"]


@cache
def demo_alone() -> list[list[int]]:
    from lockstep.llm import LLM

    with LLM(max_model_len=256, threads_per_rank=1) as llm:
        return [list(o.outputs[0].token_ids) for o in llm.generate(TEXTS, GREEDY, use_tqdm=False)]


SPLITS = [(tp, pp, dp) for tp in (1, 2) for pp in (1, 2, 4) for dp in (1, 2) if (tp, pp, dp) != (1, 1, 1)]
QUICK_SPLITS = [(1, 2, 1), (2, 2, 2)]


@pytest.mark.parametrize(("tp", "pp", "dp"), [pytest.param(*s, marks=() if s in QUICK_SPLITS else pytest.mark.full) for s in SPLITS])
def test_the_demo_model_in_every_split(tp: int, pp: int, dp: int) -> None:
    from lockstep.llm import LLM

    sizes = {"tensor_parallel_size": tp, "pipeline_parallel_size": pp, "data_parallel_size": dp}
    with LLM(max_model_len=256, kv_cache_memory_bytes=16 << 20, threads_per_rank=1, **sizes) as llm:
        assert [list(o.outputs[0].token_ids) for o in llm.generate(TEXTS, GREEDY, use_tqdm=False)] == demo_alone()
        weights = [rank.weight_bytes for rank in llm.memory()]
    assert len(weights) == tp * pp * dp
    if pp == 2:
        assert max(weights) < 1.6 * min(weights), "stages are balanced by what they hold"
