"""Files in shared memory that carry a name for a moment, until all have opened them: findable by the process that made them.

A process that is killed in that moment cannot remove its file; whoever ended it does, by pid and time of birth.
"""

from __future__ import annotations

import contextlib
import os
import secrets
import tempfile
from pathlib import Path

from lockstep.utils import procs


def folder() -> str:
    """Where such files are: memory that every process of this host sees."""
    return "/dev/shm" if os.path.isdir("/dev/shm") else tempfile.gettempdir()


def new_path(what: str) -> str:
    """A new file's path; `what`: a word for the person who finds it."""
    pid = os.getpid()
    return os.path.join(folder(), f"lockstep_{what}_{pid}_{procs.birth(pid)}_{secrets.token_hex(8)}")


def remove_of(pid: int, born: int) -> None:
    """Remove what the ended process `pid`, born then (see `procs.birth`), left behind."""
    for path in Path(folder()).glob(f"lockstep_*_{pid}_{born}_*"):
        with contextlib.suppress(OSError):
            path.unlink()
