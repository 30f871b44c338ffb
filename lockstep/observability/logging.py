"""Log lines: one format for the server, the engine and its ranks, on standard error; as text or as JSON objects, one in a line.

What clients send (prompts, keys, queries) is in none of them.
"""

from __future__ import annotations

import contextlib
import json
import logging
import sys
import time
from contextvars import ContextVar

from lockstep.utils import env

ROOT = "lockstep"
request_id: ContextVar[str] = ContextVar("request_id", default="")  # of the request that is being served; in every line of JSON about it


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
    if env.log_format() == "json":
        formatter = _Json(rank)
    for handler in logger.handlers:
        if isinstance(handler, _Stderr):
            handler.setFormatter(formatter)
            return
    ours = _Stderr()
    ours.setFormatter(formatter)
    logger.addHandler(ours)
    logger.propagate = False


def say(message: str) -> None:
    """Write what an operator is to read whatever the level is: as it is, or, among lines of JSON, as one of them. Never raises."""
    if env.log_format() == "json":
        message = _Json(None).format(logging.LogRecord(ROOT, logging.INFO, "", 0, message, (), None))
    with contextlib.suppress(OSError, ValueError, AttributeError):  # no standard error any more
        sys.stderr.write(f"{message}\n")
        sys.stderr.flush()


def adopt(name: str, level: str) -> None:
    """Show another library's lines, from `level` on, as ours."""
    logger, ours = logging.getLogger(name), [h for h in logging.getLogger(ROOT).handlers if isinstance(h, _Stderr)]
    logger.setLevel(level.upper())
    logger.handlers[:] = ours
    logger.propagate = not ours


class _Json(logging.Formatter):
    """A line as a JSON object: time (UTC), level, logger, message, and what is known of rank, request and exception."""

    def __init__(self, rank: int | None) -> None:
        super().__init__()
        self._rank = rank

    def format(self, record: logging.LogRecord) -> str:
        at = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(record.created)) + f".{int(record.msecs):03d}Z"
        found: dict[str, object] = {"time": at, "level": record.levelname.lower(), "logger": record.name}
        found |= {"message": record.getMessage(), "pid": record.process}
        if self._rank is not None:
            found["rank"] = self._rank
        if request_id.get():
            found["request_id"] = request_id.get()
        found |= getattr(record, "fields", {})
        if record.exc_info:
            found["exception"] = self.formatException(record.exc_info)
        return json.dumps(found, default=str)


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
