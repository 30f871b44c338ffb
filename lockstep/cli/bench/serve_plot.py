"""A picture of a load test as SVG, written by hand: how latencies are distributed, and how the run went over time."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from itertools import pairwise

from lockstep.cli.bench.serve_client import Record
from lockstep.cli.bench.serve_stats import METRICS, percentile, samples

WIDTH, HEIGHT = 340, 220  # of one panel
PAD_LEFT, PAD_TOP, PAD_BOTTOM, GAP = 52, 34, 34, 28
POINTS = 200
BUCKETS = 60
COLOURS = {"ttft": "#3f57d6", "tpot": "#1f8a55", "itl": "#b26a00", "e2el": "#8a3ea8"}
STYLE = (
    "text{font:11px system-ui,sans-serif;fill:#5b606b}.t{font-size:13px;font-weight:600;fill:#1c1e22}"
    ".g{stroke:#e2e2dc}.l{fill:none;stroke-width:1.8;stroke-linejoin:round}"
)


def plot(records: Sequence[Record], title: str) -> str:
    """The document: a cumulative distribution of each metric, then tokens a second and requests under way over time."""
    panels = [_cdf(f"{METRICS[name]}, ms", values, COLOURS[name]) for name, values in samples(records).items() if values]
    panels += [_line("Output tokens a second", *_tokens(records), "#3f57d6"), _line("Requests under way", *_running(records), "#1f8a55")]
    columns = 3
    rows = -(-len(panels) // columns)
    width, height = columns * WIDTH + (columns + 1) * GAP, rows * HEIGHT + (rows + 1) * GAP + 20
    placed = "".join(
        f'<g transform="translate({GAP + (i % columns) * (WIDTH + GAP)},{GAP + 20 + (i // columns) * (HEIGHT + GAP)})">{panel}</g>'
        for i, panel in enumerate(panels)
    )
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" height="{height}"><style>{STYLE}</style>'
        f'<rect width="100%" height="100%" fill="#fff"/><text class="t" x="{GAP}" y="30">{escape(title)}</text>{placed}</svg>\n'
    )


def _cdf(name: str, values: Sequence[float], colour: str) -> str:
    ordered = sorted(values)
    marks = [100 * i / POINTS for i in range(POINTS + 1)]
    return _line(name, [percentile(ordered, q) for q in marks], marks, colour, y_unit=" %")


def _tokens(records: Sequence[Record]) -> tuple[list[float], list[float]]:
    """(seconds, tokens a second) of the run in equal parts; a piece of output counts as its share of its request's tokens."""
    start, end = _span(records)
    width = (end - start) / BUCKETS
    counts = [0.0] * BUCKETS
    for record in records:
        for at in record.times_s:
            counts[min(BUCKETS - 1, int((at - start) / width))] += record.output_tokens / len(record.times_s)
    return [(i + 0.5) * width for i in range(BUCKETS)], [n / width for n in counts]


def _running(records: Sequence[Record]) -> tuple[list[float], list[float]]:
    """(seconds, requests under way), at the middle of each part of the run."""
    start, end = _span(records)
    width = (end - start) / BUCKETS
    times = [(i + 0.5) * width for i in range(BUCKETS)]
    return times, [float(sum(r.sent_s - start <= at < r.ended_s - start for r in records)) for at in times]


def _span(records: Sequence[Record]) -> tuple[float, float]:
    start = min(record.sent_s for record in records)
    return start, max(start + 1e-6, *(record.ended_s for record in records))


def _line(name: str, xs: Sequence[float], ys: Sequence[float], colour: str, y_unit: str = "") -> str:
    """One panel with axes from zero."""
    most_x, most_y = max([1e-9, *xs]), max([1e-9, *ys])
    inner, tall = WIDTH - PAD_LEFT, HEIGHT - PAD_TOP - PAD_BOTTOM

    def place(x: float, y: float) -> tuple[float, float]:
        return round(PAD_LEFT + inner * x / most_x, 1), round(PAD_TOP + tall * (1 - y / most_y), 1)

    parts = [f'<text class="t" x="0" y="14">{escape(name)}</text>']
    for share in (0.0, 0.25, 0.5, 0.75, 1.0):
        x, y = place(most_x * share, most_y * share)
        parts.append(f'<line class="g" x1="{PAD_LEFT}" x2="{WIDTH}" y1="{y}" y2="{y}"/>')
        parts.append(f'<text x="{PAD_LEFT - 8}" y="{y + 4}" text-anchor="end">{_short(most_y * share)}{y_unit}</text>')
        parts.append(f'<text x="{x}" y="{HEIGHT - 14}" text-anchor="middle">{_short(most_x * share)}</text>')
    points = [place(x, y) for x, y in zip(xs, ys, strict=True)]
    kept = points[:1] + [b for a, b in pairwise(points) if a != b]
    parts.append(f'<polyline class="l" stroke="{colour}" points="{" ".join(f"{x},{y}" for x, y in kept)}"/>')
    return "".join(parts)


def _short(value: float) -> str:
    return f"{value:.0f}" if value >= 100 else f"{value:.3g}"
