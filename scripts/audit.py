#!/usr/bin/env python3
"""Look through what is installed, without a network: are pinned versions those installed, do they fit each other, is one known bad?

    python scripts/audit.py [--constraints FILE] [--deny FILE] [--pins-only]

The deny-list (scripts/audit_deny.txt) is written by hand and is not a feed: it knows what somebody put there. On a machine with a
network, `pip-audit -r constraints.txt` asks the public databases; this is what can be said everywhere, every time.
Exit code 1 if something was found.
"""

from __future__ import annotations

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

HERE = Path(__file__).resolve().parent
_PIN = re.compile(r"^([A-Za-z0-9._-]+)==([^\s;#]+)")
_DENY = re.compile(r"^([A-Za-z0-9._-]+)\s*<\s*(\S+)\s+(.+)$")


def name_of(text: str) -> str:
    """A package's name as all spellings have it."""
    return re.sub(r"[-_.]+", "-", text).lower()


def version_of(text: str) -> tuple[int, ...]:
    """The release numbers of a version; what follows them (rc1, +cpu) is left out."""
    found = re.match(r"\d+(?:\.\d+)*", text)
    return tuple(int(part) for part in found[0].split(".")) if found else ()


def pins(path: Path) -> dict[str, str]:
    """name -> version of a constraints file."""
    found = (_PIN.match(line) for line in path.read_text().splitlines())
    return {name_of(match[1]): match[2] for match in found if match}


def denied(path: Path) -> list[tuple[str, str, str]]:
    """(name, first good version, why) of each line of the deny-list. Raises ValueError for a line that says nothing."""
    found = []
    for line in path.read_text().splitlines():
        if not line.strip() or line.startswith("#"):
            continue
        match = _DENY.match(line)
        if match is None:
            raise ValueError(f"{path}: {line!r} is not `name < version  why`")
        found.append((name_of(match[1]), match[2], match[3]))
    return found


def findings(versions: dict[str, str], bad: list[tuple[str, str, str]], where: str) -> Iterator[str]:
    """What of `versions` the deny-list names."""
    for name, good, why in bad:
        if name in versions and version_of(versions[name]) < version_of(good):
            yield f"{where}: {name} {versions[name]} is older than {good}: {why}"


def installed() -> dict[str, str]:
    """name -> version of every package in this environment."""
    return {name_of(d.metadata["Name"]): d.version for d in metadata.distributions() if d.metadata["Name"]}


def main(argv: list[str] | None = None) -> int:
    """Print what was found; the exit code."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--constraints", type=Path, default=HERE.parent / "constraints.txt")
    parser.add_argument("--deny", type=Path, default=HERE / "audit_deny.txt")
    parser.add_argument("--pins-only", action="store_true", help="look at the pins, not at what is installed here")
    chosen = parser.parse_args(argv)
    pinned, bad, here = pins(chosen.constraints), denied(chosen.deny), {} if chosen.pins_only else installed()
    found = [*findings(pinned, bad, chosen.constraints.name), *findings(here, bad, "installed")]
    if not chosen.pins_only:
        done = subprocess.run([sys.executable, "-m", "pip", "check"], check=False, capture_output=True, text=True, timeout=120)
        found += [f"pip check: {line}" for line in done.stdout.splitlines()] if done.returncode else []
    for line in found:
        print(line)
    print(f"{len(pinned)} pins and {len(here)} installed packages against {len(bad)} entries: {len(found)} found")
    return 1 if found else 0


if __name__ == "__main__":
    sys.exit(main())
