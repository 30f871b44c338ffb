"""The message queue: order, back-pressure, oversize messages, waits that cost nothing and end when the other side does."""

from __future__ import annotations

import os
import resource
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.distributed import message_queue
from lockstep.distributed.message_queue import MessageQueue, MessageReader, QueueClosed
from lockstep.utils import procs

READER = """
import sys, msgspec
from lockstep.distributed.message_queue import MessageQueue, QueueHandle, QueueClosed
reader = MessageQueue.attach(msgspec.json.decode(sys.argv[1], type=QueueHandle))
print("attached", flush=True)
for line in sys.stdin:
    what, _, value = line.strip().partition(" ")
    try:
        if what == "read":
            print(",".join(f"{len(m)}:{m[:8].hex()}" for m in (reader.dequeue(20) for _ in range(int(value)))), flush=True)
        elif what == "wait":
            import resource, time
            reader.dequeue(20)
            before = resource.getrusage(resource.RUSAGE_SELF)
            started = time.monotonic()
            reader.dequeue(20)
            after = resource.getrusage(resource.RUSAGE_SELF)
            used = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
            print(used, time.monotonic() - started, flush=True)
    except QueueClosed as e:
        print("closed", e, flush=True)
"""


@contextmanager
def pair(n_readers: int = 1, chunk_bytes: int = 64, chunks: int = 4) -> Iterator[tuple[MessageQueue, list[MessageReader]]]:
    """A queue with its readers in this process."""
    queue = MessageQueue.create(n_readers, chunk_bytes, chunks)
    readers = [MessageQueue.attach(queue.handle(r).duplicate()) for r in range(n_readers)]
    try:
        yield queue, readers
    finally:
        queue.close()
        for reader in readers:
            reader.close()


@contextmanager
def reader_process(queue: MessageQueue, reader: int) -> Iterator[subprocess.Popen[str]]:
    handle = queue.handle(reader)
    child = subprocess.Popen(
        [sys.executable, "-c", READER, msgspec.json.encode(handle).decode()],
        pass_fds=handle.fds,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )
    assert child.stdout is not None
    assert child.stdout.readline() == "attached\n"
    try:
        yield child
    finally:
        child.kill()
        child.wait()
        child.stdout.close()
        assert child.stdin is not None
        child.stdin.close()


def ask(child: subprocess.Popen[str], line: str) -> None:
    assert child.stdin is not None
    child.stdin.write(line + "\n")
    child.stdin.flush()


def answer(child: subprocess.Popen[str]) -> str:
    assert child.stdout is not None
    return child.stdout.readline().strip()


def test_every_reader_gets_every_message_in_order() -> None:
    with pair(3) as (queue, readers):
        for i in range(50):
            queue.enqueue(b"m%d" % i, 1)
            for reader in readers:
                assert reader.dequeue(1) == b"m%d" % i
        assert queue.lag() == [0, 0, 0]


@given(sizes=st.lists(st.integers(0, 300), max_size=25), chunk_bytes=st.integers(1, 40), chunks=st.integers(1, 5), seed=st.randoms())
@settings(max_examples=40, deadline=None)
def test_any_sizes_arrive_whole(sizes: list[int], chunk_bytes: int, chunks: int, seed: object) -> None:
    """Messages larger than a chunk, larger than the whole ring, and empty ones; two readers at their own pace."""
    messages = [bytes((i * 7 + j) % 256 for j in range(size)) for i, size in enumerate(sizes)]
    with pair(2, chunk_bytes, chunks) as (queue, readers):
        got: list[list[bytes]] = [[], []]

        def read(r: int) -> None:
            for _ in messages:
                got[r].append(readers[r].dequeue(20))

        threads = [threading.Thread(target=read, args=(r,)) for r in range(2)]
        for thread in threads:
            thread.start()
        for message in messages:
            queue.enqueue(message, 20)
        for thread in threads:
            thread.join(20)
        assert got == [messages, messages]


def test_back_pressure_holds_the_writer_and_loses_nothing() -> None:
    with pair(2, chunks=4) as (queue, (fast, slow)):
        for i in range(4):
            queue.enqueue(b"%d" % i, 1)
        for i in range(4):
            assert fast.dequeue(1) == b"%d" % i
        with pytest.raises(TimeoutError) as caught:
            queue.enqueue(b"4", 0.05)
        assert "1 of 2 readers are behind: reader 1" in str(caught.value)
        assert f"pid {os.getpid()}" in str(caught.value) and "4 chunks behind" in str(caught.value)
        assert slow.dequeue(1) == b"0"
        queue.enqueue(b"5", 1)
        assert [slow.dequeue(1) for _ in range(4)] == [b"1", b"2", b"3", b"5"]
        assert fast.dequeue(1) == b"5"


def test_writer_that_waits_is_woken_by_a_read() -> None:
    with pair(1, chunks=1) as (queue, (reader,)):
        queue.enqueue(b"a", 1)
        waited = []

        def write() -> None:
            started = time.monotonic()
            queue.enqueue(b"b", 30)
            waited.append(time.monotonic() - started)

        thread = threading.Thread(target=write)
        thread.start()
        time.sleep(0.3)
        assert reader.dequeue(1) == b"a"
        thread.join(10)
        assert 0.25 < waited[0] < 5
        assert reader.dequeue(1) == b"b"


def test_a_message_given_up_half_way_is_seen_by_nobody() -> None:
    with pair(1, chunk_bytes=8, chunks=4) as (queue, (reader,)):
        with pytest.raises(TimeoutError):
            queue.enqueue(b"x" * 100, 0.02)
        with pytest.raises(TimeoutError):
            reader.dequeue(0.02)
        queue.enqueue(b"whole message", 1)
        assert reader.dequeue(1) == b"whole message"


def test_one_reader_never_attached_is_named() -> None:
    queue = MessageQueue.create(2, chunks=1)
    reader = MessageQueue.attach(queue.handle(0).duplicate())
    queue.enqueue(b"a", 1)
    reader.dequeue(1)
    with pytest.raises(TimeoutError, match="reader 1 has never attached"):
        queue.enqueue(b"b", 0.02)
    queue.close()
    reader.close()


def test_dequeue_times_out_and_says_how_long() -> None:
    with pair() as (_, (reader,)):
        started = time.monotonic()
        with pytest.raises(TimeoutError, match=rf"no message from pid {os.getpid()} for 0\.[12] s"):
            reader.dequeue(0.1)
        assert time.monotonic() - started < 5


def test_polling_waits_no_longer_than_told() -> None:
    with pair() as (queue, (reader,)):
        assert reader.poll(0) is None and reader.poll(0.02) is None
        queue.enqueue(b"x" * 150, 1)
        assert reader.poll(0) == b"x" * 150 and reader.poll(0) is None


def test_polling_ends_when_the_reason_to_wait_does() -> None:
    with pair() as (_, (reader,)):
        over = threading.Event()
        found: list[bytes | None] = []
        thread = threading.Thread(target=lambda: found.append(reader.poll(None, over.is_set)))
        thread.start()
        time.sleep(0.05)
        reader.wake()  # for nothing: it waits on
        thread.join(0.05)
        assert thread.is_alive()
        over.set()
        reader.wake()
        thread.join(0.15)  # less than SLICE_S, after which it would look by itself
        assert found == [None]


def test_a_prepared_queue_is_written_by_another_process() -> None:
    handle = MessageQueue.prepare(chunk_bytes=64, chunks=4)
    reader = MessageQueue.attach(handle)
    program = (
        "import sys, msgspec\n"
        "from lockstep.distributed.message_queue import MessageQueue, QueueHandle\n"
        "queue = MessageQueue.adopt(msgspec.json.decode(sys.argv[1], type=QueueHandle))\n"
        "for i in range(200): queue.enqueue(b'%d ' % i * 40, 20)\n"
    )
    command = [sys.executable, "-c", program, msgspec.json.encode(handle).decode()]
    with subprocess.Popen(command, pass_fds=handle.fds) as child:
        assert [reader.dequeue(20) for _ in range(200)] == [b"%d " % i * 40 for i in range(200)]
        assert child.wait(20) == 0
        with pytest.raises(QueueClosed, match="died"):
            reader.dequeue(20)
    reader.close()


@pytest.mark.parametrize("side", ["writer", "reader"])
def test_close_wakes_a_waiting_reader(side: str) -> None:
    with pair() as (queue, (reader,)):
        caught: list[str] = []

        def read() -> None:
            try:
                reader.dequeue(60)
            except QueueClosed as e:
                caught.append(str(e))

        thread = threading.Thread(target=read)
        thread.start()
        time.sleep(0.1)
        (queue if side == "writer" else reader).close()
        thread.join(10)
        assert not thread.is_alive()
        assert "closed" in caught[0]


def test_close_wakes_a_waiting_writer() -> None:
    with pair(chunks=1) as (queue, _):
        queue.enqueue(b"a", 1)
        caught: list[str] = []

        def write() -> None:
            try:
                queue.enqueue(b"b", 60)
            except QueueClosed as e:
                caught.append(str(e))

        thread = threading.Thread(target=write)
        thread.start()
        time.sleep(0.1)
        queue.close()
        thread.join(10)
        assert caught == ["the message queue was closed by its writer."]
        with pytest.raises(QueueClosed):
            queue.enqueue(b"c", 1)
        queue.close()  # twice is fine


def test_what_was_written_before_close_is_still_read() -> None:
    with pair() as (queue, (reader,)):
        queue.enqueue(b"last", 1)
        queue.close()
        assert reader.dequeue(1) == b"last"
        with pytest.raises(QueueClosed):
            reader.dequeue(1)


def test_other_processes_read_the_same() -> None:
    queue = MessageQueue.create(2, chunk_bytes=1000, chunks=4)
    with reader_process(queue, 0) as one, reader_process(queue, 1) as two:
        ask(one, "read 40")
        ask(two, "read 40")
        sizes = [i * 97 % 5000 for i in range(40)]
        for i, size in enumerate(sizes):
            queue.enqueue(bytes([i]) * size, 20)
        wanted = ",".join(f"{size}:{(bytes([i]) * min(size, 8)).hex()}" for i, size in enumerate(sizes))
        assert answer(one) == wanted
        assert answer(two) == wanted
    queue.close()


def test_a_killed_reader_is_noticed_before_the_timeout() -> None:
    queue = MessageQueue.create(2, chunks=2)
    other = MessageQueue.attach(queue.handle(0).duplicate())
    with reader_process(queue, 1) as child:
        queue.enqueue(b"a", 1)
        queue.enqueue(b"b", 1)
        other.dequeue(1), other.dequeue(1)
        os.kill(child.pid, signal.SIGKILL)
        started = time.monotonic()
        with pytest.raises(QueueClosed, match=f"reader 1 of the message queue is gone: pid {child.pid} died"):
            queue.enqueue(b"c", 60)
        assert time.monotonic() - started < 10
    queue.close()
    other.close()


def test_a_reader_that_left_is_noticed() -> None:
    with pair(chunks=1) as (queue, (reader,)):
        queue.enqueue(b"a", 1)
        reader.close()
        with pytest.raises(QueueClosed, match="closed it"):
            queue.enqueue(b"b", 60)


def test_a_reader_notices_that_its_writer_was_killed() -> None:
    code = (
        "import sys, time, msgspec, subprocess\n"
        "from lockstep.distributed.message_queue import MessageQueue\n"
        "queue = MessageQueue.create(1)\n"
        "handle = queue.handle(0)\n"
        "child = subprocess.Popen([sys.executable, '-c', sys.argv[1], msgspec.json.encode(handle).decode()], pass_fds=handle.fds,\n"
        "    stdin=subprocess.PIPE, text=True)\n"
        "child.stdin.write('read 2\\n'); child.stdin.flush()\n"
        "queue.enqueue(b'a'); time.sleep(1000)\n"
    )
    writer = subprocess.Popen([sys.executable, "-c", code, READER], stdout=subprocess.PIPE, text=True)
    assert writer.stdout is not None
    assert writer.stdout.readline() == "attached\n"
    os.kill(writer.pid, signal.SIGKILL)
    writer.wait()
    assert writer.stdout.readline().startswith(f"closed the writer of the message queue is gone: pid {writer.pid} died")
    writer.stdout.close()


def test_waiting_does_not_burn_a_core() -> None:
    queue = MessageQueue.create(1)
    with reader_process(queue, 0) as child:
        ask(child, "wait")
        queue.enqueue(b"go", 5)
        time.sleep(1.0)
        queue.enqueue(b"done", 5)
        used, waited = map(float, answer(child).split())
    assert waited > 0.7
    assert used < 0.1 * waited, f"{used:.3f} s of processor time in {waited:.3f} s of waiting"
    queue.close()


def test_a_blocked_writer_does_not_burn_a_core() -> None:
    with pair(chunks=1) as (queue, _):
        queue.enqueue(b"a", 1)
        before = resource.getrusage(resource.RUSAGE_THREAD)
        with pytest.raises(TimeoutError):
            queue.enqueue(b"b", 0.8)
        after = resource.getrusage(resource.RUSAGE_THREAD)
        assert after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime < 0.1


def test_nothing_is_left_in_the_file_system_or_the_descriptor_table() -> None:
    def open_fds() -> int:
        return len(os.listdir("/proc/self/fd"))

    shm_before, fds_before = set(os.listdir("/dev/shm")), open_fds()
    for _ in range(5):
        with pair(2, chunk_bytes=1 << 16) as (queue, readers):
            queue.enqueue(b"x" * 100_000, 1)
            assert all(len(reader.dequeue(1)) == 100_000 for reader in readers)
            assert not set(os.listdir("/dev/shm")) - shm_before
    assert open_fds() == fds_before


@pytest.mark.parametrize("setting", [{"n_readers": 0}, {"n_readers": 1, "chunk_bytes": 0}, {"n_readers": 1, "chunks": 0}])
def test_impossible_sizes_are_refused(setting: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="must be at least 1"):
        MessageQueue.create(**setting)


def test_loads_no_torch() -> None:
    code = "import sys, lockstep.distributed.message_queue, lockstep.distributed.progress; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_pid_that_was_given_to_another_process_is_not_alive() -> None:
    assert procs.alive(os.getpid(), procs.birth(os.getpid()))
    assert not procs.alive(os.getpid(), procs.birth(os.getpid()) + 1)
    assert message_queue.SLICE_S < 1  # death is noticed within a slice
