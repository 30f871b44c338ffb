"""The watchdog of an event loop, tick by tick; nothing is ended."""

from __future__ import annotations

import pytest

from lockstep.server import watchdog
from lockstep.server.watchdog import TICK_S, Watchdog

PATIENCE = 6  # ticks


class Ticks:
    """Stands in for the wait between two looks: t the event loop turned before this tick, r it rests, . nothing."""

    def __init__(self, watched: Watchdog, script: str) -> None:
        self._watched, self._script = watched, list(script)

    def wait(self, limit_s: float) -> bool:
        if not self._script:
            return True
        match self._script.pop(0):
            case "t":
                self._watched.turned()
            case "r":
                self._watched.rest()
        return False


@pytest.mark.parametrize(
    ("script", "ended"),
    [
        ("t" + "." * (PATIENCE - 1) + "t" + "." * (PATIENCE - 1), 0),
        ("t" + "." * PATIENCE, 1),
        ("." * 3 * PATIENCE, 0),  # it has not begun
        ("tr" + "." * 3 * PATIENCE, 0),  # it is over
        ("trt" + "." * PATIENCE, 1),
    ],
)
def test_one_that_turned_has_to_go_on_until_it_rests(monkeypatch: pytest.MonkeyPatch, script: str, ended: int) -> None:
    times: list[bool] = []
    monkeypatch.setattr(watchdog, "HUNG_S", PATIENCE * TICK_S)
    monkeypatch.setattr(Watchdog, "_end", lambda self: times.append(True))
    found = Watchdog()
    found.close()
    found._over = Ticks(found, script)  # type: ignore[assignment]
    found._watch()
    assert len(times) == ended
