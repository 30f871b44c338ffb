"""Good requests, one after another, from a process of their own: whoever makes wrong ones beside them does not slow their clock.

`python -m tests.server.good_requests URL RIGHT COUNT` prints a JSON list of how long each took, in s. COUNT 0: until stdin ends.
"""

from __future__ import annotations

import json
import sys
import threading
import time

import httpx

from tests.server import malformed


def run(url: str, right: str, count: int) -> list[float]:
    """Raises AssertionError for an answer that is not 200, or has another text than `right`."""
    took_s: list[float] = []
    over = threading.Event()
    if not count:
        threading.Thread(target=lambda: (sys.stdin.read(), over.set()), daemon=True).start()
    with httpx.Client(base_url=url, timeout=100) as client:
        while not over.is_set() and (not count or len(took_s) < count):
            began_s = time.perf_counter()
            answer = client.post("/v1/completions", json=malformed.GOOD)
            took_s.append(time.perf_counter() - began_s)
            assert answer.status_code == 200, answer.text
            assert answer.json()["choices"][0]["text"] == right, "a good request got other tokens"
    return took_s


if __name__ == "__main__":
    print(json.dumps(run(sys.argv[1], sys.argv[2], int(sys.argv[3]))))
