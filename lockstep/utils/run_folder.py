"""A folder for the sockets of one run, below the system's temporary folder, which does not outlive its owner for long.

An owner that is killed cannot clean up. So it holds a lock on a file inside for as long as it lives, and the next owner removes
whatever folder of this user has such a file that nobody holds. (A lock tells the dead from the living even where a process id of
another container means somebody else here.)
"""

from __future__ import annotations

import contextlib
import fcntl
import os
import shutil
import stat
import tempfile
from pathlib import Path

PREFIX = "lockstep-"
OWNED = ".owned"  # the file that is locked


class RunFolder:
    """Made with mode 0700; `remove` it. Making one removes those of dead owners."""

    def __init__(self) -> None:
        remove_stale()
        self.path = tempfile.mkdtemp(prefix=PREFIX)
        draft = f"{self.path}/{OWNED}.new"
        self._fd: int | None = os.open(draft, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o600)
        fcntl.flock(self._fd, fcntl.LOCK_EX)
        os.rename(draft, f"{self.path}/{OWNED}")  # never seen without its lock

    def remove(self) -> None:
        """May be called twice."""
        shutil.rmtree(self.path, ignore_errors=True)
        if self._fd is not None:
            os.close(self._fd)
            self._fd = None


def remove_stale() -> None:
    """Remove the folders that owners left behind when they were killed: this user's own, and no others."""
    for folder in Path(tempfile.gettempdir()).glob(f"{PREFIX}*"):
        with contextlib.suppress(OSError):
            there = folder.lstat()
            if stat.S_ISDIR(there.st_mode) and there.st_uid == os.getuid():
                _remove_unowned(folder)


def _remove_unowned(folder: Path) -> None:
    """Raises OSError where there is no such file, or somebody holds it."""
    fd = os.open(folder / OWNED, os.O_RDWR | os.O_NOFOLLOW)
    try:
        fcntl.flock(fd, fcntl.LOCK_EX | fcntl.LOCK_NB)
        shutil.rmtree(folder, ignore_errors=True)
    finally:
        os.close(fd)
