"""The recorder of spans, and the picture made of them."""

from __future__ import annotations

import gc
import json
from pathlib import Path
from typing import Any

import pytest

from lockstep.observability import timeline as timeline_module
from lockstep.observability.timeline import NO_STEP, Timeline
from lockstep.observability.trace import BROADCAST, Profile, Track


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """A clock of whole seconds, each look at it one later."""
    ticks = [0.0]

    def now_s() -> float:
        ticks[0] += 1
        return ticks[0]

    monkeypatch.setattr(timeline_module, "now_s", now_s)
    return ticks


def test_while_off_nothing_is_recorded_or_made() -> None:
    timeline = Timeline()
    timeline.enter(1)
    timeline.lap("a")
    timeline.add_span("b", 0.0, 1.0)
    timeline.leave()
    assert timeline.span("c") is timeline.span("d")
    with timeline.span("c"):
        pass
    assert (timeline.take(), timeline.on, vars(timeline).keys()) == ([], False, vars(Timeline()).keys())


def test_laps_divide_a_step_without_gaps(clock: list[float]) -> None:
    timeline = Timeline()
    timeline.start()
    timeline.enter(7, began_s=0.5)
    timeline.lap("receive")
    with timeline.span("inner", "layer", bytes=3):
        pass
    timeline.lap("forward")
    timeline.leave(tokens=2)
    timeline.add_span("idle", 5.0, 6.0, "idle")
    assert timeline.take() == [
        ("receive", "step", 0.5, 2.0, 7, {}),
        ("inner", "layer", 3.0, 4.0, 7, {"bytes": 3}),
        ("forward", "step", 2.0, 5.0, 7, {}),
        ("step 7", "step", 0.5, 5.0, 7, {"tokens": 2}),
        ("idle", "idle", 5.0, 6.0, NO_STEP, {}),
    ]
    assert not timeline.on and timeline.take() == []


def test_what_finds_no_room_is_counted_and_a_new_start_forgets() -> None:
    timeline = Timeline()
    timeline.start(capacity=2)
    for i in range(5):
        timeline.add_span(f"{i}", i, i + 1)
    assert timeline.left_out == 3 and [row[0] for row in timeline.take()] == ["0", "1"]
    timeline.start(capacity=2)
    assert timeline.left_out == 0 and timeline.take() == []


def test_many_spans_at_once_are_as_one_by_one() -> None:
    one, many = Timeline(), Timeline()
    for timeline in (one, many):
        timeline.start(capacity=4)
        timeline.enter(3)
        timeline.add_span("first", 0.0, 1.0)
    names, began, ended = ["a", "b", "c", "d"], [1.0, 2.0, 3.0, 4.0], [2.0, 3.0, 4.0, 5.0]
    for span in zip(names, began, ended, strict=True):
        one.add_span(*span, "layer")
    many.add_spans(tuple(names), tuple(began), tuple(ended), "layer")
    assert (one.left_out, many.left_out) == (1, 1)
    assert many.take() == one.take()
    many.add_spans(names, began, ended)  # off
    assert many.take() == []


def test_recording_gives_the_garbage_collector_nothing_to_do() -> None:
    timeline = Timeline()
    timeline.start(capacity=3000)
    gc.collect()
    before = gc.get_count()[0]
    for i in range(2000):
        timeline.add_span("layers.1", i, i + 0.5, "layer")
    assert gc.get_count()[0] - before < 50 and len(timeline.take()) == 2000


def profile() -> Profile:
    """Two steps of an engine and two ranks."""
    engine = [(BROADCAST, "engine", 1.0, 1.1, 1, {}), (BROADCAST, "engine", 2.0, 2.1, 2, {})]
    rank = [
        ("layers.0.mlp", "layer", 1.2000000004, 1.3, 1, {}),
        ("layers.1.mlp", "layer", 1.3, 1.4000000004, 1, {}),
        ("step 1", "step", 1.2000000004, 1.4000000004, 1, {"tokens": 5}),
        ("step 2", "step", 2.2, 2.3, 2, {"tokens": 1}),
        ("wait", "idle", 2.3, 2.5, NO_STEP, {}),
    ]
    return Profile([Track("engine", engine), Track("rank 0", rank), Track("rank 1", rank[2:], left_out=4)])


def test_a_trace_has_a_named_process_for_each_track_and_arrows_between_them(tmp_path: Path) -> None:
    paths = [profile().write(tmp_path / "new", {"command": "lockstep bench"}) for _ in range(2)]
    assert paths[0] != paths[1] and paths[0].parent == tmp_path / "new"
    document: dict[str, Any] = json.loads(paths[0].read_text())
    assert document["otherData"] == {"command": "lockstep bench", "left_out": {"rank 1": 4}}
    events = document["traceEvents"]
    names = {e["pid"]: e["args"]["name"] for e in events if e["name"] == "process_name"}
    assert names == {0: "engine", 1: "rank 0", 2: "rank 1"}
    spans = [e for e in events if e["ph"] == "X"]
    assert len(spans) == 2 + 5 + 3 and min(e["ts"] for e in spans) == 0
    step = next(e for e in spans if e["name"] == "step 1")
    assert (step["ts"], step["dur"], step["args"]) == (200_000.0, 200_000.0, {"step": 1, "tokens": 5})
    starts, ends = ({e["id"]: e for e in events if e["ph"] == kind} for kind in "sf")
    assert starts.keys() == ends.keys() == {"1 to 1", "1 to 2", "2 to 1", "2 to 2"}
    assert all(starts[i]["pid"] == 0 and starts[i]["ts"] < ends[i]["ts"] and ends[i]["pid"] == int(i[-1]) for i in starts)


def test_rounding_keeps_spans_inside_each_other() -> None:
    spans = {e["name"]: e for e in profile().events() if e["ph"] == "X" and e["pid"] == 1}
    outer, last = spans["step 1"], spans["layers.1.mlp"]
    assert round((outer["ts"] + outer["dur"]) * 1e3) == round((last["ts"] + last["dur"]) * 1e3)


def test_a_summary_counts_layers_together() -> None:
    lines = [line.split() for line in profile().summary().splitlines()]
    assert ["rank", "0", "layers.*.mlp", "2", "100,000.0", "200.0", "15.4%"] in lines
    assert ["rank", "0", "step", "2", "150,000.0", "300.0", "23.1%"] in lines
    assert "rank 1: 4 more spans found no room" in profile().summary()


def test_nothing_recorded_is_an_empty_picture(tmp_path: Path) -> None:
    empty = Profile([Track("engine", [])])
    assert json.loads(empty.write(tmp_path).read_text())["otherData"] == {"left_out": {}}
    assert len(empty.summary().splitlines()) == 1
