"""A real server, one rank of which is slow: what `/metrics`, `/v1/cluster` and `lockstep top` say of it."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest
from prometheus_client.parser import text_string_to_metric_families

from lockstep.testing.server import RunningServer, running_server
from tests.unit.test_otel import PARENT, TRACE, attributes, collector

REQUESTS, TOKENS = 3, 40
KEY = {"Authorization": "Bearer k"}


@pytest.fixture(scope="module")
def traced() -> Iterator[tuple[RunningServer, list[Any]]]:
    with (
        collector() as (url, spans),
        running_server(*("--api-key", "k", "--otlp-traces-endpoint", url), environment={"LOCKSTEP_FAULT": "decode:1:slow=0.01"}) as server,
    ):
        for _ in range(REQUESTS):
            body = {"prompt": "def add", "max_tokens": TOKENS}
            headers = {**KEY, "traceparent": f"00-{TRACE}-{PARENT}-01"}
            httpx.post(f"{server.url}/v1/completions", json=body, headers=headers, timeout=60).raise_for_status()
        yield server, spans


def cluster(server: RunningServer) -> dict[str, Any]:
    found: dict[str, Any] = httpx.get(f"{server.url}/v1/cluster", headers=KEY, timeout=30).raise_for_status().json()
    return found


def test_the_slow_rank_is_named(traced: tuple[RunningServer, list[Any]]) -> None:
    server, _ = traced
    give_up_s = time.monotonic() + 20
    while not any(rank["slow"] for rank in cluster(server)["replicas"][0]["ranks"]) and time.monotonic() < give_up_s:
        time.sleep(0.1)  # its next report
    found = cluster(server)
    (replica,) = found["replicas"]
    assert [rank["slow"] for rank in replica["ranks"]] == [False, True]
    fast, slow = replica["ranks"]
    assert fast["wait_ms"] > slow["wait_ms"] and slow["step_ms"] > 10
    assert found["parallel"] == {"tp": 2, "pp": 1, "dp": 1} and found["totals"]["requests"] == REQUESTS
    assert found["totals"]["itl_ms"]["p50"] > 10 and replica["predicted_step_ms"] is not None


def test_top_once_prints_what_the_server_says(traced: tuple[RunningServer, list[Any]]) -> None:
    server, _ = traced
    command = [sys.executable, "-m", "lockstep", "top", server.url, "--api-key", "k", "--once"]
    done = subprocess.run([*command, "--json"], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert [rank["tp"] for rank in found["replicas"][0]["ranks"]] == [0, 1] and found["totals"]["requests"] == REQUESTS
    table = subprocess.run(command, capture_output=True, text=True, timeout=60)
    assert table.returncode == 0 and "DP 1 x PP 1 x TP 2" in table.stdout, table.stderr


def test_metrics_count_what_was_served(traced: tuple[RunningServer, list[Any]]) -> None:
    server, _ = traced
    httpx.get(f"{server.url}/no/such/route", headers=KEY, timeout=30)
    answer = httpx.get(f"{server.url}/metrics", headers=KEY, timeout=30)
    assert answer.status_code == 200 and answer.headers["content-type"].startswith("text/plain")
    samples = {(s.name, *sorted(s.labels.items())): s.value for f in text_string_to_metric_families(answer.text) for s in f.samples}
    for prefix in ("lockstep:", "vllm:"):
        own = (("engine", "0"), ("model_name", "lockstep-demo"))
        assert samples[(f"{prefix}generation_tokens_total", *own)] == REQUESTS * TOKENS
        assert samples[(f"{prefix}e2e_request_latency_seconds_count", *own)] == REQUESTS
        assert samples[(f"{prefix}inter_token_latency_seconds_count", *own)] == REQUESTS * (TOKENS - 1)
        assert samples[(f"{prefix}request_success_total", own[0], ("finished_reason", "length"), own[1])] == REQUESTS
    http = {key[1:]: v for key, v in samples.items() if key[0] == "lockstep:http_requests_total"}
    completions = (("api_server", "0"), ("method", "POST"), ("route", "/v1/completions"), ("status", "200"))
    assert http[completions] == REQUESTS
    assert any(("route", "unknown") in key and ("status", "404") in key for key in http)
    waits = {key: v for key, v in samples.items() if key[0] == "lockstep:rank_wait_seconds_total"}
    assert len(waits) == 2 and max(waits.values()) > 0.1
    assert any(("collective", "tp:0.layers") in key for key in samples)


def test_spans_continue_the_callers_trace(traced: tuple[RunningServer, list[Any]]) -> None:
    _, spans = traced
    give_up_s = time.monotonic() + 30
    while len(spans) < REQUESTS and time.monotonic() < give_up_s:
        time.sleep(0.1)
    assert len(spans) == REQUESTS
    assert {span.trace_id.hex() for span in spans} == {TRACE} and {span.parent_span_id.hex() for span in spans} == {PARENT}
    for span in spans:
        have = attributes(span)
        assert have["gen_ai.usage.completion_tokens"] == TOKENS and have["gen_ai.usage.prompt_tokens"] > 0
        assert 0 < have["gen_ai.latency.time_to_first_token"] < have["gen_ai.latency.e2e"]
