"""A headless Chromium for tests and screenshots, from npm."""

from __future__ import annotations

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from tests.server import node

HERE = Path(__file__).parent


def browser_folder() -> Path:
    """The folder with the browser, installed on first use (6 s, 90 MB from the registry). Raises NoNodeError."""
    return node.installed(HERE, _unpack)


def _unpack(folder: Path) -> None:
    shutil.rmtree(folder / "tmp", ignore_errors=True)
    (folder / "tmp").mkdir()
    node.run(["node", "-e", f"import({json.dumps(str(HERE / 'launch.mjs'))}).then((m) => m.executable())"], folder, _environment(folder))


def _environment(folder: Path) -> dict[str, str]:
    return {"BROWSER_FOLDER": str(folder), "TMPDIR": str(folder / "tmp")}


def drive(script: str, arguments: Sequence[str], timeout_s: float) -> list[dict[str, Any]]:
    """Run one of the scripts beside this file; the JSON lines that it prints. Raises NoNodeError; AssertionError when it fails."""
    return node.drive(HERE / script, arguments, _environment(browser_folder()), timeout_s)
