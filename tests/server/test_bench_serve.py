"""`lockstep bench serve`: what it sends, what it counts, and that its figures are those of what happened."""

from __future__ import annotations

import json
import math
import resource
import subprocess
import sys
import xml.etree.ElementTree as ET
from itertools import pairwise
from pathlib import Path

import pytest

from lockstep.cli.bench import serve
from lockstep.cli.bench.main import run as bench
from lockstep.cli.bench.serve import ServeArgs, repeated, run_loop
from lockstep.cli.bench.serve_client import Choice, Delta, Record, brings_output
from lockstep.cli.bench.serve_load import arrivals, random_load, read_load
from lockstep.cli.bench.serve_plot import plot
from lockstep.cli.bench.serve_stats import figures, parse_sla, percentile, table
from lockstep.testing.server import running_server
from tests.server.sse_server import sse_server

SMALL = {"num_prompts": 6, "random_input_len": 4, "random_output_len": 5}


def record(sent: float, *times: float, error: str = "") -> Record:
    ended = times[-1] if times else sent + 1
    return Record(sent_s=sent, ended_s=ended, times_s=list(times), input_tokens=10, output_tokens=len(times), error_kind=error)


# --- figures ---


def test_the_figures_are_those_of_the_records() -> None:
    records = [
        record(0.0, 0.1, 0.2, 0.4),
        record(1.0, 1.3, 1.4),
        record(2.0, error="http_429"),
        record(2.0, 2.5, 2.6, error="disconnected"),
    ]
    found = figures(records, 4.0, {})
    assert (found["completed"], found["failed"], found["errors"]) == (2, 2, {"http_429": 1, "disconnected": 1})
    assert (found["total_input_tokens"], found["total_output_tokens"]) == (20, 5)
    assert (found["request_throughput"], found["output_throughput"], found["total_token_throughput"]) == (0.5, 1.25, 6.25)
    assert found["mean_ttft_ms"] == 200 and found["median_ttft_ms"] == 200 and found["p99_ttft_ms"] == 298
    assert found["mean_itl_ms"] == pytest.approx(133.333) and found["median_itl_ms"] == 100
    assert found["mean_tpot_ms"] == 125 and found["mean_e2el_ms"] == 400
    assert "request_goodput" not in found
    assert "p99" in table(found) and "http_429: 1" in table(found)


def test_a_load_of_failures_has_figures_too() -> None:
    found = figures([record(0.0, error="connect")], 1.0, {"ttft": 5})
    assert found["completed"] == 0 and found["median_ttft_ms"] is None and found["request_goodput"] == 0
    assert "-" in table(found)


def test_goodput_counts_requests_that_keep_every_limit() -> None:
    fast, late, slow = record(0.0, 0.1, 0.15), record(0.0, 0.5, 0.55), record(0.0, 0.1, 0.9)
    assert figures([fast, late, slow], 1.0, parse_sla(["ttft:200"]))["request_goodput"] == 2
    assert figures([fast, late, slow], 1.0, parse_sla(["ttft:200", "tpot:60"]))["request_goodput"] == 1
    assert figures([fast, late, slow], 1.0, parse_sla(["e2el:560"]))["request_goodput"] == 2


@pytest.mark.parametrize("pair", ["ttft", "ttft:x", "speed:3", "itl:5", "ttft:-1"])
def test_a_limit_that_is_none_is_refused(pair: str) -> None:
    with pytest.raises(ValueError, match="--goodput"):
        parse_sla([pair])


def test_percentiles_are_between_neighbours() -> None:
    assert percentile([1.0, 2.0, 3.0, 4.0, 5.0], 50) == 3
    assert percentile([1.0, 2.0], 90) == pytest.approx(1.9)
    assert percentile([7.0], 99) == 7


def test_what_counts_as_output() -> None:
    assert brings_output(Choice(text="a")) and brings_output(Choice(text=""))  # half a character
    assert not brings_output(Choice(text="", finish_reason="stop"))
    assert brings_output(Choice(delta=Delta(content="a"))) and brings_output(Choice(delta=Delta(reasoning_content="a")))
    assert not brings_output(Choice(delta=Delta(content=""))) and not brings_output(Choice(delta=Delta(), finish_reason="stop"))


# --- loads ---


def test_a_random_load_is_seeded_and_of_the_lengths_asked_for() -> None:
    def load(seed: int, ratio: float = 0.5):
        return random_load(50, 100, 20, ratio, 0, 0, 1000, False, seed)

    assert load(1) == load(1) and load(1) != load(2)
    assert all(50 <= len(ask.prompt) <= 150 and 10 <= ask.output_tokens <= 30 for ask in load(1))
    assert len({len(ask.prompt) for ask in load(1)}) > 10
    assert {(len(ask.prompt), ask.output_tokens) for ask in load(1, 0.0)} == {(100, 20)}
    assert all(0 <= token < 1000 for ask in load(1) for token in ask.prompt)


def test_shared_prefixes_are_shared() -> None:
    load = random_load(60, 10, 5, 0.0, 3, 32, 1000, False, 1)
    assert len({tuple(ask.prompt[:32]) for ask in load}) == 3
    assert len({tuple(ask.prompt) for ask in load}) == 60


def test_a_chat_is_given_words() -> None:
    (ask,) = random_load(1, 12, 5, 0.0, 0, 0, 1000, True, 1)
    body = ask.body(chat=True)
    assert len(body["messages"][0]["content"].split()) == 12 and body["max_tokens"] == 5


def test_poisson_arrivals_have_their_rate_and_bursts_more_spread() -> None:
    def gaps(burstiness: float) -> tuple[float, float]:
        due = arrivals(20_000, 50.0, burstiness, 3)
        assert due == sorted(due) and due[0] == 0
        found = [b - a for a, b in pairwise(due)]
        mean = sum(found) / len(found)
        return mean, math.sqrt(sum((g - mean) ** 2 for g in found) / len(found)) / mean

    for burstiness in (0.25, 1.0, 4.0):
        mean, variation = gaps(burstiness)
        assert mean == pytest.approx(0.02, rel=0.05) and variation == pytest.approx(burstiness**-0.5, rel=0.05)
    assert arrivals(3, math.inf, 1.0, 3) == [0, 0, 0]


def test_a_file_of_prompts_is_read_in_order_and_again(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "a", "output_tokens": 3}\n\n{"prompt": [1, 2]}\n')
    found = read_load(path, 3, 9, chat=False)
    assert [(ask.prompt, ask.output_tokens) for ask in found] == [("a", 3), ([1, 2], 9), ("a", 3)]
    path.write_text('{"messages": [{"role": "user", "content": "hi"}]}\n')
    assert read_load(path, 1, 9, chat=True)[0].body(chat=True)["messages"][0]["content"] == "hi"


@pytest.mark.parametrize("line", ["{}", "no json", "[1]", '{"prompt": {"a": 1}}', '{"prompt": "x", "output_tokens": "many"}'])
def test_a_line_that_is_no_request_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "prompts.jsonl"
    path.write_text('{"prompt": "fine"}\n' + line + "\n")
    with pytest.raises(ValueError, match=r"--dataset-path.*line 2"):
        read_load(path, 5, 9, chat=False)


# --- flags ---


@pytest.mark.parametrize(
    ("flag", "value"),
    [
        *[("num_prompts", 0), ("request_rate", 0.0), ("burstiness", 0.0), ("random_range_ratio", 1.0), ("max_concurrency", 0)],
        *[("endpoint", "embeddings"), ("prefix_len", 5), ("extra_body", "[1]"), ("num_warmups", -1), ("goodput", ["x"])],
    ],
)
def test_what_cannot_be_is_refused_by_its_flag(flag: str, value: object) -> None:
    with pytest.raises(ValueError, match=f"--{flag.replace('_', '-')}="):
        ServeArgs(**{flag: value}).check()  # type: ignore[arg-type]


def test_goodput_takes_several_limits_after_one_flag() -> None:
    assert repeated(["--goodput", "ttft:200", "tpot:50", "--seed", "1"]) == ["--goodput", "ttft:200", "--goodput", "tpot:50", "--seed", "1"]
    assert repeated(["--base-url", "http://x:1"]) == ["--base-url", "http://x:1"]


def test_endpoints_may_be_paths() -> None:
    assert ServeArgs(endpoint="/v1/chat/completions").kind == "chat" and ServeArgs(endpoint="/v1/completions").kind == "completions"


# --- against a server ---


def test_a_thousand_streams_at_once() -> None:
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (min(hard, 8192), hard))
    try:
        with sse_server(gap_s=0.05, hold=1000) as server:  # none ends before all have begun
            outcome = run_loop(ServeArgs(base_url=server.url, **(SMALL | {"num_prompts": 1000})))
            assert server.most == 1000
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    found = figures(outcome.records, outcome.duration_s, {})
    assert (found["completed"], found["total_output_tokens"], found["total_input_tokens"]) == (1000, 5000, 7000)
    assert all(len(r.times_s) == 5 and r.times_s == sorted(r.times_s) and r.sent_s < r.times_s[0] for r in outcome.records)
    assert min(r.times_s[-1] - r.times_s[0] for r in outcome.records) > 0.15  # four gaps of 50 ms: nothing is merged


def test_a_closed_loop_keeps_its_bound_and_its_connections() -> None:
    with sse_server(gap_s=0.002) as server:
        outcome = run_loop(ServeArgs(base_url=server.url, max_concurrency=3, num_warmups=2, **(SMALL | {"num_prompts": 20})))
        assert server.most == 3 and server.connections == 3
        assert len(server.asked) == 22 and len(outcome.records) == 20
    assert all(not record.error_kind for record in outcome.records)


def test_requests_are_sent_when_they_are_due() -> None:
    with sse_server() as server:
        outcome = run_loop(ServeArgs(base_url=server.url, request_rate=40.0, **(SMALL | {"num_prompts": 12})))
    sent = [record.sent_s for record in outcome.records]
    assert all(record.sent_s >= record.due_s for record in outcome.records)
    assert sent[-1] - outcome.records[0].due_s >= arrivals(12, 40.0, 1.0, 0)[-1] - 0.001


def test_what_is_sent() -> None:
    with sse_server() as server:
        run_loop(ServeArgs(base_url=server.url + "/v1/", ignore_eos=True, api_key="k", extra_body='{"top_k": 3}', **SMALL))
        assert all("Authorization: Bearer k\r\n" in head for head in server.headers)
        body = server.asked[0]
        assert len(body.pop("prompt")) == 4
        fields = {"model": "fake", "max_tokens": 5, "temperature": 0.0, "ignore_eos": True, "top_k": 3}
        assert body == {**fields, "stream": True, "stream_options": {"include_usage": True}}
        outcome = run_loop(ServeArgs(base_url=server.url, endpoint="chat", **SMALL))
        assert server.asked[-1]["messages"][0]["role"] == "user"
    assert all(len(record.times_s) == 5 for record in outcome.records)  # the opening event is no token


def test_every_kind_of_failure_is_counted_by_its_name(tmp_path: Path) -> None:
    path = tmp_path / "prompts.jsonl"
    words = ["refuse", "break", "event-error", "empty", "hang", "fine"]
    path.write_text("".join(json.dumps({"prompt": word, "output_tokens": 4}) + "\n" for word in words))
    with sse_server() as server:
        outcome = run_loop(ServeArgs(base_url=server.url, dataset_path=str(path), num_prompts=6, request_timeout=1.0, max_concurrency=1))
    kinds = [record.error_kind for record in outcome.records]
    assert kinds == ["http_429", "disconnected", "stream_error", "empty", "timeout", ""]
    assert outcome.records[0].error == "the queue is full." and "a rank died" in outcome.records[2].error
    assert figures(outcome.records, outcome.duration_s, {})["completed"] == 1


def test_a_server_that_is_not_there_is_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    assert bench(["serve", "--base-url", "http://127.0.0.1:1", "--num-prompts", "2"]) == 1
    said = capsys.readouterr().err
    assert "cannot be reached" in said and "Traceback" not in said
    assert bench(["serve", "--base-url", "http://127.0.0.1:1", "--model", "m", "--num-prompts", "2", "--json"]) == 1
    assert json.loads(capsys.readouterr().out)["errors"] == {"connect": 2}


def test_an_address_that_is_none_is_refused() -> None:
    with pytest.raises(ValueError, match="--base-url=ftp"):
        bench(["serve", "--base-url", "ftp://x"])


def test_the_command_prints_one_line_and_writes_its_files(tmp_path: Path) -> None:
    """With torch blocked: the load generator starts in a moment, on a machine without it."""
    code = (
        "import sys\n"
        "class Block:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in ('torch', 'transformers', 'fastapi'): raise ImportError(name)\n"
        "sys.meta_path.insert(0, Block())\n"
        "from lockstep.cli.main import main\n"
        "sys.exit(main(sys.argv[1:]))\n"
    )
    result, picture = tmp_path / "r.json", tmp_path / "p.svg"
    with sse_server(gap_s=0.001) as server:
        words = [
            "bench",
            "serve",
            "--base-url",
            server.url,
            "--num-prompts",
            "8",
            "--random-output-len",
            "5",
            "--json",
            "--goodput",
            "ttft:9999",
        ]
        words += ["e2el:9999", "--save-result", str(result), "--plot", str(picture), "--random-input-len", "4", "--api-key", "secret-key"]
        done = subprocess.run([sys.executable, "-c", code, *words], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    (line,) = done.stdout.splitlines()
    found = json.loads(line)
    assert (found["completed"], found["total_output_tokens"], found["model"]) == (8, 40, "fake")
    assert found["request_goodput"] == pytest.approx(found["request_throughput"])
    assert "secret-key" not in line + result.read_text()
    saved = json.loads(result.read_text())
    assert len(saved["requests"]) == 8 and all(len(r["times_s"]) == 5 for r in saved["requests"])
    root = ET.fromstring(picture.read_text())
    assert root.tag.endswith("svg") and len(root.findall(".//{*}polyline")) == 6


def test_a_plot_escapes_names() -> None:
    ET.fromstring(plot([record(0.0, 0.1)], '<script> & "model"'))


def test_a_real_server_is_measured(capsys: pytest.CaptureFixture[str]) -> None:
    with running_server() as server:
        words = ["--base-url", server.url, "--num-prompts", "8", "--max-concurrency", "4", "--random-input-len", "16"]
        assert serve.run([*words, "--random-output-len", "8", "--ignore-eos", "--json", "--num-warmups", "1"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["completed"], found["failed"]) == (8, 0)
    assert found["total_output_tokens"] > 0 and found["median_ttft_ms"] > 0 and found["median_itl_ms"] is not None
