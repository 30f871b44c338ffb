"""Measures this machine with the engine's own ranks: what `planner.cpu` needs to know the step of any model on it.

1. One rank on all cores, and two ranks that share them: models of five sizes, whole on their rank, every kind of operation.
   Two ranks also alone (the other one waits) and with the models cut over them, which shows what summing costs.
2. A small model and a large one through the whole engine, in both settings: what a step costs besides its operations.
What two ranks exchange (all-reduce, send and receive) the caller measures and hands in.

Everything is asked in rounds of some seconds (`rounds.py`); what is left of the time is the small model's.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, ExitStack

import msgspec

from lockstep.planner.calibration import Line, Mode
from lockstep.simulation import rates_fit
from lockstep.simulation.rounds import Engines, Setting, ranks_here

ASK_S = 0.6  # of a question to all models
AGAIN = 0.8  # of the first round, which also makes the models: what the second one takes
Say = Callable[[str], None]


def machine_modes(
    seconds: float,
    engines: Callable[[int], AbstractContextManager[Engines]],
    say: Say,
    cache_bytes: int,
    dtype: str = "bfloat16",
) -> list[Mode]:
    """The modes of one rank and of two, in about so many seconds. engines: opens them with so many ranks."""
    begun, rounds, last, small = time.monotonic(), 0, 0.0, 0.0
    with ExitStack() as stack:
        say("1 and 2 ranks: starting ...")
        settings = [Setting(stack.enter_context(ranks_here(n, dtype)), stack.enter_context(engines(n))) for n in (1, 2)]
        while not rounds or time.monotonic() - begun + last < seconds:
            say(f"1 and 2 ranks: whole steps of a small model and of a large one, and operations, round {rounds + 1} ...")
            round_begun, small = time.monotonic(), _small_round(settings)
            for each in settings:
                each.round(ASK_S)
            last, rounds = (time.monotonic() - round_begun) * (1 if rounds else AGAIN), rounds + 1
        while time.monotonic() - begun + small < seconds:  # too little for a round
            small = _small_round(settings)
    say(f"operations and steps took {time.monotonic() - begun:.0f} s")
    return [mode for each in settings for mode in each.modes(cache_bytes)]


def _small_round(settings: Sequence[Setting]) -> float:
    """The seconds it took."""
    begun = time.monotonic()
    for each in settings:
        each.small_round()
    return time.monotonic() - begun


def with_messages(mode: Mode, all_reduce: Sequence[tuple[int, float]], send_recv: Sequence[tuple[int, float]], itemsize: int) -> Mode:
    """The mode with what was measured of messages alone, (bytes, seconds): the pipeline's hop is as long as an exchange, in which
    both ranks send and receive; and a sum in place, found as a difference of two times, takes no less than an all-reduce."""
    hop = rates_fit.line((float(size), seconds) for size, seconds in send_recv)
    least = rates_fit.line((size / itemsize, seconds) for size, seconds in all_reduce)
    summed = Line(max(mode.combine.base_s, least.base_s), max(mode.combine.per_s, least.per_s)) if mode.ranks > 1 else mode.combine
    return msgspec.structs.replace(mode, hop=hop, combine=summed)
