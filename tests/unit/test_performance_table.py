"""docs/performance.md is what the script makes of the committed results."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]


def test_the_page_of_measured_figures_is_up_to_date() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "scripts" / "performance_table.py", "--check"], capture_output=True, text=True, timeout=60
    )
    assert done.returncode == 0, f"run `python scripts/performance_table.py`: {done.stderr}"


def test_its_rows_can_be_told_apart_and_are_results() -> None:
    """Two runs of one benchmark have numbers, and how long a benchmark was told to run is not what it found."""
    for section in (ROOT / "docs" / "performance.md").read_text().split("\n## ")[1:]:
        rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in section.splitlines() if line.startswith("| ")][1:]
        names = [(engine, metric, what) for engine, metric, _, _, what in rows]
        assert names and len(set(names)) == len(names), section.partition("\n")[0]
        assert not any(metric.endswith(": seconds") for _, metric, _ in names)
