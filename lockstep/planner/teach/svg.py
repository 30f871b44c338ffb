"""Pictures as SVG, written by hand: boxes, words and line charts. The same data gives the same text."""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from html import escape

COLOURS = ("#3f57d6", "#1f8a55", "#b26a00", "#8a3ea8", "#c23b4b", "#16828c", "#7a6a2f", "#5b606b")
IDLE = "#ecece6"
STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#3c4048}.t{font-size:15px;font-weight:600;fill:#1c1e22}.b{font-weight:600;fill:#1c1e22}"
    ".w{fill:#fff;font-size:11px}.s{font-size:11px;fill:#5b606b}.g{stroke:#e2e2dc}.a{stroke:#8b8f98}.l{fill:none;stroke-width:2;stroke-linejoin:round}"
)


@dataclass(frozen=True)
class Series:
    """One line of a chart."""

    name: str
    points: Sequence[tuple[float, float]]
    dashed: bool = False


class Canvas:
    """A white sheet with a title; coordinates in pixels from the top left."""

    def __init__(self, width: float, height: float, title: str) -> None:
        self.width, self.height = width, height
        self._parts: list[str] = []
        self.text(20, 28, title, kind="t")

    def text(self, x: float, y: float, words: object, *, anchor: str = "start", kind: str = "") -> None:
        """kind: t title, b bold, w white, s small. anchor: start, middle or end."""
        at = "" if anchor == "start" else f' text-anchor="{anchor}"'
        named = f' class="{kind}"' if kind else ""
        self._parts.append(f'<text x="{px(x)}" y="{px(y)}"{at}{named}>{escape(str(words))}</text>')

    def rect(self, x: float, y: float, width: float, height: float, fill: str, words: str = "") -> None:
        """A box; `words` shows when the pointer rests on it."""
        about = f"<title>{escape(words)}</title></rect>" if words else ""
        end = ">" + about if about else "/>"
        self._parts.append(f'<rect x="{px(x)}" y="{px(y)}" width="{px(width)}" height="{px(height)}" rx="2" fill="{fill}"{end}')

    def line(self, x1: float, y1: float, x2: float, y2: float, kind: str = "g") -> None:
        """A thin straight line: g for a grid, a for an axis."""
        self._parts.append(f'<line class="{kind}" x1="{px(x1)}" y1="{px(y1)}" x2="{px(x2)}" y2="{px(y2)}"/>')

    def arrow(self, x1: float, y1: float, x2: float, y2: float, colour: str, *, dashed: bool = False) -> None:
        """A line with a head at its end."""
        away = math.atan2(y2 - y1, x2 - x1)
        wings = [(x2 - 8 * math.cos(away + turn), y2 - 8 * math.sin(away + turn)) for turn in (-0.4, 0.4)]
        self.polyline([(x1, y1), (x2, y2)], colour, dashed=dashed)
        self.polyline([wings[0], (x2, y2), wings[1]], colour)

    def polyline(self, points: Iterable[tuple[float, float]], colour: str, *, dashed: bool = False) -> None:
        """A line through all the points."""
        dash = ' stroke-dasharray="6 4"' if dashed else ""
        placed = " ".join(f"{px(x)},{px(y)}" for x, y in points)
        self._parts.append(f'<polyline class="l" stroke="{colour}"{dash} points="{placed}"/>')

    def svg(self) -> str:
        """The document."""
        size = f'viewBox="0 0 {px(self.width)} {px(self.height)}" width="{px(self.width)}" height="{px(self.height)}"'
        body = "\n".join(self._parts)
        head = f'<svg xmlns="http://www.w3.org/2000/svg" {size}><style>{STYLE}</style>'
        return f'{head}\n<rect width="100%" height="100%" fill="#fff"/>\n{body}\n</svg>\n'


@dataclass(frozen=True)
class Axis:
    """One direction of a chart: its name, its ends, and whether equal steps are equal factors."""

    name: str
    low: float
    high: float
    ticks: Sequence[tuple[float, str]]
    log: bool = False

    def share(self, value: float) -> float:
        """Where `value` lies between the ends, from 0 to 1; values outside are drawn on the edge."""
        value = min(max(value, self.low), self.high)
        if self.log:
            return math.log(value / self.low) / math.log(self.high / self.low)
        return (value - self.low) / (self.high - self.low)


def chart(
    canvas: Canvas, x: float, y: float, width: float, height: float, title: str, across: Axis, up: Axis, series: Sequence[Series]
) -> None:
    """A line chart whose axes' box has its top left at (x, y); the legend stands to its right."""
    canvas.text(x, y - 12, f"{title}, {up.name}", kind="b")
    for value, label in up.ticks:
        at = y + height * (1 - up.share(value))
        canvas.line(x, at, x + width, at)
        canvas.text(x - 8, at + 4, label, anchor="end", kind="s")
    for value, label in across.ticks:
        at = x + width * across.share(value)
        canvas.line(at, y, at, y + height)
        canvas.text(at, y + height + 16, label, anchor="middle", kind="s")
    canvas.text(x + width / 2, y + height + 34, across.name, anchor="middle", kind="s")
    for i, one in enumerate(series):
        colour = COLOURS[i % len(COLOURS)]
        canvas.polyline([(x + width * across.share(a), y + height * (1 - up.share(b))) for a, b in one.points], colour, dashed=one.dashed)
        canvas.rect(x + width + 16, y + 4 + 20 * i, 12, 4, colour)
        canvas.text(x + width + 34, y + 11 + 20 * i, one.name, kind="s")


def px(value: float) -> str:
    """A coordinate, to a tenth of a pixel: so that the last bits of a logarithm do not change a picture."""
    return f"{round(float(value), 1) + 0.0:.1f}".removesuffix(".0")
