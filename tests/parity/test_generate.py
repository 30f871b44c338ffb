"""Greedy tokens are transformers' own, token for token, for any split: mixed lengths, chunks, prefix hits, preemption."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from pathlib import Path

import pytest
import torch

from lockstep.config.tree import EngineConfig
from lockstep.config.validate import resolve
from lockstep.engine.core import EngineCore
from lockstep.executor.factory import make_executor
from lockstep.testing.ranks import run_ranks
from lockstep.testing.tiny import ARCHS, VOCAB_SIZE, make_tiny
from tests.parity.generate_cases import ROOMY, TIGHT, check_stress, drain, engine_config, hf_generate, make_prompts, request, run_waves

PRELOAD = ("tests.distributed.worker_ranks",)


@pytest.fixture(scope="session")
def checkpoints(tmp_path_factory: pytest.TempPathFactory):
    """arch -> its tiny checkpoint's folder, made once."""
    return cache(lambda arch: make_tiny(arch, tmp_path_factory.mktemp(f"tiny-{arch}")))


@pytest.fixture(scope="session")
def expected(checkpoints):
    """arch -> what transformers generates for the prompts of the two waves, made once."""
    return cache(lambda arch: hf_generate(checkpoints(arch), make_prompts(VOCAB_SIZE)))


@contextmanager
def engine(config: EngineConfig) -> Iterator[EngineCore]:
    config, spec, folder = resolve(config)
    executor = make_executor(config, spec, folder)
    try:
        yield EngineCore(config, spec, executor)
    finally:
        executor.shutdown()


def check(folder: Path, want: list[list[int]], tp: int, size: dict[str, int]) -> None:
    with engine(engine_config(folder, tp, size)) as core:
        assert run_waves(core, make_prompts(VOCAB_SIZE)) == want
        if size is TIGHT:
            check_stress(core)


@pytest.mark.parametrize("size", [TIGHT, ROOMY], ids=["tight", "roomy"])
@pytest.mark.parametrize("arch", ARCHS)
def test_one_rank(arch: str, size: dict[str, int], checkpoints, expected) -> None:
    check(checkpoints(arch), expected(arch), 1, size)


@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("arch", ARCHS)
def test_ranks(arch: str, tp: int, checkpoints, expected) -> None:
    """The same on N ranks, each with its own engine over its own worker (see worker_ranks): cheap enough for every cell."""
    folder, prompts = str(checkpoints(arch)), make_prompts(VOCAB_SIZE)
    reports = run_ranks("tests.distributed.worker_ranks:generate", tp, folder, prompts, TIGHT, True, timeout=120, preload=PRELOAD)
    for report in reports:
        assert report["tokens"] == expected(arch)
        assert report["state"] == reports[0]["state"], "every rank's batch state is the same"


SAMPLE = random.Random(2).sample([(arch, tp) for arch in ARCHS for tp in (2, 4)], 2)


@pytest.mark.parametrize(("arch", "tp"), SAMPLE)
def test_worker_processes(arch: str, tp: int, checkpoints, expected) -> None:
    check(checkpoints(arch), expected(arch), tp, TIGHT)


@pytest.mark.full
@pytest.mark.parametrize("size", [TIGHT, ROOMY], ids=["tight", "roomy"])
@pytest.mark.parametrize("tp", [2, 4])
@pytest.mark.parametrize("arch", ARCHS)
def test_worker_processes_whole_matrix(arch: str, tp: int, size: dict[str, int], checkpoints, expected) -> None:
    check(checkpoints(arch), expected(arch), tp, size)


CODE = [
    "def read_lines(path):\n    ",
    "import os\n\nclass Queue:\n    def __init__(self, maxsize=0):\n        ",
]


@cache
def demo_case() -> tuple[list[list[int]], list[list[int]]]:
    """Prompts for the demo model and what transformers writes after them, 256 tokens each."""
    from lockstep.config.source import find_folder
    from lockstep.frontend.tokenizer import load_tokenizer

    folder = find_folder("", None)
    tokenizer = load_tokenizer(folder)
    prompts = [list(tokenizer.encode(text)) for text in CODE]
    return prompts, hf_generate(folder, prompts, 256)


@pytest.mark.timeout(400)
@pytest.mark.parametrize("tp", [1, pytest.param(2, marks=pytest.mark.full), pytest.param(4, marks=pytest.mark.full)])
def test_demo_model_256_tokens(tp: int) -> None:
    prompts, want = demo_case()
    with engine(engine_config("", tp, {"block_size": 16, "blocks": 28, "budget": 64, "seqs": 4}, length=512)) as core:
        for i, prompt in enumerate(prompts):
            core.add_request(request(str(i), prompt, 256))
        tokens = drain(core)
        assert [tokens[str(i)] for i in range(len(prompts))] == want
        assert core.stats().preemptions > 0


@pytest.mark.cuda
@pytest.mark.parametrize("arch", ARCHS)
def test_on_a_gpu(arch: str, checkpoints, expected) -> None:
    """The same tokens from the plain CUDA path, in fp32 without TF32."""
    torch.backends.cuda.matmul.allow_tf32 = False
    with engine(engine_config(checkpoints(arch), 1, TIGHT, device="cuda")) as core:
        assert run_waves(core, make_prompts(VOCAB_SIZE)) == expected(arch)
        check_stress(core)
