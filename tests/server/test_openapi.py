"""Schemathesis over the server's own OpenAPI: whatever a request is made of, no operation answers with a server error."""

from __future__ import annotations

import re
import subprocess
import sys
import tempfile
from collections.abc import Iterator

import httpx
import pytest
import schemathesis as tool

from lockstep.testing.server import RunningServer, running_server

HOLDS = ("/pause", "/sleep", "/start_profile", "/stop_profile")  # they hold the server, or write files: test_ops.py tests them
CHECKS = "not_a_server_error,status_code_conformance,content_type_conformance,response_schema_conformance,response_headers_conformance"


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    """A short context: many requests do not say how long their answer may be."""
    with running_server("--max-model-len", "48", "--max-num-seqs", "64") as found:
        yield found


def schemathesis(server: RunningServer, examples: int, timeout_s: float, *more: str) -> str:
    """Run it over every other operation; what it printed. Raises AssertionError for what it found."""
    words = ["--max-examples", str(examples), "--checks", CHECKS, "--exclude-path-regex", f"^({'|'.join(HOLDS)})$"]
    limits = ["--request-timeout", "60", "--generation-database", "none", "--continue-on-failure", "--no-color", *more]
    command = [sys.executable, "-m", "schemathesis.cli", "run", f"{server.url}/openapi.json", *words, *limits]
    with tempfile.TemporaryDirectory() as folder:  # it keeps a cache where it runs
        done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL, cwd=folder)
    assert done.returncode == 0, f"{done.stdout[-6000:]}{done.stderr[-2000:]}\n{server.said()[-2000:]}"
    return done.stdout


def test_no_operation_fails(server: RunningServer) -> None:
    said = schemathesis(server, 5, 120, "--phases", "fuzzing", "--seed", "1")
    found = re.search(r"(\d+) generated, (\d+) passed", said)
    assert found and int(found[1]) == int(found[2]) >= 50, said
    assert httpx.get(f"{server.url}/health", timeout=10).status_code == 200


@pytest.mark.full
@pytest.mark.timeout(1500)
def test_no_operation_fails_with_many_examples(server: RunningServer) -> None:
    schemathesis(server, 100, 1400, "--phases", "examples,coverage,fuzzing")
    assert httpx.get(f"{server.url}/health", timeout=10).status_code == 200


def test_a_shape_that_the_allowed_tokens_cannot_write_is_refused(server: RunningServer) -> None:
    """Found by schemathesis as a server error: it shows only beside the model."""
    body = {
        "input": "x",
        "messages": [{"role": "user", "content": "x"}],
        "allowed_token_ids": [1],
        "response_format": {"type": "json_object"},
    }
    for path in ("/v1/responses", "/v1/chat/completions"):
        answer = httpx.post(server.url + path, json=body, timeout=60)
        assert answer.status_code == 400 and answer.json()["error"]["param"] == "response_format", answer.text


def test_errors_are_documented_as_they_are(server: RunningServer) -> None:
    for path, operations in httpx.get(f"{server.url}/openapi.json", timeout=10).json()["paths"].items():
        for operation in operations.values():
            assert {"4XX", "5XX"} <= set(operation["responses"]) and "422" not in operation["responses"], path


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/v1/responses"])
def test_streams_are_documented_as_they_are(path: str, server: RunningServer) -> None:
    body = {"prompt": "x", "messages": [{"role": "user", "content": "x"}], "input": "x", "max_tokens": 4, "stream": True}
    operation = tool.openapi.from_url(f"{server.url}/openapi.json")[path]["POST"]
    answer = operation.Case(body=body, media_type="application/json").call_and_validate(timeout=60)
    assert answer.status_code == 200 and answer.headers["content-type"][0].startswith("text/event-stream"), answer
