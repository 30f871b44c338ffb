"""Flags to settings, and every kind of mistake to exit code 2 with a message that helps."""

from __future__ import annotations

import io
import subprocess
import sys
import time
from typing import Any

import pytest

from lockstep.cli.chat import ChatOptions
from lockstep.cli.errors import UsageError, as_flags
from lockstep.cli.flags import Parsed, parse
from lockstep.cli.generate import GenerateOptions
from lockstep.cli.main import LATER, VERBS, main
from lockstep.cli.refused import UNAVAILABLE
from lockstep.cli.session import hushed
from lockstep.config.build import build_config
from lockstep.config.errors import ConfigError
from lockstep.config.tree import EngineConfig
from lockstep.protocol import SamplingParams


def parsed(line: str, options: Any = GenerateOptions, max_tokens: int | None = 128) -> Parsed[Any]:
    return parse("generate", line.split(), options, max_tokens=max_tokens, description="x")


def test_nothing_given_is_the_defaults() -> None:
    found = parsed("")
    assert found.config == EngineConfig()
    assert found.sampling == SamplingParams(max_tokens=128)
    assert found.options == GenerateOptions()


def test_settings_sampling_and_options_reach_their_place() -> None:
    found = parsed(
        "m -tp 2 --block-size 32 --max-num-seqs 3 --no-enable-prefix-caching --temperature 0 --stop a --stop b --json --prompt p"
    )
    config, sampling, options = found.config, found.sampling, found.options
    assert (config.model.model, config.parallel.tensor_parallel_size) == ("m", 2)
    assert (config.cache.block_size, config.cache.enable_prefix_caching, config.scheduler.max_num_seqs) == (32, False, 3)
    assert (sampling.temperature, sampling.stop) == (0.0, ["a", "b"])
    assert (options.json, options.prompt) == (True, ["p"])


@pytest.mark.parametrize("line", ["-tp 2", "-tp=2", "--tensor-parallel-size 2", "--tensor_parallel_size=2", "m -tp 2", "-tp 2 m"])
def test_spellings_of_a_flag(line: str) -> None:
    assert parsed(line).config.parallel.tensor_parallel_size == 2


@pytest.mark.parametrize("line", ["m", "--model m", "--model=m", "m --model m"])
def test_the_model_by_place_or_by_flag(line: str) -> None:
    assert parsed(line).config.model.model == "m"


def test_two_models_are_one_too_many() -> None:
    with pytest.raises(UsageError, match="two models"):
        parsed("m --model other")


def test_one_seed_for_requests_and_engine() -> None:
    assert (parsed("--seed 7").sampling.seed, parsed("--seed 7").config.model.seed) == (7, 7)
    assert (parsed("").sampling.seed, parsed("").config.model.seed) == (None, 0)
    assert parsed("--seed -1").sampling.seed == -1
    assert parsed("--seed -1").config.model.seed >= 0


def test_lists_and_maps() -> None:
    found = parsed("--stop-token-ids 1,2 --stop-token-ids 3 --allowed-token-ids 5 --bad-words x --bad-words y")
    assert (found.sampling.stop_token_ids, found.sampling.allowed_token_ids, found.sampling.bad_words) == ([1, 2, 3], [5], ["x", "y"])
    found = parse("generate", ["--logit-bias", '{"3": -100, "4": 1.5}'], GenerateOptions, max_tokens=1, description="x")
    assert found.sampling.logit_bias == {3: -100.0, 4: 1.5}


@pytest.mark.parametrize(
    ("text", "count"),
    [("4096", 4096), ("1G", 1 << 30), ("1GiB", 1 << 30), ("2gb", 2 << 30), ("1.5M", 3 << 19), ("8k", 8192), ("1 T", 1 << 40), ("7B", 7)],
)
def test_amounts_of_memory_may_have_a_unit(text: str, count: int) -> None:
    line = ["--kv-cache-memory-bytes", text]
    assert parse("generate", line, GenerateOptions, max_tokens=1, description="x").config.cache.kv_cache_memory_bytes == count
    assert build_config(kv_cache_memory_bytes=text).cache.kv_cache_memory_bytes == count


@pytest.mark.parametrize("text", ["1X", "G", "1e9", "1.5", "5i", "-", "1GG"])
def test_what_is_no_amount_of_memory(text: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", "--prompt", "x", f"--kv-cache-memory-bytes={text}"]) == 2
    assert f"error: --kv-cache-memory-bytes={text!r} is no amount of memory" in capsys.readouterr().err


def test_no_limit_of_tokens_can_be_asked_for() -> None:
    assert parsed("--max-tokens None").sampling.max_tokens is None
    assert parsed("").sampling.max_tokens == 128
    assert parsed("", ChatOptions, 512).sampling.max_tokens == 512


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--stop-token-ids a", "--stop-token-ids='a'"),
        ("--logit-bias {", "--logit-bias='{' is not a JSON object"),
        ("--logit-bias [1]", "--logit-bias='[1]' is not a JSON object"),
        ("--temperature -1", "--temperature=-1.0"),
        ("--top-p 0", "--top-p=0"),
        ("--n 0", "--n=0"),
        ("--max-tokens 0", "--max-tokens=0"),
    ],
)
def test_impossible_sampling_parameters(line: str, words: str) -> None:
    with pytest.raises(UsageError) as refused:
        parsed(line)
    assert words in as_flags(str(refused.value))


@pytest.mark.parametrize("flag", sorted(UNAVAILABLE))
def test_flags_this_version_does_not_have_are_refused_by_name(flag: str) -> None:
    for spelling in ([flag], [f"{flag}=3"], ["--prompt", "x", "--" + flag[2:].replace("-", "_")] if flag.startswith("--") else [flag]):
        with pytest.raises(UsageError) as refused:
            parse("generate", spelling, GenerateOptions, max_tokens=1, description="x")
        message = str(refused.value)
        assert message.startswith(f"{flag}: ")
        assert message.endswith(".")
        assert len(message) > len(flag) + 20


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("--tensor-paralel-size 2", "--tensor-parallel-size"),
        ("--max-token 3", "--max-tokens"),
        ("--temperatur 3", "--temperature"),
        ("-tp two", "invalid literal"),
        ("--dtype bf16", "bfloat16"),
        ("--block-size", "Missing value"),
        ("m extra", "extra"),
    ],
)
def test_mistakes_exit_with_2_and_name_the_nearest(line: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        parsed(line)
    assert ended.value.code == 2
    shown = capsys.readouterr()
    assert words in " ".join(shown.err.split())
    assert shown.out == ""


def test_messages_name_flags_the_way_they_are_typed() -> None:
    assert as_flags("block_size=3 is bad: see max_model_len.") == "--block-size=3 is bad: see --max-model-len."
    assert as_flags("n=0 is bad, and seed=1, dtype='x'") == "--n=0 is bad, and --seed=1, --dtype='x'"
    assert as_flags("the model has a seed of 3") == "the model has a seed of 3"
    assert as_flags("/tmp/block_size/x and --block-size stay") == "/tmp/block_size/x and --block-size stay"


# --- the command itself ---


def test_no_command_shows_how_it_is_used(capsys: pytest.CaptureFixture[str]) -> None:
    assert main([]) == 2
    assert "usage: lockstep" in capsys.readouterr().err
    assert main(["--help"]) == 0
    shown = capsys.readouterr().out
    assert all(f"  {verb}" in shown for verb in VERBS)


@pytest.mark.parametrize("word", ["version", "--version", "-V"])
def test_version(word: str, capsys: pytest.CaptureFixture[str]) -> None:
    from lockstep import __version__

    assert main([word]) == 0
    assert capsys.readouterr().out == f"lockstep {__version__}\n"


def test_a_wrong_command_names_the_nearest(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generat"]) == 2
    shown = capsys.readouterr()
    assert "Did you mean 'generate'?" in shown.err
    assert shown.out == ""


@pytest.mark.parametrize("verb", LATER)
def test_commands_of_later_versions_say_so(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([verb]) == 2
    assert f"`lockstep {verb}` is not available yet" in capsys.readouterr().err


@pytest.mark.parametrize("verb", VERBS)
def test_every_command_has_help(verb: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code = main([verb, "--help"])
    except SystemExit as ended:
        code = int(ended.code or 0)
    assert code == 0
    assert f"lockstep {verb}" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("generate --prompt x -pcp 2", "--prefill-context-parallel-size=2: prefill context parallelism is not available yet"),
        ("generate --prompt x --node-rank 1", "--node-rank=1 must be from 0 to nnodes - 1 (--nnodes=1)"),
        ("generate --prompt x --nnodes 2 -tp 2 -r 1", "--node-rank=1 serves the leader (node 0)"),
        ("generate --headless", "--headless needs nnodes > 1 (--nnodes=1)"),
        ("chat --headless -n 2 -tp 2", "--headless with --node-rank=0: node 0 is the leader"),
        ("generate --prompt x -tp 0", "--tensor-parallel-size=0 is impossible"),
        ("generate /no/such/model --prompt x", "no such folder"),
        ("generate --prompts-file /no/such/file", "cannot be read"),
        ("chat --distributed-executor-backend mpp", "Did you mean 'mp'?"),
    ],
)
def test_settings_that_cannot_be_are_one_line_and_exit_2(line: str, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(line.split()) == 2
    shown = capsys.readouterr()
    (error,) = (text for text in shown.err.splitlines() if not text.startswith("loading"))
    assert error.startswith("error: ")
    assert words in error
    assert shown.out == ""


@pytest.mark.parametrize(
    "line",
    ["--help", "generate --help", "chat --help", "bench latency --help", "version", "generate --nnodes 2", "generate --prompt x -tp 0"],
)
def test_help_and_mistakes_load_no_heavy_library(line: str) -> None:
    code = (
        "import sys\n"
        "from lockstep.cli.main import main\n"
        "try: main(sys.argv[1:])\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'transformers', 'numpy', 'huggingface_hub'} & set(sys.modules)\n"
        "sys.exit(f'loaded {heavy}' if heavy else 0)\n"
    )
    done = subprocess.run([sys.executable, "-c", code, *line.split()], capture_output=True, text=True, timeout=60, check=False)
    assert done.returncode == 0, done.stderr[-500:]


def test_help_is_quick() -> None:
    def once() -> float:
        start = time.process_time_ns(), time.monotonic()
        subprocess.run([sys.executable, "-m", "lockstep", "generate", "--help"], capture_output=True, timeout=60, check=True)
        return time.monotonic() - start[1]

    assert min(once() for _ in range(4)) < 1.5  # about 0.3 s on an idle machine; torch alone would take 3


def test_import_is_instant() -> None:
    code = "import sys, time; t = time.process_time(); import lockstep; print(time.process_time() - t); assert 'torch' not in sys.modules"
    seconds = [float(subprocess.run([sys.executable, "-c", code], capture_output=True, timeout=60, check=True).stdout) for _ in range(3)]
    assert min(seconds) < 0.2


def test_verify_says_that_replicas_are_not_its_subject(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify", "-dp", "2"]) == 2
    assert "--data-parallel-size=2: replicas are whole engines" in capsys.readouterr().err


@pytest.mark.parametrize(("rank", "shown"), [("0", True), ("1", False)])
def test_of_a_launchers_processes_the_first_one_speaks(rank: str, shown: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.StringIO())
    for name, value in {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setenv("MASTER_ADDR", "127.0.0.1")
    monkeypatch.setenv("MASTER_PORT", "1")
    config = build_config(tensor_parallel_size=2, distributed_executor_backend="external_launcher")
    assert hushed(config, quiet=False) is not shown
    assert isinstance(sys.stdout, io.StringIO) is shown
    with pytest.raises(ConfigError, match="every replica would answer all requests"):
        hushed(build_config(data_parallel_size=2, distributed_executor_backend="external_launcher"), quiet=False)


@pytest.mark.parametrize(
    ("argv", "words"),
    [
        (["plan", "llama-3.1-8b", "--rate", "abc"], "--rate: invalid float value: 'abc'"),
        (["plan", "llama-3.1-8b", "--clutser", "this"], "no --clutser. Did you mean '--cluster'?"),
        (["plan"], "MODEL"),
        (["calibrate", "--out"], "--out: expected one argument"),
        (["top", "--interval", "x"], "--interval"),
        (["demo", "more"], "no more"),
        (["collect-env", "--json=1"], "--json"),
    ],
)
def test_mistakes_of_every_verb_are_one_line_that_names_the_flag(argv: list[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(argv) == 2
    shown = capsys.readouterr().err
    assert shown.startswith("error: ") and words in shown and f"lockstep {argv[0]} --help" in shown
    assert shown.count("\n") == 1 and "usage:" not in shown
