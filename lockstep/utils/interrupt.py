"""Ctrl-C and SIGTERM before a command handles them itself, and which of them it is to handle."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn

from lockstep.utils.ctrl_c import as_usual, end_at_once

TERMINATED = 128 + signal.SIGTERM


class Terminated(BaseException):
    """SIGTERM came, within `terminable`: what KeyboardInterrupt is for SIGINT."""


@contextmanager
def at_once() -> Iterator[None]:
    """Within, Ctrl-C ends the process at once; afterwards it raises KeyboardInterrupt.

    For imports, and what is as harmless: there is no child process yet, and no file half written.
    """
    if not _in_main_thread():
        yield
        return
    end_at_once()
    try:
        yield
    finally:
        as_usual()


@contextmanager
def terminable() -> Iterator[None]:
    """Within, SIGTERM raises Terminated, so that what was begun is cleared away."""
    if not _in_main_thread() or signal.getsignal(signal.SIGTERM) is not signal.SIG_DFL:
        yield
        return
    signal.signal(signal.SIGTERM, _terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, signal.SIG_DFL)


def heard() -> list[signal.Signals]:
    """The signals that end a server. A shell has its background jobs ignore SIGINT, which is for the one in front: it stays ignored."""
    return [one for one in (signal.SIGINT, signal.SIGTERM) if one != signal.SIGINT or signal.getsignal(one) is not signal.SIG_IGN]


def _in_main_thread() -> bool:
    return threading.current_thread() is threading.main_thread()


def _terminate(number: int, frame: FrameType | None) -> NoReturn:
    raise Terminated
