"""Folders of runs: whose owner lives stay, whose owner was killed go."""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path

import pytest

from lockstep.utils.run_folder import OWNED, PREFIX, RunFolder, remove_stale

OWNER = "from lockstep.utils.run_folder import RunFolder; f = RunFolder(); print(f.path, flush=True); input()"


@pytest.fixture(autouse=True)
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    return tmp_path


def test_what_a_killed_owner_leaves_is_removed_by_the_next(place: Path) -> None:
    environment = {**os.environ, "TMPDIR": str(place)}
    with subprocess.Popen([sys.executable, "-c", OWNER], stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment) as owner:
        assert owner.stdout is not None
        left = Path(owner.stdout.readline().decode().strip())
        (left / "engine").touch()
        remove_stale()
        assert (left / OWNED).exists(), "its owner lives"
        owner.kill()
        owner.wait(10)
    assert left.exists()
    mine = RunFolder()
    assert not left.exists() and Path(mine.path).stat().st_mode & 0o777 == 0o700
    remove_stale()
    assert Path(mine.path).exists()
    mine.remove()
    mine.remove()
    assert list(place.iterdir()) == []


def test_nothing_else_is_touched(place: Path) -> None:
    folder = place / f"{PREFIX}other"
    folder.mkdir()
    (place / f"{PREFIX}file").touch()
    (place / f"{PREFIX}link").symlink_to(folder)
    remove_stale()
    assert len(list(place.iterdir())) == 3
