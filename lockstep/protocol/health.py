"""How a rank is, in passing: what it is at, since when, and whether it gives a sign of life."""

from __future__ import annotations

import msgspec

PULSE_S = 0.5  # how often each process says how those below it are
QUIET_S = 1.2  # who has said nothing for so long is looked at: is it stopped?
SILENT_S = 15.0  # who has said nothing for so long does not answer, whatever the kernel says of it


class RankHealth(msgspec.Struct, kw_only=True, frozen=True):
    """One rank at one moment."""

    rank: int  # within its replica
    pid: int = 0  # 0: on another host
    where: str = ""  # what it is at, in words: "step 12 collective 3", "idle after step 12"
    phase: str = ""  # in short: "step 12", "load", "idle"
    age_s: float = 0.0  # since it got any further; an idle rank gets no further, and is well
    beat_age_s: float = 0.0  # since its last sign of life
    stopped: bool = False  # by a signal, or a debugger

    @property
    def answers(self) -> bool:
        """Whether it gives signs of life. A busy rank does: a thread of its own beats."""
        return not self.stopped and self.beat_age_s < SILENT_S
