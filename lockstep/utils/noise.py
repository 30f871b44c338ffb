"""What something takes where other programs on the machine now and then make it take longer."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from itertools import pairwise
from statistics import median

PIECE_S = 0.01  # more than what tokens of one step are apart when they reach who reads them


def undisturbed(seconds: Iterable[float]) -> float:
    """The lower quartile of what was measured again and again; of three or fewer, the least.

    Neighbours only ever add time, and a virtual CPU is either shared at a moment or not: the quicker part says what the machine does
    by itself, and agrees between runs where the median does not (Chen and Revels 2016, "Robust benchmarking in noisy environments").
    The very least is left out, since clocks and sums of a few steps are noisy downwards too. Raises IndexError for nothing.
    """
    ordered = sorted(seconds)
    return ordered[len(ordered) // 4]


def undisturbed_course(courses: Sequence[Sequence[float]]) -> list[float]:
    """When the events of something would have come that was done again and again, had nothing disturbed any piece of it.

    courses: of each time, the seconds from its start to each of the same two or more events, such as the tokens of one answer. Pieces
    are the time to the first event, and from there on as many events as usually come in PIECE_S: a neighbour that leaves a virtual CPU
    alone for a tenth of a second leaves few whole answers alone.
    """
    last = len(courses[0]) - 1
    usual = median((course[-1] - course[0]) / last for course in courses)
    events = min(last, max(1, math.ceil(PIECE_S / usual))) if usual > 0 else last
    times = [undisturbed(course[0] for course in courses)]
    for begin, end in pairwise([*range(0, last - events + 1, events), last]):  # what is left is of the last piece
        took = undisturbed(course[end] - course[begin] for course in courses)
        times += [times[-1] + took * (i + 1) / (end - begin) for i in range(end - begin)]
    return times
