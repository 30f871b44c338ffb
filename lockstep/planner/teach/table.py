"""Plain-text tables and numbers with units, for terminals."""

from __future__ import annotations

from collections.abc import Sequence
from fractions import Fraction


def table(header: Sequence[str], rows: Sequence[Sequence[object]]) -> str:
    """Right-aligned columns, two spaces apart; the first column is left-aligned. Ends without a newline."""
    cells = [list(map(str, header)), *([str(cell) for cell in row] for row in rows)]
    widths = [max(len(row[i]) for row in cells) for i in range(len(header))]
    lines = []
    for row in cells:
        padded = [cell.rjust(width) if i else cell.ljust(width) for i, (cell, width) in enumerate(zip(row, widths, strict=True))]
        lines.append("  ".join(padded).rstrip())
    return "\n".join(lines)


def bytes_text(count: float) -> str:
    """16384 -> "16 KiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if count < 1024 or unit == "GiB":
            break
        count /= 1024
    return f"{count:.4g} {unit}"


def time_text(seconds: float | Fraction) -> str:
    """0.0000031 -> "3.1 us"."""
    seconds = float(seconds)
    if seconds >= 1:
        return f"{seconds:.3g} s"
    return f"{seconds * 1e3:.3g} ms" if seconds >= 1e-3 else f"{seconds * 1e6:.3g} us"


def percent(share: float | Fraction) -> str:
    """0.273 -> "27.3 %"."""
    return f"{100 * float(share):.1f} %"
