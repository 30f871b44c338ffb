"""What something takes where other programs on the machine now and then make it take longer."""

from __future__ import annotations

from collections.abc import Iterable


def undisturbed(seconds: Iterable[float]) -> float:
    """The lower quartile of what was measured again and again; of three or fewer, the least.

    Neighbours only ever add time, and a virtual CPU is either shared at a moment or not: the quicker part says what the machine does
    by itself, and agrees between runs where the median does not (Chen and Revels 2016, "Robust benchmarking in noisy environments").
    The very least is left out, since clocks and sums of a few steps are noisy downwards too. Raises IndexError for nothing.
    """
    ordered = sorted(seconds)
    return ordered[len(ordered) // 4]
