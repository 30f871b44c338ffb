"""`lockstep top` and `lockstep collect-env`, without a server of ours."""

from __future__ import annotations

import io
import json
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from rich.console import Console

from lockstep.cli import client, collect_env, top
from lockstep.cli.client import key_for
from lockstep.cli.errors import UsageError
from lockstep.cli.top_table import picture
from lockstep.frontend.request_metrics import RequestMetrics
from lockstep.testing.fakes import FakeClock
from lockstep.testing.observed import ObservedClient


def cluster() -> dict[str, Any]:
    """What the server would say: two replicas of two ranks, rank 1 of replica 1 slow and silent."""
    found = RequestMetrics(ObservedClient(), FakeClock(100.0)).cluster()  # type: ignore[arg-type]
    found["replicas"][1]["ranks"][1] |= {"slow": True, "heartbeat_age_s": 30.0, "wait_ms": 0.1}
    return json.loads(json.dumps({"model": "demo [x]", **found}))


@contextmanager
def server(body: bytes, status: int = 200, key: str = "") -> Iterator[str]:
    class Handler(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            allowed = not key or self.headers.get("authorization") == f"Bearer {key}"
            self.send_response((status if self.path == "/v1/cluster" else 404) if allowed else 401)
            self.end_headers()
            self.wfile.write(body)

        def log_message(self, *_: object) -> None:
            pass

    found = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=found.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{found.server_address[1]}"
    finally:
        found.shutdown()
        found.server_close()
        thread.join(5.0)


def drawn(found: dict[str, Any], problem: str = "") -> str:
    console = Console(file=io.StringIO(), width=180, force_terminal=True, highlight=False)
    console.print(picture(found, problem))
    return console.file.getvalue()  # type: ignore[attr-defined]


def test_the_slow_rank_stands_out() -> None:
    text = drawn(cluster())
    red = [line for line in text.splitlines() if "SLOW" in line]
    assert len(red) == 1 and "\x1b[1;31m" in red[0] and "30.0 s" in red[0]
    assert "slow: rank 1 of replica 1" in text and "demo [x]" in text
    assert "DP 2 x PP 1 x TP 2" in text


def test_a_replica_without_ranks_and_a_lost_server_are_shown() -> None:
    found = cluster()
    found["replicas"][0] |= {"state": "waiting", "ranks": []}
    text = drawn(found, "gone")
    assert "waiting" in text and "gone" in text


def test_once_prints_one_table_or_one_line_of_json(capsys: pytest.CaptureFixture[str]) -> None:
    with server(json.dumps(cluster()).encode(), key="k") as url:
        assert top.run([url, "--api-key", "k", "--once", "--json"]) == 0
        assert json.loads(capsys.readouterr().out) == cluster()
        assert top.run([f"{url}/v1", "--api-key", "k", "--once"]) == 0
        table = capsys.readouterr().out
        assert table.count("demo [x]") == 1 and "SLOW" in table
        assert top.run([url, "--once"]) == 1
        assert "--api-key" in capsys.readouterr().err
        for variables in ({"LOCKSTEP_API_KEY": "k other", "OPENAI_API_KEY": "sk"}, {"OPENAI_API_KEY": "k"}):
            with pytest.MonkeyPatch.context() as patch:
                for name, value in variables.items():
                    patch.setenv(name, value)
                assert top.run([url, "--once"]) == 0


def test_the_servers_own_key_is_sent_to_this_host_only(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LOCKSTEP_API_KEY", "own other")
    for url in ("http://127.0.0.1:8000", "http://localhost:8000/v1", "http://[::1]:80", "https://localhost", "localhost:8000", "127.0.0.1"):
        assert key_for(url, None) == "own"
        assert key_for(url, "") == ""
    for url in ("http://gpu.example:8000", "http://10.0.0.1", "https://api.example/v1", "gpu.example", "http://["):
        assert key_for(url, None) == ""
        with pytest.MonkeyPatch.context() as patch:
            patch.setenv("OPENAI_API_KEY", "sk")
            assert key_for(url, None) == "sk"
            assert key_for(url, "given") == "given"


@pytest.mark.parametrize(("body", "status", "words"), [(b"hello", 200, "JSON"), (b"[]", 200, "replicas"), (b"{}", 500, "HTTP 500")])
def test_what_is_no_such_server_is_said_in_a_line(body: bytes, status: int, words: str, capsys: pytest.CaptureFixture[str]) -> None:
    with server(body, status) as url:
        assert top.run([url, "--once"]) == 1
    assert words in capsys.readouterr().err
    assert top.run([url, "--once"]) == 1
    assert "cannot be reached" in capsys.readouterr().err


def test_addresses() -> None:
    assert client.address("host:1") == "http://host:1" and client.address("https://h/x/v1/") == "https://h/x"
    for wrong in ("", "ftp://h", "http://"):
        with pytest.raises(UsageError):
            client.address(wrong)


def test_collect_env_tells_versions_and_hides_secrets(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setenv("LOCKSTEP_CLUSTER_KEY", "sesame")
    monkeypatch.setenv("HF_TOKEN", "sesame")
    monkeypatch.setenv("NCCL_DEBUG", "INFO")
    assert collect_env.run(["--json"]) == 0
    text = capsys.readouterr().out
    found = json.loads(text)
    assert "sesame" not in text and found["variables"]["NCCL_DEBUG"] == "INFO" and found["variables"]["LOCKSTEP_CLUSTER_KEY"] == "(set)"
    assert found["lockstep"]["torch"] and found["processor"]["cores"] and found["processor"]["kernels"]
    assert collect_env.run([]) == 0
    assert "[processor]" in capsys.readouterr().out


def test_none_of_them_loads_torch_or_the_server() -> None:
    code = (
        "import sys\n"
        "from lockstep.cli import collect_env, complete, top, top_table\n"
        "collect_env.collect()\n"
        "print([m for m in ('torch', 'fastapi', 'zmq', 'transformers') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.stdout.strip() == "[]", done.stdout + done.stderr[-1000:]
