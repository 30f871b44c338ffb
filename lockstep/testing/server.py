"""A real `lockstep serve` for tests: `with running_server("--api-key", "x") as server: httpx.get(server.url + "/health")`."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

from lockstep.testing.executors import children_of
from lockstep.utils import procs

ROOT = Path(__file__).parents[2]
START_S, STOP_S = 120.0, 30.0
ADDRESS = re.compile(r'(?:^|"message": ")lockstep serves \S+ at ([^\s"]+)(?:"|$)', re.MULTILINE)  # with --log-format json too


class RunningServer:
    """A server as a process of its own. Its output goes to a file, so that it never waits for a reader."""

    def __init__(self, command: list[str], environment: Mapping[str, str]) -> None:
        self._log = tempfile.TemporaryFile("w+b")  # noqa: SIM115 - closed by `close`
        path = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
        self.process = subprocess.Popen(
            command, stdout=self._log, stderr=self._log, stdin=subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": path, **environment}
        )
        self.url = ""  # like http://127.0.0.1:40123, or the path of its Unix socket

    @property
    def pid(self) -> int:
        return self.process.pid

    @property
    def port(self) -> int:
        return int(self.url.rpartition(":")[2])

    def said(self) -> str:
        """All it printed so far."""
        size = os.fstat(self._log.fileno()).st_size
        return os.pread(self._log.fileno(), size, 0).decode(errors="replace")

    def wait_ready(self, timeout_s: float = START_S) -> None:
        """Until it listens. Raises AssertionError, with what it said, when it ends instead or takes too long."""
        give_up_s = time.monotonic() + timeout_s
        while (found := ADDRESS.search(self.said())) is None:
            assert self.process.poll() is None, f"the server ended with {procs.exit_cause(self.process.returncode)}:\n{self.said()}"
            assert time.monotonic() < give_up_s, f"the server was not ready after {timeout_s:g} s:\n{self.said()}"
            time.sleep(0.05)
        self.url = found[1]

    def wait(self, timeout_s: float = STOP_S) -> int:
        """Its exit code, once it has ended by itself or by a signal that the test sent."""
        return self.process.wait(timeout_s)

    def stop(self, timeout_s: float = STOP_S) -> int:
        """SIGTERM, then its exit code."""
        if self.process.poll() is None:
            self.process.send_signal(signal.SIGTERM)
        return self.wait(timeout_s)

    def close(self) -> None:
        """End it, however it hangs, and everything below it."""
        below = children_of(self.pid) if self.process.poll() is None else []
        try:
            self.stop()
        except subprocess.TimeoutExpired:
            self.process.kill()
            self.process.wait()
        for pid in below:
            procs.kill_group(pid)
        self._log.close()


@contextmanager
def running_server(
    *flags: str, model: str | None = None, tp: int = 2, environment: Mapping[str, str] | None = None, timeout_s: float = START_S
) -> Iterator[RunningServer]:
    """`lockstep serve [model] *flags` on a port that the system chose, listening; ended at the end. model None: the demo model."""
    listen = [] if "--uds" in flags else ["--port", "0"]
    words = [*([model] if model else []), *listen, "--no-cpu-binding", "-tp", str(tp), "--shutdown-timeout", "2", *flags]
    server = RunningServer([sys.executable, "-m", "lockstep", "serve", *words], environment or {})
    try:
        server.wait_ready(timeout_s)
        yield server
    finally:
        server.close()
