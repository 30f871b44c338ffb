"""Log lines: one format for the engine and its ranks, on standard error."""

from __future__ import annotations

import logging
import sys

ROOT = "lockstep"


def get_logger(name: str) -> logging.Logger:
    """The logger of a module (pass `__name__`). Quiet until `configure` is called by a program."""
    return logging.getLogger(name if name == ROOT or name.startswith(ROOT + ".") else f"{ROOT}.{name}")


def configure(level: str = "warning", rank: int | None = None) -> None:
    """Show lockstep's log lines from `level` on. In a rank without a driver that labels its lines, name the rank.

    Safe to call again; leaves other libraries' logging, and handlers that the program set itself, alone.
    """
    logger = logging.getLogger(ROOT)
    logger.setLevel(level.upper())
    label = "" if rank is None else f"[rank {rank}] "
    formatter = logging.Formatter(f"{label}%(levelname)-7s %(asctime)s %(name)s: %(message)s", "%H:%M:%S")
    for handler in logger.handlers:
        if isinstance(handler, _Stderr):
            handler.setFormatter(formatter)
            return
    ours = _Stderr()
    ours.setFormatter(formatter)
    logger.addHandler(ours)
    logger.propagate = False


class _Stderr(logging.StreamHandler):  # type: ignore[type-arg]
    """Writes to what sys.stderr is at the time, so that capturing and redirecting it works."""

    def __init__(self) -> None:
        logging.Handler.__init__(self)

    @property
    def stream(self) -> object:
        return sys.stderr

    @stream.setter
    def stream(self, value: object) -> None:
        pass
