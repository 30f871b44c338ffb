"""`lockstep generate` and `lockstep chat`: what goes to which stream, from which source, and how they end."""

from __future__ import annotations

import io
import json
import os
import re
import select
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import msgspec
import pytest

import lockstep.llm
from lockstep.cli.main import main
from lockstep.cli.session import memory_table, size
from lockstep.cluster import factory
from lockstep.executor.contract import ExecutorError, RankMemory
from lockstep.testing.executors import children_of, wait_for
from lockstep.testing.fakes import FakeExecutor
from lockstep.testing.tiny import make_tiny
from lockstep.utils import procs

GREEDY = ["--max-tokens", "6", "--seed", "1", "--ignore-eos", "--device", "cpu"]
KEYS = {"index", "token_ids", "text", "finish_reason", "stop_reason", "cumulative_logprob", "logprobs"}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> str:
    return str(make_tiny("llama", tmp_path_factory.mktemp("tiny") / "llama"))


class Stdin(io.StringIO):
    """Piped input: no terminal."""


@pytest.fixture
def fake(monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Ranks are fake; the dict holds their settings."""
    settings: dict[str, Any] = {}
    monkeypatch.setattr(factory, "make_executor", lambda config, spec, folder: FakeExecutor(vocab_size=spec.vocab_size, **settings))
    monkeypatch.setattr(sys, "stdin", Stdin())
    return settings


def records(text: str) -> list[dict[str, Any]]:
    assert text.endswith("\n")
    return [json.loads(line) for line in text.splitlines()]


def test_json_is_one_line_per_prompt_in_order_and_nothing_else(model: str, fake: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", model, "--prompt", "a", "--prompt", "b c", "--json", *GREEDY]) == 0
    shown = capsys.readouterr()
    lines = records(shown.out)
    assert [(r["index"], r["prompt"]) for r in lines] == [(0, "a"), (1, "b c")]
    for record in lines:
        (output,) = record["outputs"]
        assert set(output) == KEYS
        assert (len(output["token_ids"]), output["finish_reason"], output["index"]) == (6, "length", 0)
        assert record["usage"] == {
            "prompt_tokens": len(record["prompt_token_ids"]),
            "completion_tokens": 6,
            "total_tokens": len(record["prompt_token_ids"]) + 6,
            "cached_tokens": 0,
        }
    assert "2 prompts" in shown.err
    assert "tok/s" in shown.err


def test_json_lines_keep_the_order_when_later_prompts_finish_first(model: str, fake: Any, capsys: pytest.CaptureFixture[str]) -> None:
    prompts = [word for text in ("a" * 40, "b", "c") for word in ("--prompt", text)]
    args = ["generate", model, *prompts, "--json", "--max-num-batched-tokens", "8", "--max-num-seqs", "3", *GREEDY]
    assert main(args) == 0
    assert [r["index"] for r in records(capsys.readouterr().out)] == [0, 1, 2]


def test_quiet_says_nothing_on_standard_error(model: str, fake: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", model, "--prompt", "a", "--quiet", *GREEDY]) == 0
    shown = capsys.readouterr()
    assert shown.err == ""
    assert shown.out.endswith("\n")


def test_text_of_one_prompt_is_the_completion_alone(model: str, fake: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", model, "--prompt", "a", "--json", *GREEDY]) == 0
    text = records(capsys.readouterr().out)[0]["outputs"][0]["text"]
    assert main(["generate", model, "--prompt", "a", *GREEDY]) == 0
    shown = capsys.readouterr()
    assert shown.out == text + "\n"
    assert "weights" in shown.err, "the memory table"
    assert "1 prompt: " in shown.err


def test_several_completions_are_labelled(model: str, fake: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", model, "--prompt", "a", "--prompt", "b", *GREEDY]) == 0
    out = capsys.readouterr().out
    assert out.index("[0] 'a'") < out.index("[1] 'b'")
    assert main(["generate", model, "--prompt", "a", "--n", "2", *GREEDY]) == 0
    out = capsys.readouterr().out
    assert out.index("[0.0] 'a'") < out.index("[0.1] 'a'")


def test_logprobs_are_in_the_record(model: str, fake: Any, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["generate", model, "--prompt", "hello", "--json", "--logprobs", "0", "--prompt-logprobs", "0", *GREEDY]) == 0
    (record,) = records(capsys.readouterr().out)
    (output,) = record["outputs"]
    assert [set(p) for p in output["logprobs"]] == [{str(t)} for t in output["token_ids"]]
    assert output["cumulative_logprob"] == sum(p[str(t)]["logprob"] for p, t in zip(output["logprobs"], output["token_ids"], strict=True))
    assert record["prompt_logprobs"][0] is None
    assert len(record["prompt_logprobs"]) == len(record["prompt_token_ids"])


def test_prompts_from_files_and_standard_input(
    model: str, fake: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def prompts(*args: str) -> list[Any]:
        assert main(["generate", model, "--json", *args, *GREEDY]) == 0
        return [r["prompt"] if r["prompt"] is not None else r["prompt_token_ids"] for r in records(capsys.readouterr().out)]

    (tmp_path / "p.txt").write_text("one\n\ntwo \n")
    (tmp_path / "p.jsonl").write_text('{"prompt": "x\\ny"}\n{"prompt_token_ids": [5, 6]}\n"plain"\n')
    assert prompts("--prompts-file", str(tmp_path / "p.txt")) == ["one", "two "]
    assert prompts("--prompts-file", str(tmp_path / "p.jsonl"), "--prompt", "first") == ["first", "x\ny", [5, 6], "plain"]
    monkeypatch.setattr(sys, "stdin", Stdin("a\nb\r\n\n"))
    assert prompts() == ["a", "b"]
    monkeypatch.setattr(sys, "stdin", Stdin("c\n"))
    assert prompts("--prompts-file", "-") == ["c"]
    monkeypatch.setattr(sys, "stdin", Stdin("ignored\n"))
    assert prompts("--prompt", "d") == ["d"]


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ([], "there is no prompt"),
        (["--prompt", "x" * 9999], "--max-model-len"),
        (["--prompt", ""], "empty prompt"),
        (["--prompts-file", "bad.jsonl"], "line 2 is not JSON"),
    ],
)
def test_prompts_that_cannot_run(
    args: list[str], words: str, model: str, fake: Any, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("bad.jsonl").write_text('"ok"\n{oops\n')
    assert main(["generate", model, *args, *GREEDY]) == 2
    shown = capsys.readouterr()
    assert words in shown.err.splitlines()[-1]
    assert shown.err.splitlines()[-1].startswith("error: ")
    assert shown.out == ""


@pytest.mark.parametrize(
    ("lines", "words"),
    [
        (['"ok"', '""'], "prompts[1]: an empty prompt (0 tokens)"),
        (['"ok"', '{"prompt_token_ids": []}'], "prompts[1]: an empty prompt (0 tokens)"),
        (['"ok"', "5"], "prompts[1]: prompt is a int"),
        (['{"text": "x"}'], "prompt has the keys ['text']"),
    ],
)
def test_what_no_model_can_take_is_refused_before_one_is_loaded(
    lines: list[str], words: str, model: str, capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lockstep.llm, "LLM", None)
    (tmp_path / "p.jsonl").write_text("\n".join(lines))
    assert main(["generate", model, "--prompts-file", str(tmp_path / "p.jsonl"), *GREEDY]) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("error: ")
    assert words in line


def test_an_argument_that_is_not_text_is_refused_before_a_model_is_loaded(
    model: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lockstep.llm, "LLM", None)
    assert main(["generate", model, "--prompt", os.fsdecode(b"caf\xe9"), *GREEDY]) == 2
    assert "lone surrogate '\\udce9' at position 3" in capsys.readouterr().err


def test_empty_text_is_a_prompt_where_the_tokenizer_begins_each(tmp_path: Path, fake: Any, capsys: pytest.CaptureFixture[str]) -> None:
    folder = make_tiny("llama", tmp_path / "llama")
    path = folder / "tokenizer.json"
    tokenizer = json.loads(path.read_text())
    begin, text = {"SpecialToken": {"id": "<bos>", "type_id": 0}}, {"Sequence": {"id": "A", "type_id": 0}}
    special = {"<bos>": {"id": "<bos>", "ids": [5], "tokens": ["<bos>"]}}
    tokenizer["post_processor"] = {"type": "TemplateProcessing", "single": [begin, text], "pair": [begin, text], "special_tokens": special}
    path.write_text(json.dumps(tokenizer))
    assert main(["generate", str(folder), "--prompt", "", "--json", *GREEDY]) == 0
    assert len(records(capsys.readouterr().out)[0]["prompt_token_ids"]) == 1


def test_a_dead_rank_is_one_line_and_its_log_with_exit_code_1(
    model: str, fake: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    fake.update(fail_at_step=2)
    assert main(["generate", model, "--prompt", "a", "--json", *GREEDY]) == 1
    shown = capsys.readouterr()
    assert "error: rank 0 died in step 2" in shown.err
    assert "Traceback" not in shown.err
    assert shown.out == ""

    def broken(*args: Any) -> Any:
        raise ExecutorError("rank 1 died", rank=1, log_tail=["last words"])

    monkeypatch.setattr(factory, "make_executor", broken)
    assert main(["generate", model, "--prompt", "a", *GREEDY]) == 1
    assert capsys.readouterr().err.endswith("error: rank 1 died\n  | last words\n")


def test_a_failed_request_is_told_and_exits_1(model: str, fake: Any, capsys: pytest.CaptureFixture[str]) -> None:
    fake.update(sick=lambda name, at: name == "1")
    assert main(["generate", model, "--prompt", "a", "--prompt", "b", "--json", *GREEDY]) == 1
    shown = capsys.readouterr()
    assert [r["outputs"][0]["finish_reason"] for r in records(shown.out)] == ["length", "error"]
    assert "error: prompt 1: " in shown.err


def test_interrupting_exits_130(model: str, fake: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(*args: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(FakeExecutor, "execute_model", interrupt)
    assert main(["generate", model, "--prompt", "a", *GREEDY]) == 130
    assert "Traceback" not in capsys.readouterr().err


# --- chat ---


def test_piped_chat_answers_line_by_line_and_remembers(
    model: str, fake: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    seen: list[list[dict[str, str]]] = []
    from lockstep.cli import chat

    render = chat.render
    monkeypatch.setattr(chat, "render", lambda tokenizer, talk: seen.append([dict(m) for m in talk]) or render(tokenizer, talk))
    monkeypatch.setattr(sys, "stdin", Stdin("hello\n\n/system be brief\nagain\n/clear\nnew\n/what\n/exit\nnever\n"))
    assert main(["chat", model, "--max-tokens", "4", "--seed", "1", "--ignore-eos", "--device", "cpu"]) == 0
    shown = capsys.readouterr()
    roles = [[m["role"] for m in talk] for talk in seen]
    assert roles == [["user"], ["system", "user", "assistant", "user"], ["system", "user"]]
    assert [talk[-1]["content"] for talk in seen] == ["hello", "again", "new"]
    assert seen[1][2]["content"] in shown.out
    assert "/what is not a command" in shown.err


def test_a_conversation_that_grew_too_long_says_so_and_goes_on(
    model: str, fake: Any, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "stdin", Stdin("x" * 500 + "\nhi\n"))
    assert main(["chat", model, "--max-tokens", "4", "--max-model-len", "64", "--device", "cpu", "--quiet"]) == 0
    shown = capsys.readouterr()
    assert "/clear starts a new conversation" in shown.err
    assert shown.out.count("\n") >= 1


# --- with real ranks ---


def command(*args: str) -> list[str]:
    return [sys.executable, "-m", "lockstep", *args]


def test_the_real_command_at_two_ranks_prints_only_json(model: str) -> None:
    line = command("generate", model, "--prompt", "def f", "--prompt", "hello", "--temperature", "0", "--json", "--max-tokens", "8")
    split = subprocess.run([*line, "-tp", "2"], capture_output=True, text=True, timeout=150, stdin=subprocess.DEVNULL, check=False)
    whole = subprocess.run(line, capture_output=True, text=True, timeout=150, stdin=subprocess.DEVNULL, check=False)
    assert (split.returncode, whole.returncode) == (0, 0), split.stderr[-2000:] + whole.stderr[-2000:]
    assert records(split.stdout) == records(whole.stdout)
    assert [len(r["outputs"][0]["token_ids"]) for r in records(split.stdout)] == [8, 8]


def test_a_reader_that_leaves_ends_it_quietly(model: str) -> None:
    run = subprocess.Popen(
        command("generate", model, "--prompt", "a", "--ignore-eos", "--max-tokens", "100"), stdout=subprocess.PIPE, stderr=subprocess.PIPE
    )
    assert run.stdout is not None
    assert run.stderr is not None
    run.stdout.close()
    err = run.stderr.read().decode()
    assert run.wait(timeout=150) == 141
    assert "Traceback" not in err
    assert "Exception ignored" not in err


SLOWLY = {**os.environ, "LOCKSTEP_KERNELS": "torch"}  # the kernels are through before anybody can press a key


def test_ctrl_c_ends_it_quickly_and_leaves_no_process(model: str) -> None:
    run = subprocess.Popen(
        command(
            "generate", model, "--prompt", "a", "--ignore-eos", "--max-tokens", "100000", "-tp", "2", "--max-model-len", "128", "--n", "64"
        ),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env=SLOWLY,
    )
    assert run.stderr is not None
    for line in run.stderr:
        if line.startswith("ready"):
            break
    time.sleep(0.2)
    os.killpg(run.pid, signal.SIGINT)  # as a terminal does: to every process in front
    _, err = run.communicate(timeout=60)
    assert run.returncode == 130, err
    assert "Traceback" not in err
    deadline = time.monotonic() + 20
    while _alive_in_group(run.pid) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert not _alive_in_group(run.pid)


def test_ctrl_c_while_ranks_load_ends_it_at_once(model: str) -> None:
    """Ranks that load look for no order: to wait for them to leave by themselves is to wait in vain."""
    before = set(os.listdir("/dev/shm"))
    run = subprocess.Popen(
        command("generate", model, "--prompt", "a", "-tp", "2", "--device", "cpu"),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
        env={**os.environ, "LOCKSTEP_FAULT": "load:1:sleep=100"},
    )
    assert wait_for(lambda: len(children_of(run.pid)) >= 2, 60)
    ranks = children_of(run.pid)
    time.sleep(1.0)
    started = time.monotonic()
    os.killpg(run.pid, signal.SIGINT)
    _, err = run.communicate(timeout=60)
    assert time.monotonic() - started < 1.5  # about 0.2 s
    assert run.returncode == 130, err
    assert err.splitlines()[1:] == ["interrupted"]
    assert procs.wait_gone(ranks, 5) == []
    assert set(os.listdir("/dev/shm")) <= before


def _alive_in_group(group: int) -> bool:
    try:
        os.killpg(group, 0)
    except ProcessLookupError:
        return False
    return True


def test_memory_is_shown_in_readable_units() -> None:
    assert [size(n) for n in (0, 1023, 1024, 3 * 2**20, 5 * 2**40, 2**60)] == [
        "0 B",
        "1023 B",
        "1.0 KiB",
        "3.0 MiB",
        "5.0 TiB",
        "1048576.0 TiB",
    ]
    rank = RankMemory(rank=1, weight_bytes=2048, free_bytes=1, kv_bytes_per_block=1, kv_bytes=4096, peak_bytes=2**20)
    assert memory_table([rank]).splitlines()[1].split() == ["1", "2.0", "KiB", "4.0", "KiB", "1.0", "MiB"]
    head, first, second = (line.split() for line in memory_table([rank, msgspec.structs.replace(rank, replica=3)]).splitlines())
    assert (head[0], first[:2], second[:2]) == ("replica", ["0", "1"], ["3", "1"])


@pytest.mark.skipif(sys.platform == "win32", reason="needs a pseudo-terminal")
def test_chat_on_a_terminal_goes_on_after_ctrl_c_and_ends_with_exit(model: str) -> None:
    import pty

    ours, theirs = pty.openpty()
    args = (
        "chat",
        model,
        "-tp",
        "2",
        "--max-tokens",
        "450",
        "--ignore-eos",
        "--max-model-len",
        "512",
        "--temperature",
        "0",
        "--device",
        "cpu",
    )
    run = subprocess.Popen(command(*args), stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True, env=SLOWLY)
    os.close(theirs)
    terminal = _Terminal(ours)
    try:
        terminal.wait_for("> ")
        terminal.type("hello\n")
        terminal.wait_for("hello\r\n")
        time.sleep(0.5)
        os.killpg(run.pid, signal.SIGINT)
        terminal.wait_for("(stopped)")
        terminal.wait_for("> ")
        terminal.type("/clear\n")
        terminal.wait_for("starts again")
        terminal.type("/exit\n")
        assert run.wait(timeout=60) == 0
    finally:
        run.kill()
        run.wait()
        os.close(ours)
    assert "Traceback" not in terminal.seen


class _Terminal:
    """The person's end of a pseudo-terminal."""

    def __init__(self, fd: int) -> None:
        self.fd, self.seen, self.at = fd, "", 0

    def type(self, text: str) -> None:
        os.write(self.fd, text.encode())

    def wait_for(self, text: str, timeout_s: float = 120) -> None:
        """Read until `text` comes after what was last waited for."""
        deadline = time.monotonic() + timeout_s
        while (found := self.seen.find(text, self.at)) < 0:
            ready, _, _ = select.select([self.fd], [], [], max(0.0, deadline - time.monotonic()))
            assert ready, f"{text!r} did not come; seen: {self.seen[-500:]!r}"
            self.seen += os.read(self.fd, 65536).decode(errors="replace")
        self.at = found + len(text)


def test_an_impossible_setting_is_answered_by_its_error_alone():
    argv = [sys.executable, "-m", "lockstep", "generate", "--prompt", "x", "-tp", "9"]
    done = subprocess.run(argv, capture_output=True, text=True, timeout=60)
    assert done.returncode == 2 and not done.stdout
    assert re.fullmatch(r"error: --tensor-parallel-size=9 is more than the model's 8 attention heads.*\n", done.stderr), done.stderr
