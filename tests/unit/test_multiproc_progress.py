"""Progress cells: what was said is read, also by another process, also after the writer was killed."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time

import msgspec
import pytest

from lockstep.distributed.progress import Progress, ProgressBoard
from lockstep.executor.failure import died, laggards, stopped

WRITER = """
import sys, msgspec, time
from lockstep.distributed.progress import ProgressBoard, BoardHandle
board = ProgressBoard.attach(msgspec.json.decode(sys.argv[1], type=BoardHandle))
cell = board.cell(1)
cell.set(phase="step", step=913)
for _ in range(14):
    cell.enter_collective("tp:0.all_reduce")
print("set", flush=True)
time.sleep(1000)
"""


def test_what_was_set_is_read() -> None:
    board = ProgressBoard.create(2)
    assert board.read(0).phase == "" and board.read(0).step == -1 and board.read(0).age_s == float("inf")
    cell = board.cell(0)
    cell.set(phase="load", note="61 %")
    progress = board.read(0)
    assert (progress.phase, progress.note, progress.step, progress.collective) == ("load", "61 %", -1, 0)
    assert 0 <= progress.age_s < 5 and 0 <= progress.beat_age_s < 5
    cell.set(phase="step", step=12)
    assert board.read(0).note == ""
    cell.enter_collective("tp:0.all_reduce")
    cell.enter_collective("pp:0.send")
    assert board.read(0).where() == "step 12 collective 2 (pp:0.send)"
    cell.set(note="layer 3")
    assert board.read(0).collective == 2
    cell.set(phase="idle")
    assert (board.read(0).collective, board.read(0).step) == (0, 12)
    assert board.read(0).where() == "idle after step 12"
    assert board.read(1).phase == ""
    board.close()
    board.close()


def test_ages_are_of_the_right_thing() -> None:
    board = ProgressBoard.create(1)
    cell = board.cell(0)
    cell.set(phase="step", step=1)
    time.sleep(0.15)
    cell.beat()
    progress = board.read(0)
    assert progress.age_s >= 0.14 > progress.beat_age_s
    cell.enter_collective()
    assert board.read(0).age_s < 0.14
    board.close()


def test_long_texts_are_cut_and_names_beyond_the_room_are_unknown() -> None:
    board = ProgressBoard.create(1)
    cell = board.cell(0)
    cell.set(phase="é" * 100, note="n" * 1000)
    assert board.read(0).phase == "é" * 16 and board.read(0).note == "n" * 160
    for i in range(18):
        cell.enter_collective(f"{i:02}" + "x" * 50)
        assert board.read(0).what == (f"{i:02}" + "x" * 30 if i < 16 else "")
    cell.enter_collective("00" + "x" * 50)
    assert board.read(0).what == "00" + "x" * 30
    assert board.read(0).phase == "é" * 16
    board.close()


def test_the_last_words_of_a_killed_process_stay() -> None:
    board = ProgressBoard.create(2)
    child = subprocess.Popen(
        [sys.executable, "-c", WRITER, msgspec.json.encode(board.handle).decode()],
        pass_fds=[board.handle.fd],
        stdout=subprocess.PIPE,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == b"set\n"
    os.kill(child.pid, signal.SIGKILL)
    child.wait()
    child.stdout.close()
    board.cell(0).set(phase="step", step=913, collective=15)
    assert board.read(1).where() == "step 913 collective 14 (tp:0.all_reduce)"
    text = board.describe()
    assert text.startswith("rank 0 at step 913 collective 15") and "rank 1 at step 913 collective 14" in text
    assert laggards(board.all()) == [1]
    board.close()


def test_readers_never_see_a_half_written_cell() -> None:
    board = ProgressBoard.create(1)
    cell = board.cell(0)
    cell.set(phase="a" * 20, step=0, note="a" * 100)
    stop = threading.Event()

    def write() -> None:
        i = 0
        while not stop.is_set():
            i += 1
            letter = chr(97 + i % 26)
            cell.set(phase=letter * 20, step=i % 26, note=letter * 100)

    thread = threading.Thread(target=write)
    thread.start()
    try:
        for _ in range(3000):
            progress = board.read(0)
            letter = chr(97 + progress.step)
            assert (progress.phase, progress.note) == (letter * 20, letter * 100)
    finally:
        stop.set()
        thread.join()
    board.close()


def test_a_cell_left_half_written_is_still_read() -> None:
    board = ProgressBoard.create(1)
    cell = board.cell(0)
    cell.set(phase="load", note="61 %")
    cell._numbers[0] += 1  # as a rank leaves it that is killed inside `set`
    started = time.monotonic()
    assert board.read(0).where() == "load (61 %)"
    assert time.monotonic() - started < 2
    board.close()


@pytest.mark.parametrize(
    ("cells", "wanted"),
    [
        ([("step", 5, 3), ("step", 5, 3)], [0, 1]),
        ([("step", 5, 4), ("step", 5, 3)], [1]),
        ([("idle", 5, 0), ("step", 5, 9)], [1]),
        ([("step", 5, 0), ("idle", 4, 0)], [1]),
        ([("load", -1, 0), ("idle", -1, 0)], [0]),
        ([("load", -1, 0), ("import", -1, 0), ("init", -1, 0)], [1]),
    ],
)
def test_who_got_least_far(cells: list[tuple[str, int, int]], wanted: list[int]) -> None:
    board = ProgressBoard.create(len(cells))
    for rank, (phase, step, collective) in enumerate(cells):
        board.cell(rank).set(phase=phase, step=step, collective=collective)
    assert laggards(board.all()) == wanted
    board.close()


def test_counting_a_collective_is_cheap() -> None:
    board = ProgressBoard.create(1)
    cell = board.cell(0)
    best = float("inf")
    for _ in range(5):
        started = time.perf_counter()
        for _ in range(1000):
            cell.enter_collective("tp:0.all_reduce")
        best = min(best, (time.perf_counter() - started) / 1000)
    assert best < 20e-6
    board.close()


def test_the_first_line_of_an_error_announces_nothing_that_does_not_come() -> None:
    at = Progress("step", 9, 2, 1.0, 4.0, "")
    for error in (stopped(1, at, "", ["a", "b"]), died(1, -9, at, "", ["a", "b"])):
        first, *rest = str(error).split("\n")
        assert first.endswith(".") and "Last lines" not in first and rest == ["Last lines of rank 1:", "  a", "  b"]
    assert "\n" not in str(stopped(1, at, "", []))


def test_of_a_stack_the_end_that_says_where_the_rank_is_gets_shown() -> None:
    frames = [f'  File "f{i}.py", line {i} in f{i}' for i in range(20)]
    progress = Progress("step", 3, 2, 1.0, 4.0, "")
    text = str(stopped(1, progress, "", ["a line before", "Current thread 0x1 (most recent call first):", *frames]))
    assert "Last lines of rank 1:\n  Current thread" in text and 'f0.py", line 0' in text and "f7.py" in text and "f8.py" not in text
    assert "f19" in str(stopped(1, progress, "", frames))  # no stack: the last lines
