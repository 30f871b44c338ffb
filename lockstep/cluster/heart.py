"""A replica's pulse: every moment it says how its ranks are, on a thread of its own, whatever the engine is at.

It also minds the engine's own thread. Ranks that hang are their executor's to notice, where they are processes of their own;
an engine that hangs by itself, or in a rank that is this very process, is noticed here, and ends with its stack told.
"""

from __future__ import annotations

import faulthandler
import os
import tempfile
import threading
import time
from collections.abc import Callable

from lockstep.cluster import wire
from lockstep.engine.core import RESULT_GRACE_S, EngineCore
from lockstep.executor.contract import ExecutorError
from lockstep.observability.logging import get_logger
from lockstep.protocol.health import PULSE_S

STUCK_GRACE_S = 5.0  # beyond all other limits: whoever knows better speaks first

_log = get_logger(__name__)


class Heart:
    """Beats from `start` on, for as long as the process lives."""

    def __init__(self, core: EngineCore, say: Callable[[wire.Reply], None], give_up: Callable[[ExecutorError], None]) -> None:
        """say: tell the router. give_up: end this process for that reason."""
        self._core, self._say, self._give_up = core, say, give_up
        ranks = core.executor.health()
        own = len(ranks) == 1 and ranks[0].pid == os.getpid()
        self._grace_s = 0.0 if own else RESULT_GRACE_S + STUCK_GRACE_S
        self._troubled = False  # whether the last beat failed

    def start(self) -> None:
        threading.Thread(target=self._beat, name="heart", daemon=True).start()

    def _beat(self) -> None:
        while True:
            try:
                self.beat()
                self._troubled = False
            except ConnectionError:
                return  # the router is gone: the main thread sees it too
            except Exception:  # the numbers are the main thread's, and change while they are read: the next beat has them
                if not self._troubled:
                    _log.exception("a heartbeat of the replica failed")
                self._troubled = True
            time.sleep(PULSE_S)

    def beat(self) -> None:
        """Say once how the replica is, and end it where it is stuck. Raises ConnectionError when the router is gone."""
        since_s = self._core.busy_since_s
        stuck_s = 0.0 if since_s is None else time.monotonic() - since_s
        if stuck_s > self._limit()[1] + self._grace_s:
            self._give_up(self._stuck(stuck_s))
        self._say(wire.Pulse(self._core.executor.health(), self._core.report()))

    def _limit(self) -> tuple[str, float]:
        """The setting that bounds what the engine is at, and its seconds: who takes memory again may read weights, as in a start."""
        config = self._core.config
        step_s, start_s = config.parallel.execute_model_timeout_seconds, config.runtime.startup_timeout_seconds
        if self._core.moving_memory and start_s > step_s:
            return "startup_timeout_seconds", start_s
        return "execute_model_timeout_seconds", step_s

    def _stuck(self, stuck_s: float) -> ExecutorError:
        ranks = self._core.executor.health()
        alone = ranks[0] if len(ranks) == 1 and ranks[0].pid == os.getpid() else None
        who, phase = ("the engine", "engine") if alone is None else (f"rank {alone.rank}", alone.phase)
        name, limit_s = self._limit()
        message = f"{who} made no progress for {stuck_s:.1f} s in {phase} ({name}={limit_s:g})."
        rank = None if alone is None else alone.rank
        return ExecutorError(message, rank=rank, phase=phase, kind="hung", log_tail=_own_stacks(), ranks=ranks)


def _own_stacks() -> list[str]:
    """The Python stacks of this process's threads, as lines."""
    with tempfile.TemporaryFile("w+b") as file:
        faulthandler.dump_traceback(file, all_threads=True)
        file.seek(0)
        return file.read().decode(errors="replace").splitlines()
