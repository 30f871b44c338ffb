"""What one API process counts of its own: HTTP requests, by route and status."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from typing import Any

from prometheus_client import ProcessCollector
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily
from prometheus_client.metrics_core import Metric
from starlette._utils import get_route_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from lockstep.observability.histogram import Histogram

SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0, 60.0, 120.0, 300.0)
UNKNOWN = "unknown"  # the route of what matches none, so that nobody can make series up
METHODS = {"GET", "POST", "PUT", "PATCH", "DELETE", "HEAD", "OPTIONS"}


class HttpMetrics:
    """The counts."""

    def __init__(self, api_server: int = 0) -> None:
        self.api_server = str(api_server)
        self.in_progress = 0
        self._requests: dict[tuple[str, str, str], int] = {}  # route, method, status
        self._seconds: dict[tuple[str, str], Histogram] = {}  # route, method

    def answered(self, route: str, method: str, status: int, seconds: float) -> None:
        """A request has been answered, a stream to its end. status 0: the client did not wait for it."""
        key = (route, method, str(status or 499))
        self._requests[key] = self._requests.get(key, 0) + 1
        histogram = self._seconds.get(key[:2]) or self._seconds.setdefault(key[:2], Histogram.of(SECONDS))
        histogram.observe(seconds)

    def families(self, refused: Mapping[str, int]) -> Iterator[Metric]:
        """As metrics, with what the process itself is. refused: by admission, for each reason."""
        requests = CounterMetricFamily(
            "lockstep:http_requests", "HTTP requests answered.", labels=["route", "method", "status", "api_server"]
        )
        for (route, method, status), count in sorted(self._requests.items()):
            requests.add_metric([route, method, status, self.api_server], count)
        seconds = HistogramMetricFamily(
            "lockstep:http_request_duration_seconds",
            "From an HTTP request's arrival to the end of its answer.",
            labels=["route", "method", "api_server"],
        )
        for (route, method), histogram in sorted(self._seconds.items()):
            seconds.add_metric([route, method, self.api_server], histogram.cumulative(), histogram.total)
        busy = GaugeMetricFamily("lockstep:http_requests_in_progress", "HTTP requests that are being answered.", labels=["api_server"])
        busy.add_metric([self.api_server], self.in_progress)
        yield from (requests, seconds, busy, *self._refusals(refused), *self._process())

    def _refusals(self, refused: Mapping[str, int]) -> Iterator[Metric]:
        for prefix in ("lockstep:", "vllm:"):
            family = CounterMetricFamily(f"{prefix}admission_rejections", "Requests answered 429.", labels=["reason", "api_server"])
            for reason, count in refused.items():
                family.add_metric([reason, self.api_server], count)
            yield family

    def _process(self) -> Iterator[Metric]:
        for family in ProcessCollector(registry=None).collect():
            family.samples = [sample._replace(labels={**sample.labels, "api_server": self.api_server}) for sample in family.samples]
            yield family


class HttpMetricsMiddleware:
    """Counts every request of an application, refused ones too: it is around everything else."""

    def __init__(self, app: ASGIApp, metrics: HttpMetrics) -> None:
        self.app, self.metrics = app, metrics
        self._paths: frozenset[str] | None = None

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        status, began = 0, time.perf_counter()

        async def noted(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
            await send(message)

        self.metrics.in_progress += 1
        try:
            await self.app(scope, receive, noted)
        finally:
            self.metrics.in_progress -= 1
            route = getattr(scope.get("route"), "path", None) or self._of(scope)
            method = scope["method"] if scope["method"] in METHODS else "OTHER"
            self.metrics.answered(route, method, status, time.perf_counter() - began)

    def _of(self, scope: Scope) -> str:
        """The route of what was refused before it came to one."""
        if self._paths is None:
            self._paths = frozenset(paths_of(scope["app"]))
        path = get_route_path(scope)
        return path if path in self._paths else UNKNOWN


def paths_of(app: Any) -> Iterator[str]:
    """The path of every route, those of routers too."""
    for route in app.routes:
        if hasattr(route, "original_router"):
            yield from paths_of(route.original_router)
        else:
            yield route.path
