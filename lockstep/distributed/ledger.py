"""The collective ledger (`--check-collectives`): every rank's sequence of collectives, compared as it happens."""

from __future__ import annotations

from typing import Any

active: list[Any] = []


class CollectiveMismatchError(RuntimeError):
    """Ranks of one group entered different collectives. The message names both ranks, operations and call sites."""


def disable() -> None:
    """Stop comparing."""
    active.clear()
