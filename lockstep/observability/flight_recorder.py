"""What happened last, kept in memory and written down when something breaks: one JSON file for each incident.

Kept are summaries of steps, events of the process's life and log lines, each in a ring that forgets its oldest. Prompts and
tokens are not among them. A file is readable by its owner only; of old ones, so many are kept.
"""

from __future__ import annotations

import contextlib
import itertools
import logging
import os
import socket
import time
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import msgspec

from lockstep.observability.logging import ROOT
from lockstep.utils import env

STEPS, EVENTS, LINES = 256, 128, 200
MOST_FILES = 200  # in a folder; older ones are removed
_PREFIX = "incident-"
_numbers = itertools.count(1)


class FlightRecorder:
    """One per process. Recording is cheap: a step costs an append. Any thread may call."""

    def __init__(self, who: str) -> None:
        """who: "replica 0", "engine", "server"."""
        self.who = who
        self._steps: deque[tuple[float, int, int, int, float, float]] = deque(maxlen=STEPS)
        self._events: deque[tuple[float, str, dict[str, Any]]] = deque(maxlen=EVENTS)
        self._lines: deque[str] = deque(maxlen=LINES)

    def step(self, number: int, rows: int, tokens: int, seconds: float, compute_s: float) -> None:
        """A step has ended. seconds: from when it was issued; compute_s: of it, in the rank that reports."""
        self._steps.append((time.time(), number, rows, tokens, seconds, compute_s))

    def event(self, what: str, **facts: Any) -> None:
        """Something happened. facts: plain data."""
        self._events.append((time.time(), what, facts))

    def listen(self) -> None:
        """Keep lockstep's log lines of this process, as far as they are shown."""
        logging.getLogger(ROOT).addHandler(_Lines(self._lines))

    def dump(self, folder: str | Path | None, about: Mapping[str, Any]) -> str:
        """Write an incident file; its path, or "" where there is no place for it. folder: None for `default_folder`. Never raises."""
        try:
            return str(self._dump(Path(folder) if folder else default_folder(), about))
        except OSError as e:
            logging.getLogger(__name__).warning("no incident file could be written: %s", e)
            return ""

    def _dump(self, folder: Path, about: Mapping[str, Any]) -> Path:
        folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        now = time.gmtime()
        document = {
            "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", now),
            "who": self.who,
            "host": socket.gethostname(),
            "pid": os.getpid(),
            **about,
            "steps": [dict(zip(_STEP_FIELDS, row, strict=True)) for row in list(self._steps)],
            "events": [{"unix_s": when, "event": what, **facts} for when, what, facts in list(self._events)],
            "log": list(self._lines),
        }
        path = folder / f"{_PREFIX}{time.strftime('%Y%m%d-%H%M%S', now)}-{os.getpid()}-{next(_numbers)}.json"
        text = msgspec.json.format(msgspec.json.encode(document), indent=1)
        fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
        with open(fd, "wb") as file:
            file.write(text)
        _forget_old(folder)
        return path


_STEP_FIELDS = ("unix_s", "step", "rows", "tokens", "seconds", "compute_s")


def default_folder() -> Path:
    """Where incident files go that no setting names a folder for."""
    return env.cache_folder() / "incidents"


def _forget_old(folder: Path) -> None:
    files = sorted(folder.glob(f"{_PREFIX}*.json"))
    for path in files[:-MOST_FILES]:
        with contextlib.suppress(OSError):
            path.unlink()


class _Lines(logging.Handler):
    def __init__(self, lines: deque[str]) -> None:
        super().__init__()
        self.setFormatter(logging.Formatter("%(levelname)s %(asctime)s %(name)s: %(message)s"))
        self._lines = lines

    def emit(self, record: logging.LogRecord) -> None:
        with contextlib.suppress(Exception):
            self._lines.append(self.format(record))
        # Python writes warnings that nobody handles on standard error; that somebody keeps a copy must not end it.
        ours, last = logging.getLogger(ROOT), logging.lastResort
        first = next((h for h in ours.handlers if isinstance(h, _Lines)), None)
        others = any(not isinstance(h, _Lines) for h in ours.handlers) or (ours.propagate and logging.getLogger().hasHandlers())
        if first is self and not others and last is not None and record.levelno >= last.level:
            last.handle(record)
