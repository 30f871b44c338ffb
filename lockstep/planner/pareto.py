"""The trade between speed for each user and throughput of each device: which points nothing beats, and a drawing in text."""

from __future__ import annotations

from bisect import bisect_left, bisect_right
from collections.abc import Iterable
from dataclasses import dataclass

from lockstep.planner.load import Workload
from lockstep.planner.words import count, ms, wrapped

LETTERS = "abcdefghijklmnopqrstuvwYZ"
BEYOND = 1.5  # times the farthest point: a promise farther out is named and not drawn


@dataclass(frozen=True)
class Mark:
    """One way to run: tokens per second that a user sees (1 / TPOT), and that each device makes."""

    layout: str
    concurrency: int
    user: float
    device: float
    ttft_s: float

    def __str__(self) -> str:
        return f"{self.layout}, {count(self.concurrency, 'request')} a replica"


@dataclass(frozen=True)
class Asked:
    """What was asked for, as lines of the drawing; None where it was not asked."""

    user: float | None = None  # tokens per second of a user that keep the TPOT promised
    device: float | None = None  # tokens per second of each of the plan's devices at the rate
    user_words: str = ""
    device_words: str = ""

    @classmethod
    def of(cls, work: Workload, devices: int) -> Asked:
        """The lines of a workload on so many devices."""
        return cls(
            1 / work.tpot_s if work.tpot_s else None,
            work.rate * work.output_len / devices if work.rate else None,
            f"TPOT {ms(work.tpot_s)}: kept to the right of it" if work.tpot_s else "",
            f"{work.rate:g} requests/s on {count(devices, 'device')}" if work.rate else "",
        )

    def words(self, most_user: float, most_device: float) -> tuple[str, str]:
        """What each line says; of one beyond these edges, that it is there."""
        return (
            self.user_words + " (beyond the right edge)" * bool(self.user and self.user > most_user),
            self.device_words + " (beyond the top)" * bool(self.device and self.device > most_device),
        )

    def edges(self, shown: list[Mark]) -> tuple[float, float]:
        """(most tokens per second of a user, of a device) that a drawing of these points and lines has to hold."""
        user, device = max((m.user for m in shown), default=1.0), max((m.device for m in shown), default=1.0)
        return (
            max(user, self.user) if self.user and self.user <= BEYOND * user else user,
            max(device, self.device) if self.device and self.device <= BEYOND * device else device,
        )


class Frontier:
    """Marks that no other beats in both, from the fastest for a user to the most for a device."""

    def __init__(self, marks: Iterable[Mark] = ()) -> None:
        self.marks: list[Mark] = []
        for mark in marks:
            self.add(mark)

    def beats(self, user: float, device: float) -> bool:
        """Whether some mark is at least as good as this in both."""
        i = bisect_right(self.marks, -user, key=lambda m: -m.user)
        return i > 0 and self.marks[i - 1].device >= device

    def add(self, mark: Mark) -> None:
        """Take the mark in where none beats it, and leave out those that it beats."""
        if self.beats(mark.user, mark.device):
            return
        start = bisect_left(self.marks, -mark.user, key=lambda m: -m.user)
        end = bisect_right(self.marks, mark.device, start, key=lambda m: m.device)
        self.marks[start:end] = [mark]


def changes(marks: list[Mark]) -> list[Mark]:
    """The first point of every run of one layout along the line: where the best layout changes."""
    return [mark for i, mark in enumerate(marks) if i == 0 or marks[i - 1].layout != mark.layout]


def as_text(marks: list[Mark], chosen: Mark | None = None, asked: Asked | None = None, width: int = 64, height: int = 14) -> str:
    """The frontier as a drawing for the terminal, `width` characters across: a letter for each layout, X for the plan's own point."""
    shown, asked = marks + ([chosen] if chosen else []), asked or Asked()
    if not shown:
        return "no layout fits: nothing to draw"
    letters = {layout: LETTERS[i % len(LETTERS)] for i, layout in enumerate(dict.fromkeys(m.layout for m in marks))}
    most_user, most_device = asked.edges(shown)
    grid = [[" "] * width for _ in range(height)]

    def row(device: float) -> int:
        return height - 1 - round(device / most_device * (height - 1))

    def column(user: float) -> int:
        return round(user / most_user * (width - 1))

    if asked.device and asked.device <= most_device:
        grid[row(asked.device)] = ["-"] * width
    if asked.user and asked.user <= most_user:
        for line in grid:
            line[column(asked.user)] = "|"
    for mark in shown:
        grid[row(mark.device)][column(mark.user)] = "X" if mark is chosen else letters[mark.layout]
    lines = [f"{most_device * (height - 1 - i) / (height - 1):>8,.0f} |{''.join(line).rstrip()}" for i, line in enumerate(grid)]
    foot = f"{'':>8} +{'-' * width}\n{'':>9}0{most_user:>{width},.0f}"
    legend = ([f"X  this plan: {chosen}"] if chosen else []) + [f"{letter}  {layout}" for layout, letter in letters.items()]
    legend += [f"{sign}  {words}" for sign, words in zip("|-", asked.words(most_user, most_device), strict=True) if words]
    head = wrapped("tokens/s per device (up) by tokens/s of a user (right)", width + 10, 0)
    return "\n".join([head, *lines, foot, *(wrapped(f"{'':>10}{line}", width + 10, 13) for line in legend)])
