#!/usr/bin/env python3
"""The pictures of docs/playground.md: the demo model is served on two ranks, and the page opened in light and in dark.

    python scripts/screenshots.py [FOLDER]

Needs node and npm, with which a headless Chromium is installed into lockstep's cache folder.
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lockstep.testing.server import running_server  # noqa: E402
from tests.server.browser.setup import browser_folder, drive  # noqa: E402
from tests.server.node import NoNodeError  # noqa: E402


def main() -> int:
    """Take them. Exit code 1, and a sentence, when there is no browser to be had."""
    folder = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / "docs" / "images"
    folder.mkdir(parents=True, exist_ok=True)
    try:
        browser_folder()
    except NoNodeError as e:
        print(e, file=sys.stderr)
        return 1
    with running_server("--served-model-name", "demo") as server:
        for picture in drive("shoot.mjs", [server.url, str(folder)], timeout_s=180):
            path = Path(picture["path"])
            print(f"{path}: {path.stat().st_size // 1024} KiB")
    return 0


if __name__ == "__main__":
    sys.exit(main())
