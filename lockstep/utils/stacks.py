"""Python stacks of processes that are stuck: their own word for it where they react to a signal, py-spy's where they do not."""

from __future__ import annotations

import contextlib
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import IO

from lockstep.utils import procs

LIMIT_S = 5.0  # to write a stack: milliseconds, but on a machine that has other work
PY_SPY_S = 6.0
QUIET_ROUNDS = 4  # of 20 ms, after which a stack that is being written is taken to be whole if ...
_MAIN = re.compile(rb" in (<module>|_run_module_as_main)\n\Z")  # ... it ends where the main thread began, which comes last
_HEAD = re.compile(r"^(?:\[rank (\d+)\] )?((?:Current thread|Thread) 0x|Thread \d+ )")
_FRAME = re.compile(r'^(?:\[rank (\d+)\] )?(  File "| {4}\S+ \()')


def ask(pid: int) -> None:
    """Have a process write its Python stack where it registered to do so. One that was stopped goes on, which it must to write.

    Only for a process whose handler of SIGUSR1 is in place: another one dies of it.
    """
    with contextlib.suppress(OSError):
        os.kill(pid, signal.SIGUSR1)
    _go_on(pid)


def _go_on(pid: int) -> None:
    with contextlib.suppress(OSError):
        if procs.state(pid) == "T":
            os.kill(pid, signal.SIGCONT)


def written(pid: int, file: IO[bytes], limit_s: float = LIMIT_S) -> list[str]:
    """`ask`, and what it wrote to `file`, as lines; py-spy's word where it does not react in `limit_s`."""
    ask(pid)
    until_s, text, quiet = time.monotonic() + limit_s, b"", 0
    while time.monotonic() < until_s and (quiet < QUIET_ROUNDS or not _MAIN.search(text)):
        time.sleep(0.02)
        before, text = text, os.pread(file.fileno(), os.fstat(file.fileno()).st_size, 0)
        quiet = quiet + 1 if text == before else 0
        _go_on(pid)  # a stop may take effect late
    return text.decode(errors="replace").splitlines() or by_py_spy(pid)


def by_py_spy(pid: int) -> list[str]:
    """The stack as py-spy reads it from outside; [] where there is no py-spy, or it may not."""
    found = shutil.which("py-spy") or shutil.which("py-spy", path=str(Path(sys.executable).parent))
    if found is None:
        return []
    with contextlib.suppress(OSError, subprocess.TimeoutExpired):
        command = [found, "dump", "--nonblocking", "--pid", str(pid)]
        done = subprocess.run(command, capture_output=True, text=True, timeout=PY_SPY_S, check=False)
        return done.stdout.splitlines() if done.returncode == 0 else []
    return []


def in_lines(lines: Sequence[str], rank: int | None) -> dict[str, list[str]]:
    """The stacks among a log's lines, by rank; lines that do not name one are `rank`'s."""
    found: dict[str, list[str]] = {}
    for line in lines:
        match = _HEAD.match(line) or _FRAME.match(line)
        if match is not None:
            who = match[1] if match[1] is not None else "" if rank is None else str(rank)
            found.setdefault(who, []).append(line.removeprefix(f"[rank {who}] "))
    return found
