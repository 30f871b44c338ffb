"""Which jobs an engine that took another's place gets, and when: so that one request cannot take down engine after engine.

A job is blamed for the death of an engine that had it. Who is only waiting here for an engine is not, and who has brought tokens
for a while there is blamed as for the first time. Then:

    blamed once          it goes on at once, with all others
    blamed twice         it is a suspect: suspects go on one after another, the next once the one before has brought something
    blamed 3 times       it was the last that went on when the engine died: it goes on first, and until it has run well alone
    blamed 4 times       it is given up, and so is a suspect under which an engine died that had nothing else

An engine's process is started again more often than a job is blamed (`engine_keeper.POLICY`). No clock: time is handed in.
"""

from __future__ import annotations

from dataclasses import dataclass

SUSPECT, PRIME, MOST_DEATHS = 2, 3, 4
SETTLED_S = 1.0  # who has brought tokens for so long runs well: that engine's keeper has heard so too
TRIAL_S = 0.25  # who has brought its first so long ago is no cause at once: the next suspect goes on


@dataclass(eq=False)
class _Job:
    deaths: int = 0  # in a row, under it
    here: bool = False  # whether the engine has it
    began_s: float | None = None  # when it first brought something there

    def ran_for(self, seconds: float, now_s: float) -> bool:
        """Whether it has brought something there since so long ago."""
        return self.began_s is not None and now_s - self.began_s >= seconds

    def tried(self, now_s: float) -> bool:
        """Whether it is a suspect that has not shown that it can run."""
        return self.here and self.deaths >= SUSPECT and not self.ran_for(SETTLED_S if self.deaths >= PRIME else TRIAL_S, now_s)


class Replays:
    """The jobs of one API process that have not ended."""

    def __init__(self) -> None:
        self._jobs: dict[str, _Job] = {}

    def sent(self, name: str) -> None:
        """The engine has it now."""
        job = self._jobs.setdefault(name, _Job())
        job.here, job.began_s = True, None

    def kept(self, name: str) -> None:
        """There is no engine now that could have it."""
        self._jobs.setdefault(name, _Job())

    def brought(self, name: str, now_s: float) -> None:
        """The engine brought something of it."""
        job = self._jobs.get(name)
        if job is not None and job.began_s is None:
            job.began_s = now_s

    def ended(self, name: str) -> None:
        self._jobs.pop(name, None)

    def died(self, now_s: float) -> list[str]:
        """The engine is gone, and what it had was its cause or not. The jobs to give up; the others are `due` some time."""
        had = [job for job in self._jobs.values() if job.here]
        restless = {job for job in had if not job.ran_for(SETTLED_S, now_s)}
        tried = {job for job in had if job.tried(now_s)}
        alone = len(restless) == 1 and tried == restless
        for job in had:
            if job not in restless:
                job.deaths = 1
            elif alone:
                job.deaths = MOST_DEATHS
            elif job in tried or job.deaths < SUSPECT or not tried:
                job.deaths += 1
        self.cut_off()
        return [name for name, job in self._jobs.items() if job.deaths >= MOST_DEATHS]

    def cut_off(self) -> None:
        """The engine has dropped all of them, through no fault of theirs."""
        for job in self._jobs.values():
            job.here, job.began_s = False, None

    def due(self, now_s: float) -> list[str]:
        """The jobs to send now: all that are not suspects, and the first suspect whose turn it is."""
        found = [name for name, job in self._jobs.items() if not job.here and job.deaths < SUSPECT]
        if any(job.tried(now_s) for job in self._jobs.values()):
            return found
        suspects = [name for name, job in self._jobs.items() if not job.here and job.deaths >= SUSPECT]
        return found + sorted(suspects, key=lambda name: -self._jobs[name].deaths)[:1]
