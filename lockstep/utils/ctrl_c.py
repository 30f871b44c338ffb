"""Ctrl-C as the end of the process, for as long as it only imports. Imports next to nothing itself: it is the first thing of a command.

A KeyboardInterrupt in the middle of an import may be swallowed there, or come out as another error.
"""

from __future__ import annotations

import _signal as signal  # without the enumerations, which take longer than all the rest
import os

TYPE_CHECKING = False  # that of `typing`, without the time
if TYPE_CHECKING:
    from types import FrameType
    from typing import NoReturn

INTERRUPTED: int = 128 + signal.SIGINT
WORD = "interrupted"


def end_at_once() -> None:
    """From now on Ctrl-C ends the process: one line, and exit code 130. Main thread only. Where it is ignored, it stays so."""
    if signal.getsignal(signal.SIGINT) is signal.default_int_handler:
        signal.signal(signal.SIGINT, _end)


def as_usual() -> None:
    """From now on it raises KeyboardInterrupt again. Main thread only."""
    if signal.getsignal(signal.SIGINT) is _end:
        signal.signal(signal.SIGINT, signal.default_int_handler)


def _end(number: int, frame: FrameType | None) -> NoReturn:
    os.write(2, f"{WORD}\n".encode())
    os._exit(INTERRUPTED)
