"""Counts in sentences."""

from __future__ import annotations


def counted(count: int, noun: str) -> str:
    """`1 request`, `2 requests`."""
    return f"{count} {noun}{'' if count == 1 else 's'}"


def joined(first: str, second: str) -> str:
    """Two sentences in a line: with a semicolon where the first one ends in something else than a full stop, like a path."""
    return f"{first}{'' if first.endswith(('.', '!', '?')) else ';'} {second}"
