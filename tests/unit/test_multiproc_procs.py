"""Processes, their endings, and the log."""

from __future__ import annotations

import logging
import os
import signal
import socket
import subprocess
import sys
import time

import pytest

from lockstep.distributed.progress import ProgressBoard
from lockstep.executor import failure, wire
from lockstep.executor.spawn import WorkerProcess, kill_all
from lockstep.observability import logging as ours
from lockstep.utils import procs
from lockstep.utils.shm import Bell


@pytest.mark.parametrize(
    ("code", "words"),
    [
        (0, "exit code 0"),
        (3, "exit code 3"),
        (-9, "killed by SIGKILL"),
        (-11, "killed by SIGSEGV"),
        (-250, "killed by signal 250"),
        (None, "still running"),
    ],
)
def test_exit_codes_in_words(code: int | None, words: str) -> None:
    assert procs.exit_cause(code) == words


def test_states_of_a_process() -> None:
    child = subprocess.Popen(["sleep", "100"])
    try:
        born = procs.birth(child.pid)
        assert procs.alive(child.pid, born) and born > 0
        os.kill(child.pid, signal.SIGSTOP)
        end = time.monotonic() + 10
        while procs.state(child.pid) != "T" and time.monotonic() < end:
            time.sleep(0.01)
        assert procs.state(child.pid) == "T" and procs.alive(child.pid)
        assert procs.wait_gone([child.pid], 0.05) == [child.pid]
        child.kill()
        end = time.monotonic() + 10
        while procs.state(child.pid) != "Z" and time.monotonic() < end:
            time.sleep(0.01)
        assert procs.state(child.pid) == "Z" and not procs.alive(child.pid), "a zombie is not alive"
    finally:
        child.kill()
        child.wait()
    assert procs.state(child.pid) == "" and procs.birth(child.pid) == 0 and not procs.alive(child.pid)
    procs.kill_group(child.pid)  # gone already is fine


@pytest.mark.parametrize("stopped", [False, True])
def test_dying_with_the_parent(stopped: bool) -> None:
    """The parent is killed; its child ends, running or stopped."""
    child = (
        "import sys, time; from lockstep.utils import procs\n"
        "procs.die_with_parent(int(sys.argv[1]), int(sys.argv[2])); print(__import__('os').getpid(), flush=True); time.sleep(1000)"
    )
    parent = (
        "import os, subprocess, sys, time\nread, write = os.pipe()\n"
        "subprocess.Popen([sys.executable, '-c', sys.argv[1], str(os.getpid()), str(read)], pass_fds=[read])\ntime.sleep(1000)"
    )
    process = subprocess.Popen([sys.executable, "-c", parent, child], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    pid = int(process.stdout.readline())
    assert procs.alive(pid)
    if stopped:
        os.kill(pid, signal.SIGSTOP)
    process.kill()
    process.wait()
    process.stdout.close()
    assert procs.wait_gone([pid], 10) == []


def test_a_bell_rung_before_the_wait_is_heard_once() -> None:
    bell = Bell.create()
    assert not bell.wait(0)
    bell.ring()
    bell.ring()
    assert bell.wait(5)
    assert not bell.wait(0.01)
    bell.close()


def test_a_bell_of_pipes_works_the_same() -> None:
    read, write = os.pipe()
    os.set_blocking(read, False)
    os.set_blocking(write, False)
    bell = Bell((read, write))
    for _ in range(20_000):  # more than a pipe holds: ringing never blocks
        bell.ring()
    assert bell.wait(5)
    bell.close()


def test_log_lines_carry_level_and_rank(capsys: pytest.CaptureFixture[str]) -> None:
    logger = logging.getLogger("lockstep")
    before = logger.handlers[:], logger.level, logger.propagate
    try:
        ours.configure("info", rank=3)
        ours.configure("info", rank=3)
        ours.get_logger("lockstep.somewhere").info("hello")
        ours.get_logger("elsewhere").debug("not shown")
        lines = capsys.readouterr().err.splitlines()
        assert len(lines) == 1
        assert lines[0].startswith("[rank 3] INFO") and lines[0].endswith("lockstep.somewhere: hello")
    finally:
        logger.handlers[:], logger.level, logger.propagate = before


def test_the_tail_keeps_the_last_lines_whole() -> None:
    tail = failure.LogTail()
    assert tail.feed(b"one\ntw") == ["one"]
    assert tail.feed(b"o\nthree") == ["two"]
    tail.finish()
    assert list(tail.lines) == ["one", "two", "three"]
    for i in range(1000):
        tail.feed(b"%d\n" % i)
    assert list(tail.lines) == [str(i) for i in range(1000 - failure.TAIL_LINES, 1000)]
    tail.feed(b"x" * 200_000)
    assert len(tail.lines[-1]) == 200_000


def test_frames_split_anywhere_come_out_whole() -> None:
    answers = [
        wire.Ready(),
        wire.Raised(3, "load", "ValueError", "bad", "trace", False),
        wire.Raised(4, "init", "KeyError", "worse", "t" * 500, True),
    ]
    stream = b"".join(map(wire.frame, answers))
    for size in (1, 2, 3, 7, 100, len(stream)):
        reader = wire.FrameReader()
        got = [a for start in range(0, len(stream), size) for a in reader.feed(stream[start : start + size])]
        assert got == answers


@pytest.mark.parametrize(
    "body",
    [b"\x80\x04\x95\x10\x00\x00\x00\x00\x00\x00\x00\x8c\x05posix\x94.", b"", b"\xff", b"\x93\xa4nope\x01\x02", b"\x92\xa9step_done\x01"],
)
def test_foreign_frames_are_refused(body: bytes) -> None:
    import msgspec

    with pytest.raises(msgspec.DecodeError):
        list(wire.FrameReader().feed(len(body).to_bytes(4, "little") + body))


def test_echoes_of_a_death_are_told_from_other_exceptions() -> None:
    def raised(error_type: str, message: str) -> wire.Raised:
        return wire.Raised(1, "step 1", error_type, message, "", True)

    assert failure.tells_of_a_lost_peer(raised("RuntimeError", "[pair.cc:537] Connection closed by peer [127.0.0.1]:4"))
    assert failure.tells_of_a_lost_peer(raised("DistBackendError", "NCCL error"))
    assert not failure.tells_of_a_lost_peer(raised("ValueError", "bad row"))


def test_an_out_of_memory_kill_is_said() -> None:
    board = ProgressBoard.create(1)
    board.cell(0).set(phase="load", note="61 %")
    error = failure.died(0, -9, board.read(0), "", [], " by the out-of-memory killer")
    assert "rank 0 died in load (61 %): killed by SIGKILL by the out-of-memory killer." in str(error)
    assert "out-of-memory" not in str(failure.died(0, 1, board.read(0), "", [], " by the out-of-memory killer"))
    board.close()


def test_a_rank_killed_while_it_shares_a_file_leaves_none() -> None:
    """Ranks find out who shares memory by a file that has a name for a millisecond."""
    code = "import time; from lockstep.distributed import nodes; print(nodes._write_token()[0], flush=True); time.sleep(100)"
    process = subprocess.Popen([sys.executable, "-c", code], stdout=subprocess.PIPE, start_new_session=True)
    ours, theirs = socket.socketpair()
    worker = WorkerProcess(0, process, ours, -1, -1, born=procs.birth(process.pid))
    assert process.stdout is not None
    path = process.stdout.readline().decode().strip()
    assert os.path.exists(path)
    kill_all([worker])
    assert not os.path.exists(path)
    assert process.returncode == -signal.SIGKILL
    worker.close()
    theirs.close()
    process.stdout.close()


def test_a_closed_bell_is_silent():
    """A ring that races with the close must neither raise nor write to a descriptor that somebody else got since."""
    bell = Bell.create()
    bell.ring()
    assert bell.wait(1.0)
    bell.close()
    bell.ring()
    bell.close()
