"""The first promise: the split never changes the answer, bit for bit. Engines of real processes, compared by `lockstep verify`."""

from __future__ import annotations

import random
from dataclasses import replace
from itertools import product
from pathlib import Path

import pytest

from lockstep.cli.main import main
from lockstep.cli.verify import VerifyOptions, verify
from lockstep.config.build import build_config
from lockstep.testing.tiny import ARCHS, make_tiny

SPLITS = range(1, 9)
DTYPES = ("float32", "bfloat16", "float16")
ROOM = {"kv_cache_memory_bytes": 8 << 20, "max_model_len": 512}


def config(model: str = "", tp: int = 1, threads: int = 1, chunk: int = 512, **more: object) -> object:
    return build_config(model=model, tensor_parallel_size=tp, threads_per_rank=threads, max_num_batched_tokens=chunk, **{**ROOM, **more})  # type: ignore[arg-type]


def agree(configs: list[object], folder: Path, **options: int) -> bool:
    return verify(configs, VerifyOptions(quiet=True, **options), folder) == 0  # type: ignore[arg-type]


def cases() -> list[tuple[str, str, int, int, int]]:
    """Every architecture x type x split, with numbers of threads and chunks that alternate."""
    found = []
    for index, (arch, dtype, tp) in enumerate(product(ARCHS, DTYPES, SPLITS)):
        if dtype == "float16" and arch.startswith("gemma"):
            continue  # overflows, and is refused
        found.append((arch, dtype, tp, 1 + index % 2, (16, 64, 512)[index % 3]))
    return found


def sampled() -> list[object]:
    """The sample has every architecture, every split and every type."""
    found = cases()
    random.Random(3).shuffle(found)
    chosen: list[tuple[str, str, int, int, int]] = []
    for axis, values in ((0, ARCHS), (1, DTYPES), (2, SPLITS)):
        for value in values:
            if not any(case[axis] == value for case in chosen):
                chosen.append(next(case for case in found if case[axis] == value))
    return [pytest.param(*case, marks=() if case in chosen else pytest.mark.full) for case in cases() if case in chosen or case[2] != 1]


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    return {arch: make_tiny(arch, tmp_path_factory.mktemp(arch)) for arch in ARCHS}


@pytest.mark.parametrize(("arch", "dtype", "tp", "threads", "chunk"), sampled())
def test_tiny_models(arch: str, dtype: str, tp: int, threads: int, chunk: int, folders: dict[str, Path], tmp_path: Path) -> None:
    model = str(folders[arch])
    pair = [config(model, dtype=dtype), config(model, tp, threads, chunk, dtype=dtype)]
    assert agree(pair, tmp_path, max_tokens=6, num_prompts=5, input_len=70)


def test_the_demo_model_under_an_uneven_split(tmp_path: Path) -> None:
    assert agree([config(dtype="bfloat16"), config(tp=3, chunk=48, dtype="bfloat16")], tmp_path, max_tokens=24, num_prompts=7, input_len=90)


@pytest.mark.full
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("chunk", [33, 512])
def test_the_demo_model_whole(chunk: int, threads: int, dtype: str, tmp_path: Path) -> None:
    """256 tokens, 33 requests that end one after the other, so that batches of 33 down to 1 occur; every split."""
    rest = [config(tp=tp, threads=threads, chunk=chunk, dtype=dtype) for tp in SPLITS]
    assert agree([config(dtype=dtype), *rest], tmp_path, max_tokens=256, num_prompts=33, input_len=200, stagger=True)


@pytest.mark.parametrize(
    ("tp", "threads", "prompts", "quantization"), [(2, 2, 5, ""), (3, 1, 5, ""), (5, 2, 11, ""), (2, 1, 11, ""), (2, 2, 13, "int8")]
)
def test_long_steps(
    tp: int, threads: int, prompts: int, quantization: str, tmp_path_factory: pytest.TempPathFactory, tmp_path: Path
) -> None:
    """Thousands of tokens at once: ranks share out the addition of partial sums, which do not fit into their slots at one time."""
    sizes = {"hidden_size": 512, "intermediate_size": 1000, "head_dim": 64, "vocab_size": 512, "num_hidden_layers": 2}
    model = str(make_tiny("llama", tmp_path_factory.mktemp("wide"), **sizes))
    rest = {"chunk": 401 * prompts, "dtype": "bfloat16", "kv_cache_memory_bytes": 32 << 20} | (
        {"quantization": quantization} if quantization else {}
    )
    pair = [config(model, **rest), config(model, tp, threads, **rest)]
    assert agree(pair, tmp_path, max_tokens=3, num_prompts=prompts, input_len=401)


def test_int8_weights(folders: dict[str, Path], tmp_path: Path) -> None:
    model = str(folders["qwen3"])
    one = config(model, dtype="bfloat16", quantization="int8")
    other = config(model, 3, chunk=32, dtype="bfloat16", quantization="int8")
    assert agree([one, other], tmp_path, max_tokens=6, num_prompts=4, input_len=60)


def test_a_difference_ends_with_1_and_names_layer_and_position(
    folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    one = config(str(folders["llama"]), dtype="bfloat16")
    other = replace(one, model=replace(one.model, quantization="int8"))  # type: ignore[attr-defined, type-var]
    assert not agree([one, other], tmp_path, max_tokens=4, num_prompts=2, input_len=20)
    shown = capsys.readouterr().out
    assert "NO" in shown and "position 0, first in layer 0 on rank 0" in shown, shown


def test_the_command(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["verify", str(folders["llama3"]), "-tp", "1,2", "--max-tokens", "4", "--num-prompts", "2", "--input-len", "20"]
    assert main([*arguments, "--kv-cache-memory-bytes", str(8 << 20)]) == 0
    shown = capsys.readouterr().out
    assert "every run agrees with the first, bit for bit" in shown and shown.count("yes") == 7, shown


@pytest.mark.parametrize(
    ("arguments", "message"), [(["-tp", "1,x"], "1,x"), (["-tp", "0"], "--tensor-parallel-size=0"), (["--max-tokens", "0"], "at least 1")]
)
def test_wrong_arguments(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", *arguments]) == 2
    assert message in capsys.readouterr().err
