"""The engines' side of the conversation: JSON lines on standard input and output. Standard library only, any Python >= 3.10.

A question is `{"prompts": [[ids]], "outs": [n]}`; the answer `{"seconds": s, "tokens": [[ids]]}`, the time that of the
generation alone. The first line a child says is its hello: what it is and runs with.
"""

from __future__ import annotations

import ctypes
import json
import os
import signal
import sys
import time
from collections.abc import Callable, Iterator
from typing import Any, TextIO

_PR_SET_PDEATHSIG = 1
Generate = Callable[[list[list[int]], list[int]], list[list[int]]]


class Channel:
    """Keeps standard output for itself: whatever the engine prints goes to standard error, whoever prints it."""

    def __init__(self) -> None:
        if sys.platform == "linux":  # a child that is stopped while its harness is killed must not stay for ever
            ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
        self._out: TextIO = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)

    def say(self, message: dict[str, Any]) -> None:
        """One line to the harness."""
        self._out.write(json.dumps(message) + "\n")
        self._out.flush()

    def questions(self) -> Iterator[dict[str, Any]]:
        """What the harness asks, until it hangs up."""
        for line in sys.stdin:
            yield json.loads(line)


def serve(channel: Channel, hello: dict[str, Any], generate: Generate) -> None:
    """Say hello, then answer until standard input ends."""
    channel.say(hello)
    for question in channel.questions():
        start = time.perf_counter()
        tokens = generate(question["prompts"], question["outs"])
        channel.say({"seconds": time.perf_counter() - start, "tokens": tokens})


def settings() -> dict[str, Any]:
    """The run's settings, as `engines.py` makes them: the first argument of the program."""
    return dict(json.loads(sys.argv[1]))
