"""What a rank tells of itself while it runs, without being asked."""

from __future__ import annotations

import msgspec


class RankLive(msgspec.Struct, kw_only=True, frozen=True):
    """One rank at one moment. What is marked + only grows while the rank's process lives."""

    rank: int  # within its replica
    pid: int = 0
    phase: str = ""  # in words: "idle after step 913"
    beat_age_s: float | None = None  # since its last sign of life; None: it gives none
    memory_bytes: int = 0  # resident memory, on a GPU the device memory in use; 0: not known
    steps: int = 0  # + run so far
    step_s: float = 0.0  # + in them
    wait_s: float = 0.0  # + of that, in meetings with other ranks for those who came later
    stage_wait_s: float = 0.0  # + of that, for another pipeline stage
    collectives: dict[str, tuple[int, float]] = {}  # + by name, like "tp:0.all_reduce": how many, and seconds in them

    @property
    def work_s(self) -> float:
        """+ Seconds of steps in which it waited for nobody."""
        return self.step_s - self.wait_s - self.stage_wait_s
