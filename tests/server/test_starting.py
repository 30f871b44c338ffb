"""What a server answers before it serves: on a socket with nothing behind it, and while a real one starts."""

from __future__ import annotations

import asyncio
import contextlib
import socket
import ssl
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from lockstep.config.serve import ServeOptions
from lockstep.server.launch import listen
from lockstep.server.starting import Porch
from lockstep.testing.executors import wait_for
from lockstep.testing.server import RunningServer
from tests.server.test_edge_socket import certificate

UNREADY = ("/health", "/ready", "/readyz", "/startupz")


@contextlib.contextmanager
def porch(**options: Any) -> Iterator[tuple[Porch, socket.socket, int]]:
    """(it, the listener, its port)."""
    given = ServeOptions(port=0, **options)
    with contextlib.closing(listen(given)) as listener, contextlib.closing(Porch(given, listener)) as found:
        yield found, listener, listener.getsockname()[1]


def test_it_lives_and_is_not_ready() -> None:
    with porch(root_path="/llm") as (found, _, port), httpx.Client(base_url=f"http://127.0.0.1:{port}", timeout=30) as http:
        assert http.get("/livez").json() == {"status": "alive"} and http.get("/llm/livez").status_code == 200
        found.app.at = "the moon rises"
        for path in UNREADY:
            answer = http.get(path)
            assert answer.status_code == 503 and answer.json()["status"] == "starting" and int(answer.headers["retry-after"]) > 0
            (problem,) = answer.json()["problems"]
            assert problem["why"] == "the moon rises" and problem["for_s"] > 0
        for answer in (http.get("/metrics"), http.post("/v1/completions", content=b"x" * (8 << 20), headers={"x-request-id": "mine"})):
            assert answer.status_code == 503 and int(answer.headers["retry-after"]) > 0
            error = answer.json()["error"]
            assert error["code"] == "starting" and error["type"] == "server_error" and "the moon rises" in error["message"]
        assert answer.headers["x-request-id"] == "mine"


def test_strangers_learn_no_more_than_that_it_starts() -> None:
    with porch(api_key=["k"]) as (_, _, port):
        answer = httpx.get(f"http://127.0.0.1:{port}/health", timeout=30)
        assert answer.json() == {"status": "starting", "problems": [{"process": "server", "state": "starting"}]}


def test_tls(tmp_path: Path) -> None:
    own = certificate(tmp_path, "server")
    with porch(**own) as (_, _, port):
        trusting = ssl.create_default_context(cafile=own["ssl_certfile"])
        assert httpx.get(f"https://127.0.0.1:{port}/health", verify=trusting, timeout=30).status_code == 503


def test_who_was_let_in_is_answered_and_who_comes_later_waits_for_the_server() -> None:
    with porch() as (found, listener, port):
        assert httpx.get(f"http://127.0.0.1:{port}/livez", timeout=30).status_code == 200
        early = socket.create_connection(("127.0.0.1", port), 30)
        early.sendall(b"GET /health HTTP/1.1\r\nHost: x\r\n")
        assert wait_for(lambda: bool(found._server.server_state.connections))
        found.let_go()
        late = socket.create_connection(("127.0.0.1", port), 30)
        late.sendall(b"GET /health HTTP/1.1\r\n")
        early.sendall(b"\r\n")
        with contextlib.closing(early):
            assert early.makefile("rb").read().startswith(b"HTTP/1.1 503")
        found._thread.join(30)
        assert not found._thread.is_alive(), "it stays for nobody"
        listener.settimeout(30)
        connection, _ = listener.accept()
        with contextlib.closing(late), contextlib.closing(connection):
            assert connection.recv(100).startswith(b"GET /health"), "its request was lost"


def test_nobody_who_says_nothing_holds_up_the_end() -> None:
    with porch() as (found, _, port):
        silent = socket.create_connection(("127.0.0.1", port), 30)
        assert wait_for(lambda: bool(found._server.server_state.connections))
        found.close()
        assert not found._thread.is_alive()
        silent.close()


def test_one_that_cannot_answer_is_no_failure(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    def fails(*args: Any, **options: Any) -> Any:
        raise OSError("no such thing")

    monkeypatch.setattr(asyncio, "Runner", fails)
    with porch() as (found, _, _):
        found.let_go()
    assert "nothing is answered during the start" in caplog.text


@pytest.mark.timeout(240)
@pytest.mark.parametrize("processes", ["1", "2"])
def test_no_connection_is_refused_or_lost_while_it_starts(tmp_path: Path, processes: str) -> None:
    path, answers, broken, over = str(tmp_path / "socket"), list[tuple[str, int]](), list[str](), threading.Event()
    words = [*("--uds", path, "-asc", processes, "--no-cpu-binding", "--shutdown-timeout", "2")]
    server = RunningServer([sys.executable, "-m", "lockstep", "serve", *words], {})

    def ask() -> None:
        with httpx.Client(transport=httpx.HTTPTransport(uds=path), base_url="http://server", timeout=60) as http:
            while not over.is_set():
                for target in ("/livez", "/readyz", "/v1/models"):
                    try:
                        answers.append((target, http.get(target).status_code))
                    except httpx.TransportError as e:
                        broken.append(repr(e))
                time.sleep(0.02)

    try:
        assert wait_for(lambda: is_listening(path), 60), server.said()
        asking = [threading.Thread(target=ask) for _ in range(3)]
        for one in asking:
            one.start()
        try:
            server.wait_ready()
            with httpx.Client(transport=httpx.HTTPTransport(uds=path), base_url="http://server", timeout=60) as http:
                assert http.get("/readyz").status_code == 200, "it said that it serves"
        finally:
            over.set()
            for one in asking:
                one.join()
        assert not broken, broken[:3]
        assert ("/readyz", 503) in answers and ("/v1/models", 503) in answers, "nothing was answered during the start"
        assert ("/livez", 200) in answers and ("/livez", 503) not in answers
        assert server.stop() == 0
    finally:
        server.close()


def is_listening(path: str) -> bool:
    with contextlib.suppress(OSError), socket.socket(socket.AF_UNIX) as probe:
        probe.connect(path)
        return True
    return False
