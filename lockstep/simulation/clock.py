"""Time that passes only when it is told to."""

from __future__ import annotations


class VirtualClock:
    """Seconds since the simulation began. Called like `time.monotonic`, so that the scheduler takes it for one."""

    def __init__(self) -> None:
        self.now_s = 0.0

    def __call__(self) -> float:
        return self.now_s

    def advance(self, to_s: float) -> None:
        """It is `to_s` now. Time never goes back."""
        assert to_s >= self.now_s, f"the clock stands at {self.now_s}, and {to_s} is before that"
        self.now_s = to_s
