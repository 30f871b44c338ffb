"""`/metrics` for Prometheus, `/v1/cluster` for people: both without asking a rank."""

from __future__ import annotations

import asyncio
from typing import Any

from fastapi import APIRouter, Request, Response

from lockstep.frontend.request_metrics import MetricsSnapshot
from lockstep.server import metrics_text
from lockstep.server.http_metrics import HttpMetrics
from lockstep.server.state import ServerState, State

CALL_S = 10.0

router = APIRouter(tags=["metrics"])


@router.get("/metrics", response_class=Response)
async def metrics(request: Request, state: State) -> Response:
    """Prometheus text: the engine's numbers, and this process's own."""
    snapshot = await state.engine.call("metrics", type=MetricsSnapshot, timeout_s=CALL_S)
    http: HttpMetrics = request.app.state.http_metrics
    own = list(http.families(state.admission.refused))
    text = await asyncio.to_thread(metrics_text.render, snapshot, state.model, cache_settings(state), own)
    return Response(text, media_type=metrics_text.CONTENT_TYPE)


@router.get("/v1/cluster")
async def cluster(state: State) -> dict[str, Any]:
    """Replicas and ranks as they are now (see docs/observability.md)."""
    found: dict[str, Any] = await state.engine.call("cluster", timeout_s=CALL_S)
    return {"model": state.model, **found}


def cache_settings(state: ServerState) -> dict[str, Any]:
    """What `cache_config_info` tells."""
    cache, memory = state.engine.config.cache, state.engine.memory
    return {
        "block_size": cache.block_size,
        "enable_prefix_caching": cache.enable_prefix_caching,
        "gpu_memory_utilization": cache.gpu_memory_utilization,
        "num_gpu_blocks": memory.num_blocks,
    }
