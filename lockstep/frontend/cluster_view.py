"""`/v1/cluster` as plain data: what `lockstep top` and the web page draw."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import Any

import msgspec

from lockstep.cluster.live import ReplicaNow
from lockstep.engine.stats import EngineStats
from lockstep.observability.histogram import percentile

OWN = ("replica", "state", "restarts", "report_age_s", "tokens_per_s", "prompt_tokens_per_s", "step_ms", "predicted_step_ms")


def cluster_view(
    replicas: Sequence[ReplicaNow],
    *,
    shape: dict[str, int],
    uptime_s: float,
    requests: int,
    firsts_s: Iterable[float],
    betweens_s: Iterable[float],
) -> dict[str, Any]:
    """The JSON but for the model. requests: that ended. firsts_s, betweens_s: latest times to first tokens, and between tokens."""
    rows = [_replica(one) for one in replicas]
    stats = [one.stats for one in replicas if one.stats is not None]
    totals: dict[str, Any] = {name: sum(row[name] for row in rows) for name in ("running", "waiting", "restarts")}
    totals |= {name: round(sum(row[name] for row in rows), 1) for name in ("tokens_per_s", "prompt_tokens_per_s")}
    totals["kv_usage"] = _share(sum(s.kv_blocks_used for s in stats), sum(s.kv_blocks for s in stats))
    totals["prefix_hit_rate"] = _share(sum(s.prefix_hit_tokens for s in stats), sum(s.prefix_query_tokens for s in stats))
    totals |= {"requests": requests, "ttft_ms": _percentiles(firsts_s), "itl_ms": _percentiles(betweens_s)}
    return {"uptime_s": round(uptime_s, 1), "parallel": shape, "replicas": rows, "totals": totals}


def _replica(one: ReplicaNow) -> dict[str, Any]:
    row = {name: getattr(one, name) for name in OWN}
    row["report_age_s"] = None if one.report_age_s is None else round(one.report_age_s, 3)
    row |= _usage(one.stats)
    row["ranks"] = msgspec.to_builtins(one.ranks) if one.state == "ready" else []
    return row


def _usage(stats: EngineStats | None) -> dict[str, Any]:
    if stats is None:
        return {"running": 0, "waiting": 0, "kv_usage": 0.0, "prefix_hit_rate": 0.0}
    return {
        "running": stats.running,
        "waiting": stats.waiting,
        "kv_usage": _share(stats.kv_blocks_used, stats.kv_blocks),
        "prefix_hit_rate": _share(stats.prefix_hit_tokens, stats.prefix_query_tokens),
    }


def _share(part: int, whole: int) -> float:
    return round(part / whole, 4) if whole else 0.0


def _percentiles(seconds: Iterable[float]) -> dict[str, float] | None:
    values = sorted(seconds)
    if not values:
        return None
    return {name: round(1e3 * (percentile(values, share) or 0.0), 3) for name, share in (("p50", 0.5), ("p90", 0.9), ("p99", 0.99))}
