"""Child processes that answer JSON lines, stopped while it is not their turn."""

from __future__ import annotations

import json
import queue
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import psutil

SETTLE_S = 0.05  # after a stop or a continue: until every thread has noticed
LEAVE_S = 30.0  # how long a child may take to end by itself


class ChildError(RuntimeError):
    """A child ended, or did not answer in time. The text has the end of its log."""


class Child:
    """One engine (or rank), a tree of processes of its own. Not for use from several threads."""

    def __init__(self, label: str, command: Sequence[str], environ: dict[str, str], log: Path, timeout_s: float) -> None:
        self.label, self.log, self.timeout_s = label, log, timeout_s
        self.started = time.perf_counter()
        with log.open("w") as errors:
            self._process = subprocess.Popen(
                command,
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=errors,
                env=environ,
                text=True,
                bufsize=1,
                start_new_session=True,  # Ctrl-C is for the harness, which closes its children
            )
        self._lines: queue.SimpleQueue[str | None] = queue.SimpleQueue()
        threading.Thread(target=self._read, daemon=True).start()

    def _read(self) -> None:
        assert self._process.stdout is not None
        for line in self._process.stdout:
            self._lines.put(line)
        self._lines.put(None)

    def send(self, message: dict[str, Any]) -> None:
        """One line to the child. Raises ChildError when it has ended."""
        assert self._process.stdin is not None
        try:
            self._process.stdin.write(json.dumps(message) + "\n")
            self._process.stdin.flush()
        except BrokenPipeError:
            raise self._error("ended") from None

    def receive(self) -> dict[str, Any]:
        """The child's next line. Raises ChildError when it ends, or says nothing for `timeout_s`."""
        try:
            line = self._lines.get(timeout=self.timeout_s)
        except queue.Empty:
            raise self._error(f"did not answer within {self.timeout_s:g} s") from None
        if line is None:
            raise self._error("ended")
        return dict(json.loads(line))

    def ask(self, message: dict[str, Any]) -> dict[str, Any]:
        """`send`, then `receive`."""
        self.send(message)
        return self.receive()

    def _error(self, what: str) -> ChildError:
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(1)
        tail = "\n".join(self.log.read_text(errors="replace").splitlines()[-25:])
        return ChildError(f"{self.label} {what} (exit code {self._process.poll()}); the end of {self.log}:\n{tail}")

    def tree(self) -> list[psutil.Process]:
        """The child's processes that live, parents before their children."""
        try:
            top = psutil.Process(self._process.pid)
            return [top, *top.children(recursive=True)]
        except psutil.NoSuchProcess:
            return []

    def pause(self) -> None:
        """Stop every process, parents first: none may see the others hang. Raises ChildError when one does not stop."""
        for process in self.tree():
            with suppress(psutil.NoSuchProcess):
                process.suspend()
        deadline = time.monotonic() + 5
        while running := [p for p in self.tree() if _status(p) not in (psutil.STATUS_STOPPED, psutil.STATUS_ZOMBIE)]:
            if time.monotonic() > deadline:
                raise ChildError(f"{self.label}: processes {[p.pid for p in running]} did not stop.")
            for process in running:  # born meanwhile
                with suppress(psutil.NoSuchProcess):
                    process.suspend()
            time.sleep(0.005)

    def resume(self) -> None:
        """Let every process go on, children first."""
        for process in reversed(self.tree()):
            with suppress(psutil.NoSuchProcess):
                process.resume()
        time.sleep(SETTLE_S)

    def cpu_s(self) -> float:
        """Processor time of the tree so far, in seconds."""
        total = 0.0
        for process in self.tree():
            with suppress(psutil.Error):
                times = process.cpu_times()
                total += times.user + times.system
        return total

    def peak_rss_mib(self) -> float:
        """Sum of each process's peak resident memory; pages that processes share count in each."""
        return sum(_kib(p, "status", "VmHWM:") for p in self.tree()) / 1024

    def pss_mib(self) -> float:
        """Resident memory of the tree at this moment, a shared page counted once (if nobody else shares it)."""
        return sum(_kib(p, "smaps_rollup", "Pss:") for p in self.tree()) / 1024

    def close(self) -> None:
        """Hang up and wait for the child to end; kill what is left of its tree. May be called twice."""
        self.resume()
        processes = self.tree()
        with suppress(OSError, ValueError):
            if self._process.stdin is not None:
                self._process.stdin.close()
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(LEAVE_S)
        for process in processes:
            with suppress(psutil.NoSuchProcess):
                process.kill()
        self._process.wait()


@contextmanager
def turn(child: Child) -> Iterator[Child]:
    """Let `child` run inside the body, alone."""
    child.resume()
    try:
        yield child
    finally:
        child.pause()


def _status(process: psutil.Process) -> str:
    try:
        return str(process.status())
    except psutil.NoSuchProcess:
        return str(psutil.STATUS_ZOMBIE)


def _kib(process: psutil.Process, file: str, key: str) -> int:
    try:
        for line in Path(f"/proc/{process.pid}/{file}").read_text().splitlines():
            if line.startswith(key):
                return int(line.split()[1])
    except OSError:
        pass
    return 0
