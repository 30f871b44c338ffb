"""`lockstep calibrate`: the whole engine, as a user's request meets it, with a model that caches hold and one that they do not."""

from __future__ import annotations

import json
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from statistics import mean
from typing import TYPE_CHECKING

from lockstep.config.model_spec import ModelSpec
from lockstep.config.source import DEMO_FOLDER
from lockstep.utils.noise import undisturbed, undisturbed_course

if TYPE_CHECKING:
    from lockstep.llm import LLM
    from lockstep.simulation.engine_steps import Run
    from lockstep.simulation.rounds import Engines

Batches = Sequence[tuple[int, int]]  # (prompts, tokens of each)
IN_CACHES: Batches = ((1, 64), (4, 64), (16, 64), (32, 64), (1, 512), (4, 512))
FROM_MEMORY: Batches = ((1, 16), (8, 16), (32, 16))  # of 114 MB: the largest of the models takes seconds more to start
MOST_ROWS, TOKENS = 32, 40  # of a batch, and of an answer
SMALL_TIMES, LARGE_TIMES = 2, 1  # that each batch is run in a round: one of the small model is over in 20 ms


@contextmanager
def whole_engines(ranks: int, dtype: str, large: ModelSpec) -> Iterator[Engines]:
    """The embedded model, and a random one of the shape of `large`, on so many ranks."""
    from lockstep.simulation.rounds import Engines

    with ExitStack() as stack:
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix="lockstep-calibrate-")))
        (folder / "config.json").write_text(json.dumps(_config(large)))
        small = stack.enter_context(small_engine(ranks, dtype))
        other = stack.enter_context(_engine(str(folder), ranks, dtype, FROM_MEMORY))
        runs_of(small, IN_CACHES, 1)  # the first requests meet cold code
        runs_of(other, FROM_MEMORY, 1)
        runs = partial(runs_of, small, IN_CACHES, SMALL_TIMES), partial(runs_of, other, FROM_MEMORY, LARGE_TIMES)
        yield Engines(*runs, small.spec, large, TOKENS)


def small_engine(ranks: int, dtype: str) -> LLM:
    """The embedded model on so many ranks, with room for IN_CACHES."""
    return _engine("", ranks, dtype, IN_CACHES)


def _config(spec: ModelSpec) -> dict[str, object]:
    return {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": spec.hidden_size,
        "num_hidden_layers": spec.num_layers, "num_attention_heads": spec.num_heads, "num_key_value_heads": spec.num_kv_heads,
        "head_dim": spec.head_dim, "intermediate_size": spec.intermediate_size, "vocab_size": spec.vocab_size,
        "max_position_embeddings": spec.max_position_embeddings, "rms_norm_eps": 1e-6, "hidden_act": "silu",
    }  # fmt: skip


def _engine(model: str, ranks: int, dtype: str, batches: Batches) -> LLM:
    from lockstep.llm import LLM

    most, longest = max(rows * prompt for rows, prompt in batches), max(prompt for _, prompt in batches) + TOKENS
    room = {"max_model_len": longest, "max_num_seqs": MOST_ROWS, "num_gpu_blocks_override": (most + MOST_ROWS * longest) // 8}
    batch = {"max_num_batched_tokens": most, "enable_prefix_caching": False}
    source = {"tokenizer": str(DEMO_FOLDER), "load_format": "dummy"} if model else {}
    return LLM(model, tensor_parallel_size=ranks, dtype=dtype, device="cpu", **room, **batch, **source)


def runs_of(llm: LLM, batches: Batches, times: int) -> list[Run]:
    """Each of these batches, so many times."""
    return [_run(llm, rows, prompt, times) for rows, prompt in batches]


def _run(llm: LLM, rows: int, prompt: int, times: int) -> Run:
    """`rows` prompts at once, so many times: what their first tokens and a step after them took (pauses are a part of it), and what was
    no operation."""
    from lockstep.simulation.engine_steps import Run

    courses = [_course(llm, rows, prompt) for _ in range(times)]
    stamps, operations_s = undisturbed_course([stamps for stamps, _ in courses]), undisturbed(mean(each) for _, each in courses)
    step_s = (stamps[-1] - stamps[0]) / (len(stamps) - 1)
    return Run(rows, prompt, stamps[0], step_s, step_s - operations_s)


def _course(llm: LLM, rows: int, prompt: int) -> tuple[list[float], list[float]]:
    """When each of these requests had one token, two tokens ..., in seconds from the start; the operations of all steps but the first."""
    from lockstep.protocol import SamplingParams

    params = SamplingParams(max_tokens=TOKENS, ignore_eos=True, temperature=0.0, detokenize=False)
    prompts = [{"prompt_token_ids": [(7 * i + j) % llm.spec.vocab_size for j in range(prompt)]} for i in range(rows)]
    stamps: list[float] = []
    llm.collective_rpc("start_step_clock")
    try:
        began = time.perf_counter()
        for number, _ in enumerate(llm.stream(prompts, params), 1):
            if number % rows == 0:  # every request has a token more
                stamps.append(time.perf_counter() - began)
    finally:
        operations = llm.collective_rpc("take_step_clock")[0][1:]
    return stamps, operations
