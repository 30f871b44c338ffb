"""An API process of several that does not serve, as the others tell of it."""

from __future__ import annotations

import time
from typing import Any

import msgspec


class Missing(msgspec.Struct, array_like=True, frozen=True):
    """since_s: of the monotonic clock, which is one for all processes. pid: 0 between two."""

    index: int
    pid: int
    state: str  # starting, stopped, silent
    since_s: float
    why: str

    def problem(self) -> dict[str, Any]:
        """As /health lists it."""
        for_s = round(time.monotonic() - self.since_s, 2)
        return {"process": f"api-{self.index}", "pid": self.pid, "state": self.state, "for_s": for_s, "why": self.why}
