"""`lockstep run-batch`: files in OpenAI's batch form, through the server's own routes; what is done is kept however it ends."""

from __future__ import annotations

import asyncio
import errno
import io
import json
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Iterable
from pathlib import Path
from typing import Any, cast
from unittest.mock import Mock

import msgspec
import pytest

from lockstep.cli.main import main
from lockstep.config.errors import ConfigError
from lockstep.executor.contract import ExecutorError
from lockstep.frontend.streams import EngineDeadError, Stream
from lockstep.server import batch_file
from lockstep.server.batch_file import URLS, Ask, BatchInput, BatchOutput, Refused, Response, read_line, result_of
from lockstep.server.inside import post
from lockstep.server.run_batch import BatchRun
from lockstep.server.state import ServerState
from lockstep.testing.executors import wait_for
from tests.server.scripted import Scripted

COMMAND = [sys.executable, "-m", "lockstep", "run-batch", "--no-cpu-binding"]
SCHEMA = {"type": "object", "properties": {"n": {"enum": [1, 2]}}, "required": ["n"], "additionalProperties": False}
TOOL = {"type": "function", "function": {"name": "look", "parameters": SCHEMA}}
TALK: dict[str, Any] = {"messages": [{"role": "user", "content": "hi"}], "max_tokens": 60}


def line(name: Any, url: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    return {"custom_id": name, "method": "POST", "url": url, "body": body}


def as_lines(asked: Iterable[Any]) -> str:
    return "".join(f"{one if isinstance(one, str) else json.dumps(one)}\n" for one in asked)


def by_name(text: str) -> dict[str | None, dict[str, Any]]:
    return {found["custom_id"]: found for found in map(json.loads, text.splitlines())}


# --- the whole command ---


def test_every_kind_of_line_through_pipes() -> None:
    asked = [
        line("text", prompt="def f(", max_tokens=8, temperature=0),
        line("same", prompt="def f(", max_tokens=8, temperature=0),
        line("shaped", URLS[0], **TALK, response_format={"type": "json_schema", "json_schema": {"name": "s", "schema": SCHEMA}}),
        line("tool", URLS[0], **TALK, tools=[TOOL], tool_choice="required"),
        line("vector", "/v1/embeddings", input=["a", "b"]),
        line("wrong", prompt="x", max_tokens=-1),
        line("other", prompt="x", model="gpt-4"),
        "no json",
        "",
        {"custom_id": "short", "method": "POST", "url": "/v1/completions"},
    ]
    command = [*COMMAND, "-i", "-", "-o", "-", "--max-concurrency", "3"]
    keyed = {**os.environ, "LOCKSTEP_API_KEY": "sesame"}  # a server's: no line needs it
    done = subprocess.run(command, input=as_lines(asked), capture_output=True, text=True, env=keyed)
    assert done.returncode == 0, done.stderr
    assert done.stderr == "9 lines answered, 4 of them with an error, in standard output\n"  # no bar: nobody looks at it
    found = by_name(done.stdout)
    assert set(found) == {"text", "same", "shaped", "tool", "vector", "wrong", "other", "short", None}
    assert len({one["id"] for one in found.values()}) == 9
    answers = {name: one["response"]["body"] for name, one in found.items() if one["response"]}
    assert answers["text"]["choices"][0]["text"] == answers["same"]["choices"][0]["text"] != ""
    assert answers["text"]["id"] == f"cmpl-{found['text']['response']['request_id']}"
    assert json.loads(answers["shaped"]["choices"][0]["message"]["content"])["n"] in (1, 2)
    assert answers["tool"]["choices"][0]["message"]["tool_calls"][0]["function"]["name"] == "look"
    assert len(answers["vector"]["data"]) == 2
    assert found["wrong"]["response"]["status_code"] == 400 and answers["wrong"]["error"]["param"] == "max_tokens"
    assert found["other"]["response"]["status_code"] == 404 and answers["other"]["error"]["code"] == "model_not_found"
    assert found["short"]["response"] is None and "`body`" in found["short"]["error"]["message"]
    assert found[None]["error"]["code"] == "invalid_json" and found[None]["error"]["message"].startswith("line 8: ")


def test_an_interrupt_keeps_what_is_done(tmp_path: Path) -> None:
    given, told, part = tmp_path / "in.jsonl", tmp_path / "out.jsonl", tmp_path / "out.jsonl.part"
    endless = [line(f"long {i}", prompt="x", max_tokens=1500, ignore_eos=True) for i in range(500)]
    given.write_text(as_lines(["no json", *endless]))
    words = ["-i", str(given), "-o", str(told), "--max-concurrency", "2"]
    with subprocess.Popen([*COMMAND, *words], stderr=subprocess.PIPE, text=True) as running:
        try:
            assert wait_for(lambda: running.poll() is not None or (part.exists() and part.read_bytes()), 120)
            running.send_signal(signal.SIGINT)
            _, said = running.communicate(timeout=60)
        finally:
            running.kill()
    found = [json.loads(text) for text in part.read_text().splitlines()]
    assert running.returncode == 130 and "Traceback" not in said, said
    assert f"ended early: {len(found)} of 501 lines answered" in said and str(part) in said
    assert found[0]["error"]["code"] == "invalid_json" and not told.exists()
    assert main(["run-batch", *words]) == 2 and part.exists()  # the next run does not lose it


# --- the run, over an engine that plays a text ---


class Holding(Scripted):
    """Plays its text, but holds every request until `release` is set; counts those that it holds."""

    def __init__(self, text: str = "yes") -> None:
        super().__init__(text)
        self.most = self.now = 0
        self.release = asyncio.Event()
        play = self.engine.submit

        async def submit(job: Any) -> Stream:
            self.now += 1
            self.most = max(self.most, self.now)
            await self.release.wait()
            self.now -= 1
            return await play(job)

        self.engine.submit = submit  # type: ignore[method-assign]

    @property
    def state(self) -> ServerState:
        return cast(ServerState, self.app.state.server)


def files(folder: Path, count: int, **body: Any) -> tuple[BatchInput, BatchOutput]:
    (folder / "in").write_text(as_lines(line(f"{i}", prompt="x", **body) for i in range(count)))
    return BatchInput(str(folder / "in")), BatchOutput(str(folder / "out"))


def alive() -> None:
    """The engine's failure: none."""


def test_so_many_at_once_and_the_file_at_the_end(tmp_path: Path) -> None:
    async def go() -> None:
        model = Holding()
        given, out = files(tmp_path, 40)
        with given, out:
            run = BatchRun(model.state, model.app, given, out, most=3)
            running = asyncio.create_task(run.until_done(alive))
            while model.now < 3:
                await asyncio.sleep(0.01)
            model.release.set()
            await running
            assert not (tmp_path / "out").exists() and run.whole and run.wrong == 0 and model.most == 3
            out.finish()

    asyncio.run(asyncio.wait_for(go(), 60))
    found = by_name((tmp_path / "out").read_text())
    assert set(found) == {str(i) for i in range(40)} and not (tmp_path / "out.part").exists()
    assert {one["response"]["body"]["choices"][0]["text"] for one in found.values()} == {"yes"}


def test_a_lost_engine_is_the_runs_end_and_no_lines_answer(tmp_path: Path) -> None:
    async def go(model: Holding, given: BatchInput, out: BatchOutput) -> None:
        run = BatchRun(model.state, model.app, given, out, most=4)

        def failure() -> Exception | None:
            return RuntimeError("it burns") if model.now == 4 else None

        def fail(message: str) -> None:
            cast(Any, model.engine).failure = EngineDeadError(message)
            model.release.set()

        cast(Any, model.engine).fail = fail
        with pytest.raises(ExecutorError, match="it burns"):
            await run.until_done(failure)
        assert run.done == 0

    given, out = files(tmp_path, 9)
    with given, out:
        asyncio.run(asyncio.wait_for(go(Holding(), given, out), 60))
    assert [path.name for path in tmp_path.iterdir()] == ["in"]


def test_a_stop_ends_what_runs_and_writes_what_is_done(tmp_path: Path) -> None:
    async def go(model: Holding, given: BatchInput, out: BatchOutput) -> None:
        run = BatchRun(model.state, model.app, given, out, most=2)
        running = asyncio.create_task(run.until_done(alive))
        while model.now < 2:
            await asyncio.sleep(0.01)
        run.stop(15)
        await running
        assert (run.done, run.whole, run.signalled) == (1, False, 15)
        assert not model.state.running  # what was under way has left the gate

    (tmp_path / "in").write_text(as_lines(["no json", *(line(f"{i}", prompt="x") for i in range(5))]))
    with BatchInput(str(tmp_path / "in")) as given, BatchOutput(str(tmp_path / "out")) as out:
        asyncio.run(asyncio.wait_for(go(Holding(), given, out), 60))
    assert list(by_name((tmp_path / "out.part").read_text())) == [None]


@pytest.mark.parametrize(("quiet", "tty", "bar"), [(False, True, True), (False, False, False), (True, True, False)])
def test_progress_is_for_who_looks(quiet: bool, tty: bool, bar: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def go(model: Holding) -> None:
        model.release.set()
        with given, out:
            await BatchRun(model.state, model.app, given, out, quiet=quiet).until_done(alive)

    given, out = files(tmp_path, 3)
    said = io.StringIO()
    said.isatty = lambda: tty  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", said)
    asyncio.run(asyncio.wait_for(go(Holding()), 60))
    assert ("Requests" in said.getvalue() and "3/3" in said.getvalue()) if bar else not said.getvalue()


def test_who_reads_slowly_is_waited_for(tmp_path: Path) -> None:
    """No more lines are begun than there are workers, and what they have made is not lost when it ends."""
    reading = threading.Event()

    async def go(model: Holding, given: BatchInput, out: BatchOutput) -> None:
        write = out.write
        cast(Any, out).write = lambda result: reading.wait(60) and write(result)
        model.release.set()
        run = BatchRun(model.state, model.app, given, out, most=3)
        running = asyncio.create_task(run.until_done(alive))
        while len(model.engine.jobs) < 3:
            await asyncio.sleep(0.01)
        await asyncio.sleep(0.2)
        assert len(model.engine.jobs) == 3 and not model.now and not run.done
        run.stop(2)
        reading.set()
        await running
        assert run.done == 3

    given, out = files(tmp_path, 20)
    with given, out:
        asyncio.run(asyncio.wait_for(go(Holding(), given, out), 60))
    assert len(by_name((tmp_path / "out.part").read_text())) == 3


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a device that is always full")
def test_a_full_disk_is_told_and_nothing_hangs(tmp_path: Path) -> None:
    async def go(model: Holding, given: BatchInput, out: BatchOutput) -> None:
        model.release.set()
        await BatchRun(model.state, model.app, given, out).until_done(alive)

    given, _ = files(tmp_path, 300)
    with pytest.raises(ConfigError, match=r"output_file='/dev/full' cannot be written: No space"), given, BatchOutput("/dev/full") as out:
        asyncio.run(asyncio.wait_for(go(Holding(), given, out), 60))


def test_a_pipe_without_a_reader_ends_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    reading, writing = os.pipe()
    os.close(reading)
    monkeypatch.setattr(sys, "stdout", os.fdopen(writing, "w"))
    (tmp_path / "in").write_text(as_lines([line("a", prompt="x")]))
    model = Holding()
    model.release.set()
    with pytest.raises(BrokenPipeError), BatchInput(str(tmp_path / "in")) as given, BatchOutput("-") as out:
        asyncio.run(asyncio.wait_for(BatchRun(model.state, model.app, given, out).until_done(alive), 60))


def test_a_request_from_inside_passes_the_whole_server() -> None:
    model = Scripted("yes", max_body_bytes=64)
    answer = asyncio.run(post(model.app, "/v1/completions", b'{"prompt": "%s"}' % (b"x" * 64)))
    assert answer.status == 413 and json.loads(answer.body)["error"]["code"] == "body_too_long" and answer.request_id


# --- lines and files ---


@pytest.mark.parametrize(
    ("text", "name", "code", "words"),
    [
        ("{", None, "invalid_json", "line 7: no valid JSON"),
        ('{"custom_id": "a"}', "a", "invalid_line", "`method`"),
        ('{"method": "POST", "url": "/v1/completions", "body": {}}', None, "invalid_line", "`custom_id`"),
        (json.dumps(line(5)), None, "invalid_line", "$.custom_id"),
        ("[]", None, "invalid_line", "array"),
        (json.dumps(line("a") | {"method": "GET"}), "a", "invalid_method", "POST"),
        (json.dumps(line("a", "/v1/models")), "a", "invalid_url", "/v1/embeddings"),
        (json.dumps(line("a", "http://elsewhere/v1/completions")), "a", "invalid_url", "/v1/embeddings"),
        (json.dumps(line("a", stream=True)), "a", "stream_unsupported", "stream"),
        ('{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": ' + "[" * 100_000, None, "invalid_json", "line 7"),
        ('{"custom_id": "\udcff"}', None, "invalid_json", "line 7"),
    ],
)
def test_what_is_no_request_says_why(text: str, name: str | None, code: str, words: str) -> None:
    found = read_line(7, text.encode(errors="surrogateescape"))
    assert isinstance(found, Refused)
    assert (found.custom_id, found.error.code) == (name, code) and words in found.error.message


@pytest.mark.parametrize("body", ['{"n": 1e400}', "5", '{"stream": false}', '{"deep": ' + "[" * 70 + "]" * 70 + "}"])
def test_a_body_is_its_routes_to_read(body: str) -> None:
    found = read_line(1, f'{{"custom_id": "a", "method": "POST", "url": "/v1/completions", "body": {body}}}'.encode())
    assert isinstance(found, Ask) and bytes(found.body).decode() == body


@pytest.mark.parametrize(
    ("given", "told", "words"),
    [
        (None, "out", "--input-file is not set"),
        ("in", None, "--output-file is not set"),
        ("https://host/in.jsonl", "out", "only files of this machine are read"),
        ("in", "s3://bucket/out", "only files of this machine are written"),
        ("twice", "out", "lines 1 and 3 have the same custom_id 'a'"),
        ("empty", "out", "has no line"),
        ("nowhere", "out", "--input-file='nowhere' cannot be read: No such file"),
        ("in", "in", "its requests would be lost"),
        ("in", "no/such/folder", "cannot be written: No such file"),
        ("in", ".", "cannot be written: Is a directory"),
        ("in", "old", "old.part is there"),
        ("in", "out --max-concurrency 0", "--max-concurrency=0 is impossible"),
        ("in", "out --request-timeout 0", "--request-timeout=0"),
        ("in", "out --chat-template nowhere", "--chat-template='nowhere' cannot be read"),
        ("in", "out --model /no/such/model", "no such folder"),
    ],
)
def test_what_cannot_be_is_told_before_anything_is_loaded(
    given: str | None, told: str | None, words: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    Path("in").write_text(as_lines([line("a")]))
    Path("twice").write_text(as_lines([line("a"), line("b"), line("a")]))
    Path("empty").write_text("\n \n")
    Path("old.part").write_text("what was done")
    before = sorted(os.listdir())
    assert main(["run-batch", *(["-i", given] if given else []), *(["-o", *told.split()] if told else [])]) == 2
    assert words in capsys.readouterr().err
    assert sorted(os.listdir()) == before and Path("old.part").read_text() == "what was done"


def test_a_pipe_as_a_file_is_read_twice(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    writer = subprocess.Popen(["sh", "-c", f"printf '%s' '{json.dumps(line('a'))}' > {tmp_path}/pipe"])
    with BatchInput(str(tmp_path / "pipe")) as given:
        assert given.count == 1 and [one.custom_id for one in given.lines()] == ["a"]
    assert writer.wait(10) == 0


def test_of_two_runs_to_one_file_the_second_is_refused_at_once(tmp_path: Path) -> None:
    name, part = str(tmp_path / "out"), tmp_path / "out.part"
    with BatchOutput(name):
        assert part.exists()
        with pytest.raises(ConfigError, match="another run writes it now"):
            BatchOutput(name)
    assert not part.exists(), "nothing was written, and it would be in the way of the next run"
    with BatchOutput(name) as out:
        out.write(result_of(Ask("a", "POST", "/v1/completions", msgspec.Raw(b"{}")), Response(200, "r", msgspec.Raw(b"{}"))))
    assert part.read_bytes().count(b"\n") == 1


KILLED = "import os, sys; from lockstep.server.batch_file import BatchOutput; out = BatchOutput(sys.argv[1]); os.kill(os.getpid(), 9)"


def test_an_empty_part_file_of_a_killed_run_is_taken_over(tmp_path: Path) -> None:
    name, part = str(tmp_path / "out"), tmp_path / "out.part"
    assert subprocess.run([sys.executable, "-c", KILLED, name]).returncode == -signal.SIGKILL
    assert part.exists() and not part.stat().st_size
    with BatchOutput(name) as out:
        with pytest.raises(ConfigError, match="another run writes it now"):
            BatchOutput(name)
        out.write(result_of(read_line(1, b"no json")))
        out.finish()
    assert (tmp_path / "out").read_bytes().count(b"\n") == 1 and not part.exists()


def test_what_a_file_system_says_late_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    name, old = str(tmp_path / "out"), b"of an earlier run"
    Path(name).write_bytes(old)
    with BatchOutput(name) as out:
        out.write(result_of(read_line(1, b"no json")))
        with monkeypatch.context() as patch:
            patch.setattr(os, "fsync", Mock(side_effect=OSError(errno.EDQUOT, "quota")))
            with pytest.raises(ConfigError, match="quota"):
                out.finish()
        assert Path(name).read_bytes() == old and Path(out.where).read_bytes().count(b"\n") == 1


def test_a_run_that_ends_leaves_alone_what_is_not_its_own(tmp_path: Path) -> None:
    name, part = str(tmp_path / "out"), tmp_path / "out.part"
    with BatchOutput(name) as first:
        part.unlink()
        with BatchOutput(name):
            first.__exit__()
            assert part.exists(), "the second run's"


def test_a_link_in_the_place_of_the_part_file_is_refused(tmp_path: Path) -> None:
    """Also one that leads nowhere."""
    part = tmp_path / "out.part"
    for target in ("nowhere", "there"):
        (tmp_path / "there").write_bytes(b"")
        part.symlink_to(tmp_path / target)
        with pytest.raises(ConfigError, match=r"out\.part is a symbolic link, which is not followed: remove it"):
            BatchOutput(str(tmp_path / "out"))
        part.unlink()
    assert sorted(os.listdir(tmp_path)) == ["there"]


def test_without_locks_a_part_file_is_whose_who_made_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def without(*_: object) -> None:
        raise OSError(errno.ENOLCK, "no locks")

    monkeypatch.setattr(batch_file.fcntl, "flock", without)
    with (
        BatchOutput(str(tmp_path / "out")),
        pytest.raises(ConfigError, match="no locks to tell whether another run writes it: remove it if"),
    ):
        BatchOutput(str(tmp_path / "out"))


def test_a_finished_file_is_moved_before_it_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever came between would find what is done, or have its own file moved."""
    seen: list[str] = []
    replace = Path.replace

    def watched(self: Path, target: Path) -> Path:
        with pytest.raises(ConfigError) as refused:
            BatchOutput(str(tmp_path / "out"))
        seen.append(str(refused.value))
        return replace(self, target)

    monkeypatch.setattr(Path, "replace", watched)
    with BatchOutput(str(tmp_path / "out")) as out:
        out.write(result_of(read_line(1, b"no json")))
        out.finish()
    assert len(seen) == 1 and "another run writes it now" in seen[0]


def test_a_device_has_no_part_file(tmp_path: Path) -> None:
    with BatchOutput("/dev/null") as out:
        out.write(batch_file.result_of(read_line(1, b"no json")))
        out.finish()
        assert out.where == "/dev/null"
    assert not Path("/dev/null.part").exists()
