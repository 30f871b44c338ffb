"""What a process that is stuck says of itself, asked from outside."""

import signal
import subprocess
import sys
import time
from pathlib import Path

from lockstep.utils import stacks

# Writes its main thread's part late, as a process does on a machine that has other work.
SLOW = """
import os, signal, sys, time

def write(*_):
    os.write(2, b'Thread 0x1 (most recent call first):\\n  File "a.py", line 1 in wait\\n')
    time.sleep(0.4)
    os.write(2, b'\\nCurrent thread 0x2 (most recent call first):\\n  File "main.py", line 1 in <module>\\n')

signal.signal(signal.SIGUSR1, write)
print("ready", flush=True)
while True:
    time.sleep(60)
"""
REAL = """
import faulthandler, signal, threading, time
threading.Thread(target=time.sleep, args=(60,), daemon=True).start()
faulthandler.register(signal.SIGUSR1, all_threads=True)
print("ready", flush=True)
while True:
    time.sleep(60)
"""


def asked(program: str, path: Path, limit_s: float, how: int | None = None) -> tuple[list[str], float]:
    with path.open("w+b") as file, subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, stderr=file) as process:
        try:
            assert process.stdout is not None and process.stdout.readline()
            if how is not None:
                process.send_signal(how)
            began_s = time.monotonic()
            return stacks.written(process.pid, file, limit_s), time.monotonic() - began_s
        finally:
            process.kill()


def test_a_stack_that_is_written_slowly_is_whole(tmp_path: Path) -> None:
    lines, _ = asked(SLOW, tmp_path / "stack", 20.0)
    assert lines[-1] == '  File "main.py", line 1 in <module>' and "a.py" in lines[1]


def test_a_whole_stack_is_not_waited_for_longer(tmp_path: Path) -> None:
    lines, took_s = asked(REAL, tmp_path / "stack", 60.0, signal.SIGSTOP)
    assert lines[-1].endswith("in <module>") and took_s < 30
