"""What is not well with the engine, as an API process knows it."""

from __future__ import annotations

from typing import Any

from lockstep.cluster.health import EngineHealth
from lockstep.protocol.health import QUIET_S, SILENT_S
from lockstep.utils import procs


def problems_of(failure: Exception | None, health: EngineHealth | None, silent_s: float, lost_why: str = "") -> list[dict[str, Any]]:
    """In words and numbers, worst first; empty when every rank answers. health: None between two engine processes.

    lost_why: why the former one is none any more, where that is known.
    """
    if failure is not None:
        return [{"process": "engine", "state": "dead", "why": str(failure).partition("\n")[0]}]
    if health is None:
        why = (lost_why or "the engine's process died") + ": another starts"
        return [{"process": "engine", "state": "starting", "for_s": round(silent_s, 2), "why": why}]
    stopped = silent_s > QUIET_S and procs.state(health.pid) in ("T", "")
    if stopped or silent_s > SILENT_S:
        kind, why = "stopped" if stopped else "silent", f"the engine's process has given no sign of life for {silent_s:.1f} s"
        return [{"process": "engine", "pid": health.pid, "state": kind, "for_s": round(silent_s, 2), "why": why}]
    return health.problems()
