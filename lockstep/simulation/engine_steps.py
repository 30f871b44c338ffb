"""What a step of the whole engine costs beyond its operations: from runs of a small model and of a large one, which note both.

Operations take longer in the engine than by themselves: its other processes want the ranks' cores. That is a cost of the engine, and
is found with the small model, whose operations are also measured by themselves. Of the large one that difference would be noise.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from operator import attrgetter
from statistics import geometric_mean, median

import msgspec

from lockstep.planner.calibration import Line, Mode
from lockstep.simulation import measure, rates_fit
from lockstep.simulation.measure import Answer
from lockstep.utils.noise import undisturbed


@dataclass(frozen=True)
class Run:
    """`rows` prompts of `prompt` tokens at once through the whole engine: seconds to their first tokens, and of a step after them,
    and what of the latter was no operation."""

    rows: int
    prompt: int
    first_s: float
    step_s: float
    step_beyond_s: float


Runs = Sequence[Run]
_TIMES = ("first_s", "step_s", "step_beyond_s")


def joined(rounds: Sequence[Runs]) -> list[Run]:
    """Of each run what is undisturbed over the rounds."""
    each = zip(*rounds, strict=True)
    return [Run(runs[0].rows, runs[0].prompt, *(undisturbed(map(attrgetter(name), runs)) for name in _TIMES)) for runs in each]


def with_steps(mode: Mode, small: Sequence[Runs], large: Sequence[Runs], alone: Answer, large_bytes: float) -> Mode:
    """The mode, and what a step of the whole engine costs beyond its operations: by requests, by prompts, and by tokens of prompts.

    small, large: the runs of each round, of a model that caches hold and of one that is read from memory, large_bytes a step. Such a step
    leaves the engine no caches: what it does between two of them takes several times as long. alone: the operations of the small model
    by themselves, a step of each run and then those of each run's prompts.
    """
    runs, far = joined(small), joined(large)
    seconds = [measure.step_of(alone, times) for times in alone.times]
    steps, firsts = seconds[: len(runs)], seconds[len(runs) :]
    beyond = [run.step_s - step for run, step in zip(runs, steps, strict=True)]
    step, longer = _line(runs, beyond), _line(runs, [b - run.step_beyond_s for run, b in zip(runs, beyond, strict=True)])
    prompts = [(run.rows, run.rows * (run.prompt - 1)) for run in runs]
    rest = [run.first_s - first - step.at(run.rows) for run, first in zip(runs, firsts, strict=True)]
    prompt_s, token_s = rates_fit.fit(prompts, rest, of=[run.first_s for run in runs])
    step_far = _line(far, [run.step_beyond_s + longer.at(run.rows) for run in far])
    seen = [(run.rows, run.prompt, run.step_s) for run in runs]
    engine = {"step": step, "step_far": step_far, "prompt_s": prompt_s, "prompt_token_s": token_s}
    return msgspec.structs.replace(mode, **engine, far_bytes=large_bytes, small_steps=seen)


def _line(runs: Runs, seconds: Sequence[float]) -> Line:
    """Over rows; errors count as shares of the whole step."""
    return Line(*rates_fit.fit([(1.0, run.rows) for run in runs], seconds, of=[run.step_s for run in runs]))


def speed(mode: Mode, looks: Sequence[Runs]) -> float:
    """Of the engine in the usual one of these looks, with the small model that the mode is from, over its speed then: 0.8 is a quarter
    slower."""
    then = {(rows, prompt): seconds for rows, prompt, seconds in mode.small_steps}
    return geometric_mean(then[runs[0].rows, runs[0].prompt] / median(run.step_s for run in runs) for runs in zip(*looks, strict=True))
