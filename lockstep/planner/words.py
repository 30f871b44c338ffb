"""How the planner writes numbers, and lines that fit a terminal."""

from __future__ import annotations

import textwrap

NARROWEST = 24  # characters of text beside its indent: below that, lines run over


def ms(seconds: float) -> str:
    """A latency in milliseconds, to three digits or to one millisecond."""
    value = seconds * 1e3
    return f"{value:,.{0 if value >= 100 else 1 if value >= 10 else 2}f} ms"


def rate_of(value: float) -> str:
    """A rate to three digits, or to one: 0.0312, 6.11, 312, 12,345."""
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def dollars(amount: float) -> str:
    """Dollars and cents."""
    return f"${amount:,.2f}"


def count(number: int, noun: str) -> str:
    """ "1 device", "12 devices"."""
    return f"{number:,} {noun}{'s' * (number != 1)}"


def wrapped(text: str, width: int | None, indent: int) -> str:
    """Each line cut at spaces to `width` characters, what follows below it indented by so many; None: as it is."""
    if width is None:
        return text
    room, further = max(width, indent + NARROWEST), " " * indent
    lines = [
        textwrap.wrap(line, room, subsequent_indent=further, break_long_words=False, break_on_hyphens=False, drop_whitespace=True)
        if len(line) > room
        else [line]
        for line in text.split("\n")
    ]
    return "\n".join(part for line in lines for part in line)
