"""Bytes as people write and read them. Every unit is binary: 1K = 1Ki = 1KiB = 1024 bytes."""

from __future__ import annotations

import re

_UNITS = "KMGT"
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(?:([KMGT])i?)?B?", re.IGNORECASE)


def parse_size(text: str) -> int | None:
    """ "1.5G" -> 1610612736; None for what is no size."""
    found = _SIZE.fullmatch(text.strip())
    if found is None:
        return None
    number, unit = found.groups()
    if unit is None:
        return int(number) if number.isdigit() else None
    return int(float(number) * 1024 ** (_UNITS.index(unit.upper()) + 1))


def size(count: int) -> str:
    """Bytes in the unit that reads best."""
    value, units = float(count), ["B", "KiB", "MiB", "GiB", "TiB"]
    while value >= 1024 and len(units) > 1:
        value, units = value / 1024, units[1:]
    return f"{count} B" if units[0] == "B" else f"{value:.1f} {units[0]}"
