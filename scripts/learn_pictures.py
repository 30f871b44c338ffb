"""docs/learn/: the pictures, and what the commands on the pages print, made by the simulators themselves.

    python scripts/learn_pictures.py [--check]

Every `$ lockstep simulate ...` in a console block of a page is run, and what follows it in the block is replaced by what it
prints. With --check nothing is written: exit code 1, and the names of the files that are not up to date.
"""

from __future__ import annotations

import re
import shlex
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

from lockstep.cli.simulate import simulated
from lockstep.planner.teach import schedules

ROOT = Path(__file__).parents[1]
PAGES = ROOT / "docs" / "learn"
IMAGES = PAGES / "images"
BLOCK = re.compile(r"^```console\n\$ lockstep simulate ([^\n]*)\n.*?^```$", re.DOTALL | re.MULTILINE)


def drawn(command: str) -> Callable[[], str]:
    """The picture that `lockstep simulate <command>` makes."""
    return lambda: simulated(shlex.split(command)).picture()


PICTURES: dict[str, Callable[[], str]] = {
    "tp": drawn("tp"),
    "collectives": drawn("collectives"),
    "collectives-ring": lambda: schedules.picture(schedules.ring(4)),
    "collectives-tree": lambda: schedules.picture(schedules.tree(4)),
    "pipeline-gpipe": drawn("pipeline --stages 4 --micro-batches 8"),
    "pipeline-decode": drawn("pipeline --stages 4 --micro-batches 4 --schedule decode"),
    "pipeline-starved": drawn("pipeline --stages 4 --micro-batches 2 --schedule decode"),
    "pipeline-uneven": drawn("pipeline --stages 4 --micro-batches 4 --schedule decode --stage-times 1,1,1,2"),
    "data": drawn("data"),
    "data-stale": drawn("data --stale-ms 200"),
    "experts": drawn("experts"),
    "context": drawn("context"),
}


def refreshed(page: str) -> str:
    """A page with every command's output as it is now."""
    return BLOCK.sub(lambda found: f"```console\n$ lockstep simulate {found[1]}\n{simulated(shlex.split(found[1])).report()}\n```", page)


def wanted() -> Iterator[tuple[Path, str]]:
    """(file, what it should hold) of every picture and page."""
    for name, draw in PICTURES.items():
        yield IMAGES / f"{name}.svg", draw()
    for page in sorted(PAGES.glob("*.md")):
        yield page, refreshed(page.read_text())


def main() -> int:
    """Write what is not up to date, or name it."""
    stale = [(path, text) for path, text in wanted() if not path.exists() or path.read_text() != text]
    for path, text in stale:
        if "--check" in sys.argv:
            print(f"{path.relative_to(ROOT)} is not up to date: run python scripts/learn_pictures.py", file=sys.stderr)
            continue
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
        print(f"wrote {path.relative_to(ROOT)}")
    return 1 if stale and "--check" in sys.argv else 0


if __name__ == "__main__":
    sys.exit(main())
