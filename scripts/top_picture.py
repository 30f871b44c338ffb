"""docs/images/top.svg: `lockstep top` of a real server whose rank 1 is made slow, as a terminal shows it.

    python scripts/top_picture.py [OUT.svg]

Starts `lockstep serve` of the demo model (two pipeline stages of two ranks), gives it work, and draws what /v1/cluster says.
"""

from __future__ import annotations

import io
import json
import re
import sys
import threading
import time
import urllib.request
from pathlib import Path

from rich.console import Console

from lockstep.cli.top import read
from lockstep.cli.top_table import picture
from lockstep.testing.server import running_server

OUT = Path(__file__).parents[1] / "docs" / "images" / "top.svg"
SLOW = {"LOCKSTEP_FAULT": "decode:1:slow=0.004"}
STREAMS, LOOKS_S = 6, 30.0


def complete(url: str, number: int, stop: threading.Event) -> None:
    """Ask for completions, one after another."""
    body = json.dumps({"prompt": f"def f{number}(x):\n", "max_tokens": 120, "temperature": 0.8}).encode()
    request = urllib.request.Request(f"{url}/v1/completions", body, {"content-type": "application/json"})
    while not stop.is_set():
        urllib.request.urlopen(request, timeout=120).read()


def main() -> None:
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else OUT
    stop = threading.Event()
    with running_server("-pp", "2", environment=SLOW) as server:
        streams = [threading.Thread(target=complete, args=(server.url, i, stop)) for i in range(STREAMS)]
        for stream in streams:
            stream.start()
        give_up_s = time.monotonic() + LOOKS_S
        while time.monotonic() < give_up_s:
            time.sleep(1.0)
            found = read(server.url, "")
            slow = [rank["rank"] for one in found["replicas"] for rank in one["ranks"] if rank["slow"]]
            if slow == [1] and found["totals"]["requests"] >= STREAMS:
                break
        stop.set()
        for stream in streams:
            stream.join()
    assert slow == [1], f"ranks {slow} look slow, not rank 1 alone"
    console = Console(record=True, width=172, file=io.StringIO(), force_terminal=True, highlight=False)
    console.print(picture(found))
    out.parent.mkdir(parents=True, exist_ok=True)
    svg = console.export_svg(title=f"lockstep top {server.url}")
    out.write_text(re.sub(r"@font-face \{.*?\}\s*", "", svg, flags=re.DOTALL))  # a picture fetches nothing
    print(out)


if __name__ == "__main__":
    main()
