"""Warnings of a library whose log lines somebody keeps a copy of still reach standard error: once, and only if nobody else shows them."""

import logging
import subprocess
import sys

import pytest

PROGRAM = """
import logging
from lockstep.observability.flight_recorder import FlightRecorder
from lockstep.observability.logging import configure, get_logger
{before}
recorders = [FlightRecorder("one"), FlightRecorder("two")]
for recorder in recorders:
    recorder.listen()
get_logger("lockstep.test").info("too quiet")
get_logger("lockstep.test").warning("a replica is gone")
assert all(len(r._lines) == 1 and "a replica is gone" in r._lines[0] for r in recorders)
"""


@pytest.mark.parametrize(
    "before,shown",
    [
        ("", "a replica is gone\n"),
        ("configure()", "WARNING"),
        ("logging.basicConfig(format='mine: %(message)s')", "mine: a replica is gone\n"),
    ],
)
def test_a_warning_is_shown_once(before, shown):
    done = subprocess.run([sys.executable, "-c", PROGRAM.format(before=before)], capture_output=True, text=True, timeout=60, check=True)
    assert done.stderr.count("a replica is gone") == 1 and shown in done.stderr and "too quiet" not in done.stderr
    assert logging.lastResort is not None
