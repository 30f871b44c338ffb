"""What a rank's time went into: sums that it keeps in its progress cell, for anyone to read at any moment. No torch.

48 eight-byte numbers. Each has one writer, and is written in one store; they are not consistent with each other to the last step.

    0 process id   1 resident bytes   2 device bytes   3 steps   4 ns in steps   5 ns waiting   6 ns waiting for a stage   7 free
    8..40 for each named collective: how many, ns in them
"""

from __future__ import annotations

from collections.abc import Sequence

from lockstep.protocol.live import RankLive

NAMES = 16  # collectives that have a number of their own
BYTES = 384
_PID, _RESIDENT, _DEVICE, _STEPS, _STEP, _WAIT, _STAGE_WAIT = range(7)
_COLLECTIVES = 8


class RankTimes:
    """One rank's sums."""

    def __init__(self, view: memoryview | None = None) -> None:
        """`view`: `BYTES` bytes of shared memory; None for a rank that nobody else looks at."""
        self._numbers = memoryview(bytearray(BYTES) if view is None else view).cast("q")

    def is_process(self, pid: int) -> None:
        """Say which process the rank is."""
        self._numbers[_PID] = pid

    def memory(self, resident_bytes: int | None = None, device_bytes: int | None = None) -> None:
        """Set what is given. Device bytes are what is shown, where there are any."""
        if resident_bytes is not None:
            self._numbers[_RESIDENT] = resident_bytes
        if device_bytes is not None:
            self._numbers[_DEVICE] = device_bytes

    def stepped(self, ns: int) -> None:
        """A step took so long, all told."""
        self._numbers[_STEPS] += 1
        self._numbers[_STEP] += ns

    def waited(self, ns: int) -> None:
        """Of a step, so long went into waiting for ranks that came later to a meeting,"""
        self._numbers[_WAIT] += ns

    def waited_for_stage(self, ns: int) -> None:
        """or so long for another pipeline stage."""
        self._numbers[_STAGE_WAIT] += ns

    def collective(self, number: int, ns: int) -> None:
        """A collective (its number in the cell; 0: unnamed, not counted) took so long."""
        if number:
            at = _COLLECTIVES + 2 * (number - 1)
            self._numbers[at] += 1
            self._numbers[at + 1] += ns

    def live(self, rank: int, *, phase: str = "", beat_age_s: float | None = None, names: Sequence[str] = ()) -> RankLive:
        """The sums, as they are told. names: of the collectives, from number 1 on."""
        n = self._numbers.tolist()
        rows = ((name, n[_COLLECTIVES + 2 * i], n[_COLLECTIVES + 2 * i + 1] * 1e-9) for i, name in enumerate(names))
        return RankLive(
            rank=rank,
            pid=n[_PID],
            phase=phase,
            beat_age_s=beat_age_s,
            memory_bytes=n[_DEVICE] or n[_RESIDENT],
            steps=n[_STEPS],
            step_s=n[_STEP] * 1e-9,
            wait_s=n[_WAIT] * 1e-9,
            stage_wait_s=n[_STAGE_WAIT] * 1e-9,
            collectives={name: (count, seconds) for name, count, seconds in rows if count},
        )

    def release(self) -> None:
        """Let go of the memory."""
        self._numbers.release()
