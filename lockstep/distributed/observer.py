"""Who is told when this process enters a collective. Torch-free.

A progress cell registers here, so that a wait can say "rank 2 at collective 14 (tp.all_reduce), the others at 15".
"""

from __future__ import annotations

from collections.abc import Callable

Callback = Callable[[int, str], None]

# Read on every collective; kept as a plain list so that "nobody listens" costs one truth test.
observers: list[Callback] = []
_entered = [0]


def add(callback: Callback) -> None:
    """Call `callback(number, what)` before each collective: number counts from 1 in this process, what is "tp:0.all_reduce"."""
    observers.append(callback)


def remove(callback: Callback) -> None:
    """Stop calling `callback`; unknown ones are ignored."""
    if callback in observers:
        observers.remove(callback)


def entered(what: str) -> int:
    """Count one collective and tell the observers; the number it got."""
    _entered[0] += 1
    for callback in tuple(observers):
        callback(_entered[0], what)
    return _entered[0]


def count() -> int:
    """Collectives counted so far."""
    return _entered[0]
