"""What this process may still allocate, also inside control groups of both generations."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest

from lockstep.utils import cgroups, host_memory

GIB = 1 << 30


@pytest.fixture
def groups(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    """Sets control groups: (limit, usage, droppable cache) of each, as files of one generation."""

    def make(*sizes: tuple[str, int, int], v1: bool = False) -> None:
        names = ("memory.limit_in_bytes", "memory.usage_in_bytes") if v1 else ("memory.max", "memory.current")
        found = []
        for i, (limit, usage, cache) in enumerate(sizes):
            folder = tmp_path / str(i)
            folder.mkdir()
            (folder / names[0]).write_text(f"{limit}\n")
            (folder / names[1]).write_text(f"{usage}\n")
            (folder / "memory.stat").write_text(f"anon 5\n{'total_inactive_file' if v1 else 'inactive_file'} {cache}\n")
            found.append((folder, not v1))
        monkeypatch.setattr(cgroups, "folders", lambda controller: iter(found))
        monkeypatch.setattr(psutil, "virtual_memory", lambda: type("VM", (), {"available": 8 * GIB}))

    return make


def test_without_groups_the_host_counts(groups) -> None:
    groups()
    assert host_memory.host_available_bytes() == 8 * GIB


@pytest.mark.parametrize("v1", [False, True])
def test_the_tightest_group_counts_and_its_cache_is_free(groups, v1: bool) -> None:
    groups((str(6 * GIB), GIB, 0), (str(4 * GIB), 2 * GIB, GIB), v1=v1)
    assert host_memory.host_available_bytes() == 3 * GIB


def test_no_limit_in_either_spelling(groups) -> None:
    groups(("max", GIB, 0), (str(2**63 - 4096), GIB, 0))
    assert host_memory.host_available_bytes() == 8 * GIB


def test_a_full_group_leaves_nothing(groups) -> None:
    groups((str(GIB), 2 * GIB, 0))
    assert host_memory.host_available_bytes() == 0


def test_own_groups_are_walked_up_to_the_root(monkeypatch: pytest.MonkeyPatch) -> None:
    lines = "5:cpu:/x\n4:memory:/a/b\n0::/c\n"
    monkeypatch.setattr(host_memory.Path, "read_text", lambda self: lines)
    assert [str(folder) for folder, *_ in cgroups.folders("memory")] == [
        "/sys/fs/cgroup/memory/a/b",
        "/sys/fs/cgroup/memory/a",
        "/sys/fs/cgroup/memory",
        "/sys/fs/cgroup/c",
        "/sys/fs/cgroup",
    ]
