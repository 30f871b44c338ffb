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
