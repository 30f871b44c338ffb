"""Timelines of several processes as one picture: a Chrome trace, which ui.perfetto.dev and chrome://tracing open.

Format: Trace Event Format (Google). Complete events "X" with `ts` and `dur` in microseconds, metadata "M" that names
processes, flows "s"/"f" drawn as arrows.
"""

from __future__ import annotations

import os
import re
import time
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from lockstep.observability.timeline import NO_STEP, Row

BROADCAST = "broadcast plan"  # the engine's span that each rank's step follows from


@dataclass(frozen=True)
class Track:
    """One process's spans under its name ("engine", "rank 0"). left_out: spans that found no room."""

    name: str
    rows: Sequence[Row]
    left_out: int = 0


@dataclass(frozen=True)
class Profile:
    """What was recorded: the engine's track, then the ranks'."""

    tracks: Sequence[Track]

    def write(self, folder: str | Path, about: dict[str, Any] | None = None) -> Path:
        """Write a Chrome trace into a new file in `folder`, which is made if need be; its path. `about`: kept in the file."""
        folder = Path(folder)
        folder.mkdir(parents=True, exist_ok=True)
        name, number = f"trace-{time.strftime('%Y%m%d-%H%M%S')}-{os.getpid()}", 0
        while (path := folder / f"{name}{f'-{number}' if number else ''}.json").exists():
            number += 1
        left_out = {track.name: track.left_out for track in self.tracks if track.left_out}
        document = {"traceEvents": list(self.events()), "displayTimeUnit": "ms", "otherData": {**(about or {}), "left_out": left_out}}
        path.write_bytes(msgspec.json.encode(document))
        return path

    def events(self) -> Iterator[dict[str, Any]]:
        """The trace's events: each track a process, its spans, and arrows from each plan's broadcast to the ranks' steps."""
        sent = {row[4] for row in self.tracks[0].rows if row[0] == BROADCAST} if self.tracks else set()
        zero = min((_ns(row[2]) for track in self.tracks for row in track.rows), default=0)
        for pid, track in enumerate(self.tracks):
            yield {"ph": "M", "name": "process_name", "pid": pid, "tid": 0, "args": {"name": track.name}}
            yield {"ph": "M", "name": "process_sort_index", "pid": pid, "tid": 0, "args": {"sort_index": pid}}
            for name, category, began_s, ended_s, step, args in track.rows:
                # Both ends are rounded before the difference is taken: what was inside another span stays inside.
                began, ended = _ns(began_s) - zero, _ns(ended_s) - zero
                place = {"pid": pid, "tid": 0, "ts": began / 1e3}
                known = args if step == NO_STEP else {"step": step, **args}
                yield {"ph": "X", "name": name, "cat": category or "other", "dur": (ended - began) / 1e3, "args": known, **place}
                if name == BROADCAST:
                    for rank in range(1, len(self.tracks)):
                        yield {"ph": "s", "name": "plan", "cat": "plan", "id": f"{step} to {rank}", **place}
                elif name == f"step {step}" and step in sent:
                    yield {"ph": "f", "bp": "e", "name": "plan", "cat": "plan", "id": f"{step} to {pid}", **place}

    def summary(self) -> str:
        """Where the time went, as a table: by track and name, the time in spans of that name, and its share of the whole.

        Layers are counted together ("layers.*.attention"), and so are steps. A span's time includes the spans inside it.
        """
        rows = [("where", "what", "times", "mean us", "total ms", "share")]
        for track in self.tracks:
            totals: dict[str, list[float]] = defaultdict(list)
            for name, _, began_s, ended_s, _, _ in track.rows:
                totals[re.sub(r"\.\d+", ".*", re.sub(r"^step \d+$", "step", name))].append(ended_s - began_s)
            whole_s = max((row[3] for row in track.rows), default=0.0) - min((row[2] for row in track.rows), default=0.0)
            for name, taken in sorted(totals.items(), key=lambda item: -sum(item[1])):
                total_s = sum(taken)
                mean, total, share = total_s / len(taken) * 1e6, total_s * 1e3, total_s / max(whole_s, 1e-9)
                rows.append((track.name, name, f"{len(taken)}", f"{mean:,.1f}", f"{total:,.1f}", f"{share:.1%}"))
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        aligned = [[cell.ljust(w) if i < 2 else cell.rjust(w) for i, (cell, w) in enumerate(zip(row, widths, strict=True))] for row in rows]
        lines = ["  ".join(row) for row in aligned]
        lines += [f"{track.name}: {track.left_out} more spans found no room" for track in self.tracks if track.left_out]
        return "\n".join(lines)


def _ns(seconds: float) -> int:
    return round(seconds * 1e9)
