"""The trade-off as a picture: SVG by hand, PNG with matplotlib (the `plot` extra)."""

from __future__ import annotations

import math
from html import escape

from lockstep.planner.pareto import Asked, Mark, changes

WIDTH, HEIGHT, MARGIN = 720, 460, 60  # of the SVG, in pixels
LINE, CHOSEN, PROMISE, RATE = "#4878a8", "#c0392b", "#2e8b57", "#8a6d3b"
LETTER = 6.2  # pixels of a character, about: labels are moved apart by it


def as_svg(marks: list[Mark], chosen: Mark | None = None, title: str = "", asked: Asked | None = None) -> str:
    """An SVG document. Layouts are named where the line changes to them; each point says what it is when pointed at."""
    asked = asked or Asked()
    most_user, most_device = map(_round_up, asked.edges(marks + ([chosen] if chosen else [])))

    def place(user: float, device: float) -> tuple[float, float]:
        x = MARGIN + user / most_user * (WIDTH - 2 * MARGIN)
        return round(x, 1), round(HEIGHT - MARGIN - device / most_device * (HEIGHT - 2 * MARGIN), 1)

    keys = [(LINE, "best of all layouts")]
    keys += [(color, words) for color, words in zip((PROMISE, RATE), asked.words(most_user, most_device), strict=True) if words]
    body = []
    if asked.user and asked.user <= most_user:
        body.append(_dashes(*place(asked.user, 0), *place(asked.user, most_device), PROMISE))
    if asked.device and asked.device <= most_device:
        body.append(_dashes(*place(0, asked.device), *place(most_user, asked.device), RATE))
    path = " ".join(f"{x},{y}" for x, y in (place(m.user, m.device) for m in marks))
    body.append(f'<polyline points="{path}" fill="none" stroke="{LINE}" stroke-width="2"/>')
    body += [_dot(mark, *place(mark.user, mark.device), LINE, 4) for mark in marks]
    labels = [(place(m.user, m.device), m.layout, LINE) for m in changes(marks)]
    if chosen:
        keys.insert(0, (CHOSEN, f"this plan: {chosen}"))
        body.append(_dot(chosen, *place(chosen.user, chosen.device), CHOSEN, 7))
        labels.insert(0, (place(chosen.user, chosen.device), f"this plan: {chosen.layout}", CHOSEN))
    return "\n".join([_frame(title, most_user, most_device), *body, *_labels(labels), *_legend(keys), "</svg>\n"])


def _dot(mark: Mark, x: float, y: float, color: str, radius: int) -> str:
    words = f"{mark}: {mark.user:.0f} tokens/s a user, {mark.device:.0f} tokens/s a device"
    return f'<circle cx="{x}" cy="{y}" r="{radius}" fill="{color}"><title>{escape(words)}</title></circle>'


def _dashes(x: float, y: float, to_x: float, to_y: float, color: str) -> str:
    return f'<path d="M{x},{y} L{to_x},{to_y}" stroke="{color}" stroke-width="1.5" stroke-dasharray="6 4" fill="none"/>'


def _labels(labels: list[tuple[tuple[float, float], str, str]]) -> list[str]:
    """Names beside their points, those that would lie on another moved down."""
    taken: list[tuple[float, float, float]] = []  # (left, right, y)
    found = []
    for (x, y), words, color in labels:
        wide = LETTER * len(words)
        left, at = (x + 9 if x + 9 + wide < WIDTH - 4 else x - 9 - wide), y - 5
        while any(left < other_right and other_left < left + wide and abs(at - other_y) < 12 for other_left, other_right, other_y in taken):
            at += 12
        taken.append((left, left + wide, at))
        found.append(f'<text x="{left:.0f}" y="{at:.0f}" font-size="11" fill="{color}">{escape(words)}</text>')
    return found


def _legend(keys: list[tuple[str, str]]) -> list[str]:
    """What the colours are, at the top right."""
    left, found = WIDTH - MARGIN - LETTER * max(len(words) for _, words in keys) - 16, []
    for i, (color, words) in enumerate(keys):
        y = MARGIN - 16 + 15 * i
        found.append(f'<rect x="{left:.0f}" y="{y}" width="10" height="10" fill="{color}"/>')
        found.append(f'<text x="{left + 16:.0f}" y="{y + 9}" font-size="11">{escape(words)}</text>')
    return found


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


def write_png(marks: list[Mark], chosen: Mark | None, title: str, path: str, asked: Asked | None = None) -> None:
    """The same by matplotlib. Raises ImportError where the `plot` extra is not installed."""
    from matplotlib.figure import Figure

    asked, figure = asked or Asked(), Figure(figsize=(9, 5.5))
    axes = figure.add_subplot()
    axes.plot([m.user for m in marks], [m.device for m in marks], "o-", color=LINE, label="best of all layouts")
    for mark in changes(marks):
        axes.annotate(mark.layout, (mark.user, mark.device), xytext=(6, 4), textcoords="offset points", fontsize=8, color=LINE)
    if chosen:
        axes.plot([chosen.user], [chosen.device], "X", color=CHOSEN, markersize=12, label=f"this plan: {chosen}")
    edges = asked.edges(marks + ([chosen] if chosen else []))
    if asked.user and asked.user <= edges[0]:
        axes.axvline(asked.user, color=PROMISE, linestyle="--", label=asked.user_words)
    if asked.device and asked.device <= edges[1]:
        axes.axhline(asked.device, color=RATE, linestyle="--", label=asked.device_words)
    axes.set(title=title, xlabel="tokens/s of each user (1 / TPOT)", ylabel="tokens/s of each device", xlim=(0, None), ylim=(0, None))
    axes.legend()
    figure.savefig(path, dpi=120)
