"""The trade between speed for each user and throughput of each device: which points nothing beats, drawn as text and as SVG."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass
from html import escape

WIDTH, HEIGHT, MARGIN = 720, 440, 60  # of the SVG, in pixels


@dataclass(frozen=True)
class Mark:
    """One way to run: tokens per second that a user sees (1 / TPOT), and that each device makes."""

    layout: str
    concurrency: int
    user: float
    device: float
    ttft_s: float


def frontier(marks: Iterable[Mark]) -> list[Mark]:
    """Marks that no other beats in both, from the fastest for a user to the most for a device."""
    found: list[Mark] = []
    for mark in sorted(marks, key=lambda m: (-m.user, -m.device)):
        if not found or mark.device > found[-1].device:
            found.append(mark)
    return found


def as_text(marks: list[Mark], chosen: Mark | None = None, width: int = 64, height: int = 14) -> str:
    """The frontier as a drawing for the terminal: o, and X for the plan's own point."""
    shown = marks + ([chosen] if chosen else [])
    if not shown:
        return "no layout fits: nothing to draw"
    most_user, most_device = max(m.user for m in shown), max(m.device for m in shown)
    grid = [[" "] * width for _ in range(height)]
    for mark in shown:
        row = height - 1 - round(mark.device / most_device * (height - 1))
        grid[row][round(mark.user / most_user * (width - 1))] = "X" if mark is chosen else "o"
    lines = [f"{most_device * (height - 1 - i) / (height - 1):>8,.0f} |{''.join(row).rstrip()}" for i, row in enumerate(grid)]
    foot = f"{'':>8} +{'-' * width}\n{'':>9}0{most_user:>{width},.0f}"
    return "\n".join(["tokens/s per device (up) by tokens/s of a user (right); X is this plan", *lines, foot])


def as_svg(marks: list[Mark], chosen: Mark | None = None, title: str = "") -> str:
    """The same as an SVG document; each point says what it is when pointed at."""
    shown = marks + ([chosen] if chosen else [])
    most_user = _round_up(max((m.user for m in shown), default=1.0))
    most_device = _round_up(max((m.device for m in shown), default=1.0))

    def place(mark: Mark) -> tuple[float, float]:
        x = MARGIN + mark.user / most_user * (WIDTH - 2 * MARGIN)
        return round(x, 1), round(HEIGHT - MARGIN - mark.device / most_device * (HEIGHT - 2 * MARGIN), 1)

    path = " ".join(f"{x},{y}" for x, y in map(place, marks))
    body = [f'<polyline points="{path}" fill="none" stroke="#4878a8" stroke-width="2"/>']
    body += [_dot(mark, *place(mark), "#4878a8", 4) for mark in marks]
    body += [_dot(chosen, *place(chosen), "#c0392b", 7)] if chosen else []
    return "\n".join([_frame(title, most_user, most_device), *body, "</svg>\n"])


def _dot(mark: Mark, x: float, y: float, color: str, radius: int) -> str:
    words = f"{mark.layout}, {mark.concurrency} requests a replica: {mark.user:.0f} tokens/s a user, {mark.device:.0f} tokens/s a device"
    return f'<circle cx="{x}" cy="{y}" r="{radius}" fill="{color}"><title>{escape(words)}</title></circle>'


def _frame(title: str, most_user: float, most_device: float) -> str:
    """The head of the document, axes with five ticks each, and their names."""
    low, right = HEIGHT - MARGIN, WIDTH - MARGIN
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" font-family="sans-serif" font-size="12">',
        f'<rect width="{WIDTH}" height="{HEIGHT}" fill="white"/>',
        f'<text x="{WIDTH / 2}" y="24" text-anchor="middle" font-size="14">{escape(title)}</text>',
        f'<path d="M{MARGIN},{MARGIN} V{low} H{right}" fill="none" stroke="black"/>',
        f'<text x="{WIDTH / 2}" y="{HEIGHT - 16}" text-anchor="middle">tokens/s of each user (1 / TPOT)</text>',
        f'<text x="18" y="{HEIGHT / 2}" text-anchor="middle" transform="rotate(-90 18 {HEIGHT / 2})">tokens/s of each device</text>',
    ]
    for i in range(6):
        x, y = MARGIN + i / 5 * (right - MARGIN), low - i / 5 * (low - MARGIN)
        lines.append(f'<text x="{x:.0f}" y="{low + 18}" text-anchor="middle">{most_user * i / 5:,.0f}</text>')
        lines.append(f'<text x="{MARGIN - 8}" y="{y + 4:.0f}" text-anchor="end">{most_device * i / 5:,.0f}</text>')
    return "\n".join(lines)


def _round_up(value: float) -> float:
    """The next of 1, 2, 5 times a power of ten: where an axis ends."""
    power = 10.0 ** math.floor(math.log10(value)) if value > 0 else 1.0
    return next(step * power for step in (1, 2, 5, 10) if step * power >= value)


def write_png(marks: list[Mark], chosen: Mark | None, title: str, path: str) -> None:
    """The same by matplotlib, where it is installed. Raises ImportError where it is not."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.5))
    axes = figure.add_subplot()
    axes.plot([m.user for m in marks], [m.device for m in marks], "o-")
    if chosen:
        axes.plot([chosen.user], [chosen.device], "rX", markersize=12)
    axes.set(title=title, xlabel="tokens/s of each user (1 / TPOT)", ylabel="tokens/s of each device", xlim=(0, None), ylim=(0, None))
    figure.savefig(path, dpi=120)
