"""What a step of the whole engine costs beyond its operations: from runs of a small model, and its operations measured beside them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

import msgspec

from lockstep.planner.calibration import Line, Mode
from lockstep.simulation import measure, rates_fit
from lockstep.simulation.measure import Answer


@dataclass(frozen=True)
class Run:
    """`rows` prompts of `prompt` tokens at once through the whole engine: seconds to their first tokens, and of a step after them."""

    rows: int
    prompt: int
    first_s: float
    step_s: float


Runs = Sequence[Run]
EngineRound = tuple[Runs, Answer]  # the operations of a step of each run, then those of each run's prompts


@dataclass(frozen=True)
class Beyond:
    """One kind of run: its usual times, and the seconds of a step and of the first tokens that are not operations."""

    run: Run
    step_s: float
    first_s: float


def usual(rounds: Sequence[EngineRound]) -> list[Beyond]:
    """Of each run the medians over the rounds. The difference is taken in a round: what slows one of its parts slows the other."""
    found = []
    for i, run in enumerate(rounds[0][0]):
        each = [(runs[i], _operations(a, i), _operations(a, len(runs) + i)) for runs, a in rounds]
        kept = Run(run.rows, run.prompt, median(r.first_s for r, _, _ in each), median(r.step_s for r, _, _ in each))
        found.append(Beyond(kept, median(r.step_s - s for r, s, _ in each), median(r.first_s - s for r, _, s in each)))
    return found


def _operations(answer: Answer, case: int) -> float:
    return measure.step_of(answer, answer.times[case])


def with_steps(mode: Mode, rounds: Sequence[EngineRound]) -> Mode:
    """The mode, and what a step of the whole engine costs beyond its operations: by requests, by prompts, and by tokens of prompts."""
    found = usual(rounds)
    rows = [float(b.run.rows) for b in found]
    step = Line(*rates_fit.fit([(1.0, n) for n in rows], [b.step_s for b in found], of=[b.run.step_s for b in found]))
    prompts = [(n, n * (b.run.prompt - 1)) for n, b in zip(rows, found, strict=True)]
    beyond = [b.first_s - step.at(n) for n, b in zip(rows, found, strict=True)]
    prompt_s, token_s = rates_fit.fit(prompts, beyond, of=[b.run.first_s for b in found])
    return msgspec.structs.replace(mode, step=step, prompt_s=prompt_s, prompt_token_s=token_s)
