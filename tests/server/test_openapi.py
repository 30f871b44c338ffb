"""Schemathesis over the server's own OpenAPI: whatever a request is made of, no operation answers with a server error."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Iterator

import httpx
import pytest

from lockstep.testing.server import RunningServer, running_server

HOLDS = ("/pause", "/sleep", "/start_profile", "/stop_profile")  # they hold the server, or write files: their own test is below
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
    done = subprocess.run(command, capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{done.stdout[-6000:]}{done.stderr[-2000:]}\n{server.said()[-2000:]}"
    return done.stdout


def test_no_operation_fails(server: RunningServer) -> None:
    said = schemathesis(server, 5, 120, "--phases", "fuzzing", "--seed", "1")
    assert "Selected: " in said and "No issues found" in said, said
    assert httpx.get(f"{server.url}/health", timeout=10).status_code == 200


@pytest.mark.full
@pytest.mark.timeout(1500)
def test_no_operation_fails_with_many_examples(server: RunningServer) -> None:
    schemathesis(server, 100, 1400, "--phases", "examples,coverage,fuzzing")
    assert httpx.get(f"{server.url}/health", timeout=10).status_code == 200
