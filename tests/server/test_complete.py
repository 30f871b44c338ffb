"""`lockstep complete`: plain completions by a running server, for a person, a pipe, or one prompt."""

from __future__ import annotations

import asyncio
import io
import json
import sys

import pytest

from lockstep.cli import complete, dialogue
from lockstep.cli.main import main
from lockstep.testing.server import running_server
from tests.server.sse_server import SseServer, sse_server


def test_a_real_server_completes() -> None:
    said = io.StringIO()
    with running_server("--api-key", "sesame", tp=1) as server, pytest.MonkeyPatch.context() as patch:
        patch.setenv("OPENAI_API_KEY", "sesame")
        patch.setattr(sys, "stdout", said)
        assert main(["complete", "--url", f"{server.url}/v1", "--max-tokens", "5", "-q", "def f("]) == 0
        first = said.getvalue()
        assert len(first) > 2 and first.endswith("\n")
        assert main(["complete", "--url", server.url, "--model-name", "gpt-4", "-q", "x"]) == 1
        assert main(["complete", "--url", server.url, "--api-key", "wrong", "-q", "x"]) == 1
        assert said.getvalue() == first  # what goes wrong is told on standard error


def test_what_is_sent_and_shown(capsys: pytest.CaptureFixture[str]) -> None:
    with sse_server() as server:
        assert main(["complete", "--url", server.url, "--max-tokens", "4", "--api-key", "k", "-q", "go"]) == 0
    assert capsys.readouterr() == ("xxxx\n", "")
    assert server.asked == [{"model": "fake", "max_tokens": 4, "prompt": "go", "stream": True}]
    assert "Authorization: Bearer k" in server.headers[-1]


def test_each_line_of_a_pipe_is_a_prompt(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\n\n/two\r\n"))
    with sse_server() as server:
        assert main(["complete", "--url", server.url, "--model-name", "m", "--max-tokens", "2"]) == 0
    assert capsys.readouterr().out == "xx\nxx\n"
    assert [body["prompt"] for body in server.asked] == ["one", "/two"]


@pytest.mark.parametrize(
    ("prompt", "shown", "words"),
    [
        ("refuse", "", "HTTP 429: the queue is full."),
        ("event-error", "xx\n", "a rank died"),
        ("break", "xx\n", "error: "),
    ],
)
def test_what_fails_is_told_and_the_next_line_goes_on(
    prompt: str, shown: str, words: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO(f"{prompt}\nfine\n"))
    with sse_server() as server:
        assert main(["complete", "--url", server.url, "--max-tokens", "4"]) == 1
    said = capsys.readouterr()
    assert said.out == f"{shown}xxxx\n" and words in said.err and len(said.err.splitlines()) == 1


def test_ctrl_c_ends_an_answer_and_no_more(capsys: pytest.CaptureFixture[str]) -> None:
    closed = []

    def pieces() -> object:
        try:
            yield "some"
            raise KeyboardInterrupt
        finally:
            closed.append(True)

    assert dialogue.write_pieces(pieces()) == ("some", True) and closed  # type: ignore[arg-type]
    assert capsys.readouterr() == ("some\n", "\n(stopped)\n")


def test_a_person_is_prompted(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = iter(["one", "two"])

    def ask(prompt: str) -> str:
        assert prompt == "> "
        try:
            return next(lines)
        except StopIteration:
            raise EOFError from None

    monkeypatch.setattr("builtins.input", ask)
    monkeypatch.setattr(dialogue, "is_person", lambda: True)
    assert list(dialogue.read_lines()) == ["one", "two"]


@pytest.mark.parametrize(
    ("words", "code", "told"),
    [
        (["--url", "127.0.0.1:1", "-q", "x"], 1, "cannot be reached"),
        (["--url", "ftp://x", "-q", "x"], 2, "no address of a server"),
        (["--max-tokens", "0", "-q", "x"], 2, "--max-tokens=0"),
        (["--api-key", "\u043a\u043b\u044e\u0447", "--model-name", "x", "-q", "hi"], 2, "its character 1 is not printable ASCII"),
        (["--api-key", "a\nb", "-q", "hi"], 2, "its character 2 is not printable ASCII"),
        (["--url", "http://[::1", "-q", "x"], 2, "no address of a server"),
        (["--url", "http://x:port", "-q", "x"], 2, "no address of a server"),
        (["--url", "http://a..b", "-q", "x"], 2, "no address of a server"),
        (["--url", "http://x/\u043a", "-q", "x"], 2, "no address of a server"),
        (["--url", "127.0.0.1:1", "--model-name", "m", "-q", "\udcff"], 2, "--quick is no UTF-8"),
    ],
)
def test_what_cannot_be(words: list[str], code: int, told: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["complete", *words]) == code
    said = capsys.readouterr()
    assert told in said.err and said.out == ""


def test_a_line_that_is_no_utf_8_is_refused_here(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"one\n\xd0\xba\n\xff\n"), "ascii"))
    with sse_server() as server:
        assert main(["complete", "--url", server.url, "--model-name", "m", "--max-tokens", "2"]) == 2
    assert [body["prompt"] for body in server.asked] == ["one", "\u043a"]
    said = capsys.readouterr()
    assert said.out == "xx\nxx\n" and "line 3 is no UTF-8" in said.err


@pytest.mark.parametrize(("person", "code", "asked"), [(False, 130, 1), (True, 0, 2)])
def test_an_answer_that_was_stopped_ends_a_command_with_130(
    person: bool, code: int, asked: int, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def stopped(pieces: object) -> dialogue.Written:
        next(pieces)  # type: ignore[call-overload]
        return dialogue.Written("x", True)

    monkeypatch.setattr(complete, "write_pieces", stopped)
    monkeypatch.setattr(complete, "is_person", lambda: person)
    monkeypatch.setattr(sys, "stdin", io.StringIO("one\ntwo\n"))
    with sse_server() as server:
        words = ["complete", "--url", server.url, "--model-name", "m", "--max-tokens", "2"]
        assert main(words) == code and len(server.asked) == asked
        assert main([*words, "-q", "x"]) == 130


def test_what_a_get_is_refused_with_is_told(capsys: pytest.CaptureFixture[str]) -> None:
    with sse_server() as server, pytest.MonkeyPatch.context() as patch:
        patch.setattr(SseServer, "_whole", refusing)
        assert main(["complete", "--url", server.url, "-q", "x"]) == 1
    assert "answered HTTP 503: the engine has died" in capsys.readouterr().err


def refusing(self: SseServer, writer: asyncio.StreamWriter, status: int, data: object) -> None:
    body = json.dumps({"error": {"message": "the engine has died"}}).encode()
    writer.write(b"HTTP/1.1 503 X\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n" % len(body) + body)
