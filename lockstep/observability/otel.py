"""OpenTelemetry: one span for each request, sent as OTLP over HTTP. Needs `pip install lockstep[otel]`; imported only when asked for.

A `traceparent` header of the HTTP request is continued: the span is its child. Attributes have the names that the field uses
(`gen_ai.*`); latencies are seconds.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import Any
from urllib.parse import urlsplit

from lockstep.config.errors import ConfigError
from lockstep.protocol import EngineOutput, EngineRequest

SPAN = "llm_request"
EXPORT_S = 5.0  # that one export may take
incoming: ContextVar[dict[str, str] | None] = ContextVar("incoming", default=None)  # trace headers of the HTTP request at hand


def check_endpoint(endpoint: str) -> None:
    """Raises ConfigError where spans cannot be sent there: a URL that is none, or packages that are not installed."""
    if not endpoint:
        return
    parts = urlsplit(endpoint)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise ConfigError(f"otlp_traces_endpoint={endpoint!r} must be a URL like http://127.0.0.1:4318/v1/traces.")
    if find_spec("opentelemetry") is None or find_spec("opentelemetry.sdk") is None or find_spec("opentelemetry.exporter") is None:
        raise ConfigError(f"otlp_traces_endpoint={endpoint!r} needs packages that are not installed: pip install lockstep[otel].")


def spans_to(endpoint: str, model: str) -> RequestSpans:
    """Spans that are sent to the collector at `endpoint`, in batches, by a thread of their own."""
    from opentelemetry.exporter.otlp.proto.http.trace_exporter import OTLPSpanExporter
    from opentelemetry.sdk.resources import Resource
    from opentelemetry.sdk.trace import TracerProvider
    from opentelemetry.sdk.trace.export import BatchSpanProcessor

    if urlsplit(endpoint).path in ("", "/"):
        endpoint = endpoint.rstrip("/") + "/v1/traces"
    provider = TracerProvider(resource=Resource.create({"service.name": "lockstep"}))
    provider.add_span_processor(BatchSpanProcessor(OTLPSpanExporter(endpoint=endpoint, timeout=EXPORT_S)))
    return RequestSpans(provider, model)


@dataclass
class _Open:
    """A job under way. Monotonic times."""

    span: Any
    arrived_s: float
    prompt_tokens: int
    ids: list[str] = field(default_factory=list)
    first_s: float = 0.0
    last_s: float = 0.0
    queued_s: float = 0.0
    tokens: int = 0


class RequestSpans:
    """Begins and ends them. One thread (an event loop) calls it."""

    def __init__(self, provider: Any, model: str) -> None:
        """provider: an SDK's TracerProvider; closed with this."""
        self._provider, self._model = provider, model
        self._tracer = provider.get_tracer("lockstep")
        self._open: dict[str, _Open] = {}
        self._job_of: dict[str, str] = {}  # engine request -> job

    def started(self, job: str, requests: Sequence[EngineRequest]) -> None:
        """A job is given to the engine, as these requests."""
        from opentelemetry.trace import SpanKind
        from opentelemetry.trace.propagation.tracecontext import TraceContextTextMapPropagator

        now_s, first = time.monotonic(), requests[0]
        arrived_s = first.arrival_s or now_s
        sampling = first.sampling
        attributes = {
            "gen_ai.request.id": first.external_id or job,
            "gen_ai.request.model": self._model,
            "gen_ai.response.model": self._model,
            "gen_ai.request.n": sampling.n,
            "gen_ai.request.temperature": sampling.temperature,
            "gen_ai.request.top_p": sampling.top_p,
            "gen_ai.usage.num_sequences": len(requests),
            "gen_ai.usage.prompt_tokens": len(first.prompt_token_ids),
        }
        if first.response_id:
            attributes["gen_ai.response.id"] = first.response_id
        if sampling.max_tokens is not None:
            attributes["gen_ai.request.max_tokens"] = sampling.max_tokens
        span = self._tracer.start_span(
            SPAN,
            context=TraceContextTextMapPropagator().extract(incoming.get() or {}),
            kind=SpanKind.SERVER,
            attributes=attributes,
            start_time=_wall_ns(arrived_s),
        )
        self._open[job] = _Open(span, arrived_s, len(first.prompt_token_ids), [r.request_id for r in requests])
        self._job_of.update((r.request_id, job) for r in requests)

    def took(self, outputs: Sequence[EngineOutput]) -> None:
        """The engine gave these."""
        now_s = time.monotonic()
        for output in outputs:
            one = self._open.get(self._job_of.get(output.request_id, ""))
            if one is not None and output.new_token_ids:
                if not one.first_s:
                    one.first_s, one.queued_s = now_s, output.queued_s
                one.last_s = now_s
                one.tokens += len(output.new_token_ids)

    def ended(self, job: str, reasons: Sequence[str | None], error: str | None = None) -> None:
        """The job's last output has gone out, each completion's end for one of these reasons. Unknown jobs are ignored."""
        one = self._open.pop(job, None)
        if one is None:
            return
        for request_id in one.ids:
            del self._job_of[request_id]
        now_s = time.monotonic()
        found: dict[str, Any] = {
            "gen_ai.usage.completion_tokens": one.tokens,
            "gen_ai.response.finish_reasons": [reason or "" for reason in reasons],
            "gen_ai.latency.e2e": now_s - one.arrived_s,
        }
        if one.first_s:
            began_s = one.arrived_s + one.queued_s
            found |= {
                "gen_ai.latency.time_in_queue": one.queued_s,
                "gen_ai.latency.time_to_first_token": one.first_s - one.arrived_s,
                "gen_ai.latency.time_in_model_prefill": max(0.0, one.first_s - began_s),
                "gen_ai.latency.time_in_model_decode": one.last_s - one.first_s,
                "gen_ai.latency.time_in_model_inference": max(0.0, one.last_s - began_s),
            }
        one.span.set_attributes(found)
        if error is not None:
            from opentelemetry.trace import Status, StatusCode

            one.span.set_status(Status(StatusCode.ERROR, error))
        one.span.end(_wall_ns(now_s))

    def close(self) -> None:
        """Send what has ended; may take `EXPORT_S` seconds."""
        self._provider.shutdown()


def _wall_ns(monotonic_s: float) -> int:
    """A moment of the monotonic clock as Unix time."""
    return time.time_ns() - int(1e9 * (time.monotonic() - monotonic_s))
