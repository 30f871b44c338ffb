"""What watches an API process's requests: counts for `/metrics`, and spans where they are asked for."""

from __future__ import annotations

from fastapi import FastAPI
from starlette.types import ASGIApp, Receive, Scope, Send

from lockstep.observability import otel
from lockstep.server.http_metrics import HttpMetrics, HttpMetricsMiddleware
from lockstep.server.state import ServerState


def observe(app: FastAPI, state: ServerState) -> None:
    """Trace the requests of `app`'s engine when --otlp-traces-endpoint is set."""
    endpoint = state.options.otlp_traces_endpoint
    if endpoint:
        state.engine.observer = otel.spans_to(endpoint, state.model)
        app.add_middleware(TraceHeaders)


def count(app: FastAPI, state: ServerState) -> None:
    """Count every answer of `app`: call it last, for what is added last is outermost."""
    app.state.http_metrics = HttpMetrics(state.engine.index)
    app.add_middleware(HttpMetricsMiddleware, metrics=app.state.http_metrics)


class TraceHeaders:
    """Keeps the trace headers of the request at hand where spans find them."""

    NAMES = (b"traceparent", b"tracestate")

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            otel.incoming.set({k.decode(): v.decode("latin-1") for k, v in scope["headers"] if k in self.NAMES})
        await self.app(scope, receive, send)
