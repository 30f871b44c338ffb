"""The main program of a worker process: `python -m lockstep.executor.worker_main FD`, started by `spawn.py`.

First what keeps it from being left behind or left alone (dying with the driver, beating, stack dumps on request), then
its cores and threads, which have to be settled before the first import of a maths library, then the model.
"""

from __future__ import annotations

import contextlib
import faulthandler
import gc
import itertools
import os
import signal
import socket
import sys
import threading
import time
from pathlib import Path
from typing import Any

import msgspec

from lockstep.distributed.message_queue import MessageQueue, QueueClosed
from lockstep.distributed.progress import ProgressBoard, ProgressCell
from lockstep.executor import wire
from lockstep.executor.fault import Fault
from lockstep.executor.worker_loop import WorkerLoop, raised_answer, worker_class
from lockstep.observability import logging
from lockstep.utils import procs
from lockstep.utils.cores import keep_on
from lockstep.utils.host_memory import resident_bytes

BEAT_S = 0.2
MEMORY_BEATS = 5  # so often resident memory is told
LAST_WORDS_S = 10.0  # after an exception: how long to wait for the driver to end this process


def main() -> None:
    launch = _read_launch(int(sys.argv[1]))
    procs.die_with_parent(launch.parent_pid, launch.death_fd)
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the driver's to handle
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # it may have been ignored where the driver was started
    faulthandler.enable()
    faulthandler.register(signal.SIGUSR1, all_threads=True)
    board = ProgressBoard.attach(launch.board)
    cell = board.cell(launch.local_rank)
    cell.set(phase="import")
    threading.Thread(target=_beat, args=(cell,), name="beat", daemon=True).start()
    reply = socket.socket(fileno=launch.reply_fd)
    sys.path[:] = launch.sys_path
    logging.configure(launch.config.runtime.log_level)

    def answer(message: wire.Answer) -> None:
        reply.sendall(wire.frame(message))

    phase = "import"
    try:
        fault = Fault.from_environment(launch.rank)
        fault.strike("import")
        cls = worker_class(launch.worker_cls)
        groups = None
        if getattr(cls, "needs_distributed", True):
            from lockstep.executor.join import join

            phase = "rendezvous"
            cell.set(phase=phase)
            fault.strike(phase)
            groups = join(launch, cell)
        elif launch.listen_fd >= 0:
            os.close(launch.listen_fd)  # nobody will serve on it: do not hold the port
        # Now, not earlier: threads inherit it, and those of the groups must run while this one computes on its core.
        keep_on(launch.share.cores)
        device = launch.config.parallel.first_device + launch.local_rank
        phase = "init"
        cell.set(phase=phase)
        fault.strike(phase)
        worker = cls(launch.config, launch.spec, Path(launch.folder), launch.rank, device, groups, cell)
        worker.init_device(launch.share, own_process=True)
        phase = "load"
        cell.set(phase=phase)
        fault.strike(phase)
        worker.load_model()
    except Exception as e:
        answer(raised_answer(0, phase, e, fatal=True))
        _await_end()
    gc.freeze()  # what is here now stays: collections need not look at it again
    _serve(launch, worker, cell, answer, fault)
    _leave(worker, groups is not None)


def _serve(launch: wire.Launch, worker: Any, cell: ProgressCell, answer: Any, fault: Fault) -> None:
    queue = MessageQueue.attach(launch.queue)
    results = MessageQueue.adopt(launch.results) if launch.results else None
    loop = WorkerLoop(worker, queue, cell, answer, fault, results, reports=launch.rank == launch.output_rank)
    answer(wire.Ready())
    try:
        loop.run()
    except QueueClosed:
        return
    except Exception:
        _await_end()


def _read_launch(fd: int) -> wire.Launch:
    text = os.pread(fd, os.fstat(fd).st_size, 0)
    os.close(fd)
    return msgspec.msgpack.decode(text, type=wire.Launch)


def _beat(cell: ProgressCell) -> None:
    cell.times.is_process(os.getpid())
    for beat in itertools.count():
        cell.beat()
        if beat % MEMORY_BEATS == 0:
            cell.times.memory(resident_bytes())
        time.sleep(BEAT_S)


def _await_end() -> None:
    """The driver has been told what happened and ends this process. Leaving first would look like a second failure."""
    time.sleep(LAST_WORDS_S)
    os._exit(1)


def _leave(worker: Any, joined: bool) -> None:
    """An orderly end. Interpreter tear-down is skipped: with a loaded maths library it takes long and can hang."""
    with contextlib.suppress(Exception):
        if hasattr(worker, "shutdown"):
            worker.shutdown()
        if joined:
            from lockstep.executor.join import leave

            leave()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(0)


if __name__ == "__main__":
    main()
