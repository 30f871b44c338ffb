"""Ends a process whose event loop turns no more: nobody above it would notice, and every client would wait for ever.

It counts its own ticks: a process that was stopped, or a machine that slept, is no hang.
"""

from __future__ import annotations

import faulthandler
import os
import sys
import threading

from lockstep.observability.logging import get_logger

HUNG_S = 30.0  # without a turn of its event loop: what an API process does in one takes milliseconds
TICK_S = 0.5
_log = get_logger(__name__)


class Watchdog:
    """`turned` again and again, from the event loop; `rest` before it ends, or else it is taken for hung."""

    def __init__(self) -> None:
        self._turns, self._armed, self._over = 0, False, threading.Event()
        self._thread = threading.Thread(target=self._watch, name="watchdog", daemon=True)
        self._thread.start()

    def turned(self) -> None:
        """The event loop turns. From here on it has to."""
        self._turns, self._armed = self._turns + 1, True

    def rest(self) -> None:
        """It will turn no more, and that is right."""
        self._armed = False

    def close(self) -> None:
        """Be done. May be called twice."""
        self._over.set()
        self._thread.join()

    def _watch(self) -> None:
        seen, ticks = 0, 0
        while not self._over.wait(TICK_S):
            ticks = ticks + 1 if self._armed and self._turns == seen else 0
            seen = self._turns
            if ticks * TICK_S >= HUNG_S:
                self._end()

    def _end(self) -> None:
        _log.error("this process hangs: its event loop has not turned for %g s, and it is ended; the stacks of its threads:", HUNG_S)
        faulthandler.dump_traceback(sys.stderr, all_threads=True)
        sys.stderr.flush()
        os._exit(1)
