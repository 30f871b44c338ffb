"""Packages from npm for tests, at the versions of a `package-lock.json`, in lockstep's cache folder; and scripts run with them."""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import shutil
import subprocess
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from lockstep.utils import env

FILES = ("package.json", "package-lock.json")
INSTALL_S = 300.0


class NoNodeError(RuntimeError):
    """node or npm cannot provide the packages here; the text says why."""


def installed(source: Path, then: Callable[[Path], None] = lambda folder: None) -> Path:
    """The folder with the packages that `source` locks, installed on first use. then: what else is done once. Raises NoNodeError."""
    for program in ("node", "npm"):
        if shutil.which(program) is None:
            raise NoNodeError(f"there is no {program} here: what the tests need of npm is installed and run with it.")
    wanted = hashlib.sha256(b"".join((source / name).read_bytes() for name in FILES)).hexdigest()[:12]
    folder = env.cache_folder() / f"{source.name}-{wanted}"
    folder.mkdir(parents=True, exist_ok=True)
    with (folder / ".lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / ".ready").exists():
            _install(source, folder)
            then(folder)
            (folder / ".ready").touch()  # nothing half done is left behind
    return folder


def _install(source: Path, folder: Path) -> None:
    for name in FILES:
        shutil.copy(source / name, folder / name)
    run(["npm", "ci", "--ignore-scripts", "--no-audit", "--no-fund", "--loglevel=error"], folder)


def run(command: list[str], folder: Path, more: Mapping[str, str] | None = None) -> None:
    """A step of an installation. Raises NoNodeError when it fails."""
    environment = {**os.environ, **(more or {})}
    try:
        done = subprocess.run(
            command, cwd=folder, env=environment, capture_output=True, text=True, timeout=INSTALL_S, stdin=subprocess.DEVNULL
        )
    except subprocess.TimeoutExpired:
        raise NoNodeError(f"{command[0]} did not install the packages of {folder.name} within {INSTALL_S:g} s.") from None
    if done.returncode != 0:
        said = [line for line in done.stderr.splitlines() if line.strip()] or ["no word"]
        raise NoNodeError(f"{command[0]} could not install the packages of {folder.name}: {said[0].strip()}")


def drive(script: Path, arguments: Sequence[str], environment: Mapping[str, str], timeout_s: float) -> list[dict[str, Any]]:
    """Run a script; the JSON lines that it prints. Raises AssertionError when it fails."""
    command = ["node", str(script), *arguments]
    settings = {**os.environ, **environment}
    done = subprocess.run(command, env=settings, capture_output=True, text=True, timeout=timeout_s, stdin=subprocess.DEVNULL)
    assert done.returncode == 0, f"{script.name} failed with {done.returncode}:\n{done.stderr[-4000:]}"
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]
