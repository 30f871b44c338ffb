"""Spans, as a collector gets them."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import pytest
from opentelemetry.proto.collector.trace.v1.trace_service_pb2 import ExportTraceServiceRequest

from lockstep.config.errors import ConfigError
from lockstep.observability import otel
from lockstep.testing.observed import output, request

TRACE, PARENT = "0af7651916cd43dd8448eb211c80319c", "b7ad6b7169203331"


@contextmanager
def collector() -> Iterator[tuple[str, list[Any]]]:
    """(URL, spans) of a collector: OTLP, protobuf over HTTP."""
    spans: list[Any] = []

    class Handler(BaseHTTPRequestHandler):
        def do_POST(self) -> None:
            message = ExportTraceServiceRequest()
            message.ParseFromString(self.rfile.read(int(self.headers["content-length"])))
            spans.extend(s for r in message.resource_spans for scope in r.scope_spans for s in scope.spans)
            assert self.path == "/v1/traces"
            self.send_response(200)
            self.end_headers()

        def log_message(self, *_: object) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield f"http://127.0.0.1:{server.server_address[1]}", spans
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5.0)


def attributes(span: Any) -> dict[str, Any]:
    return {a.key: getattr(a.value, a.value.WhichOneof("value")) for a in span.attributes}


def test_a_request_is_a_span_that_continues_its_callers_trace() -> None:
    with collector() as (url, spans):
        found = otel.spans_to(url, "m")
        token = otel.incoming.set({"traceparent": f"00-{TRACE}-{PARENT}-01"})
        arrived_s = time.monotonic() - 1.0
        found.started("7", [request("7", 11, arrival_s=arrived_s)])
        otel.incoming.reset(token)
        found.took([output("7", 1, queued_s=0.25), output("another")])
        found.took([output("7", 2, finish_reason="length")])
        found.ended("7", ["length"])
        found.ended("7", ["length"])
        found.close()
        (span,) = spans
        assert span.trace_id.hex() == TRACE and span.parent_span_id.hex() == PARENT and span.name == "llm_request"
        have = attributes(span)
        assert have["gen_ai.request.id"] == "7" and have["gen_ai.request.model"] == have["gen_ai.response.model"] == "m"
        assert have["gen_ai.usage.prompt_tokens"] == 11 and have["gen_ai.usage.completion_tokens"] == 3
        assert have["gen_ai.latency.time_in_queue"] == 0.25
        assert 1.0 <= have["gen_ai.latency.time_to_first_token"] <= have["gen_ai.latency.e2e"] < 60
        assert abs(span.end_time_unix_nano - span.start_time_unix_nano - 1e9 * have["gen_ai.latency.e2e"]) < 0.2e9


def test_without_a_parent_a_trace_begins_and_failures_are_told() -> None:
    with collector() as (url, spans):
        found = otel.spans_to(f"{url}/v1/traces", "m")
        found.started("1", [request("1.0", n=2), request("1.1", n=2, choice=1)])
        found.took([output("1.0", 4)])
        found.ended("1", ["error", "error"], "the engine is gone")
        asked = request("2")
        asked.external_id, asked.response_id = "mine", "cmpl-mine"
        found.started("2", [asked])
        found.ended("2", ["abort"])
        found.close()
        first, second = sorted(spans, key=lambda s: s.start_time_unix_nano)
        assert not first.parent_span_id and first.trace_id != second.trace_id
        assert first.status.code == 2 and first.status.message == "the engine is gone"
        assert attributes(first)["gen_ai.usage.num_sequences"] == 2 and attributes(first)["gen_ai.usage.completion_tokens"] == 4
        assert "gen_ai.latency.time_to_first_token" not in attributes(second)
        assert (attributes(second)["gen_ai.request.id"], attributes(second)["gen_ai.response.id"]) == ("mine", "cmpl-mine")


@pytest.mark.parametrize("url", ["127.0.0.1:4318", "ftp://x/y", "http://"])
def test_an_endpoint_that_is_none_is_refused(url: str) -> None:
    with pytest.raises(ConfigError, match="otlp_traces_endpoint"):
        otel.check_endpoint(url)
    otel.check_endpoint("http://127.0.0.1:4318")
    otel.check_endpoint("")


def test_without_the_packages_the_remedy_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(otel, "find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=r"pip install lockstep\[otel\]"):
        otel.check_endpoint("http://127.0.0.1:4318")
