"""The worker processes of one executor and the single thread that watches over them.

The thread starts the processes (the kernel's parent-death signal follows the thread that forked: this one lives as long
as they do), then sleeps on everything at once: replies, deaths, log output, a bell, and a clock.

1. An answer resolves its operation.
2. A death ends everything at once, with the exit code.
3. An exception that breaks lockstep ends everything too, after a short grace: when a rank dies, the others often raise
   "connection lost" first, and the death is the better cause.
4. Every TICK_S it reads the progress cells. A rank without a sign of life that the kernel calls stopped ends
   everything; so does an order on which no rank made progress for the order's limit. A rank that is slow but moves is
   never reported.
The first failure wins. Whatever ended it, all processes are killed and reaped before the thread ends.
"""

from __future__ import annotations

import contextlib
import os
import selectors
import signal
import sys
import threading
import time
from collections.abc import Callable

import msgspec

from lockstep.distributed.message_queue import QueueClosed
from lockstep.distributed.progress import rank_list
from lockstep.executor import failure, wire
from lockstep.executor.contract import ExecutorError
from lockstep.executor.crew import Crew
from lockstep.executor.gather import Door, Node, RemoteRank
from lockstep.executor.operations import Operations
from lockstep.executor.remote import Nodes
from lockstep.executor.results import Results
from lockstep.executor.spawn import Plan, WorkerProcess, exit_codes, kill_all
from lockstep.executor.stall import STALE_S, Stall
from lockstep.observability.logging import get_logger
from lockstep.protocol.health import RankHealth
from lockstep.utils import env, net, procs
from lockstep.utils.cores import RankCores
from lockstep.utils.net import Listener
from lockstep.utils.shm import Bell

TICK_S = 0.25
GRACE_S = 0.03  # how long an exception waits for a death that explains it better,
LOSS_GRACE_S = 2.0  # and how long one that speaks of a lost peer does: dying takes a while on a busy machine, word from other hosts too
STOP_S, TERM_S = 2.0, 1.0  # shutdown: time to leave by themselves, then after SIGTERM

_log = get_logger(__name__)


class Fleet(Crew):
    """Start with `start()`; talk through `send` and `operations`; end with `stop()`. Nothing here refers to the Executor."""

    def __init__(self, plan: Plan, cores: list[RankCores], door: Door | None = None) -> None:
        """cores: of each rank on this host. door: where the other hosts report, if there are any."""
        super().__init__(plan, cores, plan.world_size)
        config = plan.config
        self.operations = Operations()
        self.results = Results(self.operations, plan.output_rank)
        self.workers: list[WorkerProcess | RemoteRank] = []  # by rank
        self.settled = threading.Event()  # ready, or failed
        self._owner = os.getpid()
        self._started = time.monotonic()
        self._startup_limit_s = config.runtime.startup_timeout_seconds
        self._forward = True
        self._only = ("ERROR", "CRITICAL") if config.runtime.log_level == "error" else ""  # how forwarded lines must begin
        self._bell = Bell.create()
        self._door = door
        self._stall = Stall(self.board, self.operations)
        self._nodes = Nodes(plan, door, self._bell, self.board)
        self._ordering = threading.Lock()  # orders reach every host in the same order
        self._suspect: tuple[float, ExecutorError] | None = None  # an exception in its grace
        self._suspect_is_loss = False  # it speaks of a lost peer
        self._closed_reply: dict[int, float] = {}  # rank -> when its reply socket ended
        self.why = ""  # what went wrong above the ranks, once it is known: for the other hosts
        self._stopping_since = 0.0
        self._last_tick = 0.0
        self._over = False
        self._callbacks: list[Callable[[ExecutorError], None]] = []
        self._callback_lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="lockstep-monitor", daemon=True)

    # -- called from other threads

    def start(self) -> None:
        """Start the processes and wait until all are ready. Raises the ExecutorError when one does not get there."""
        self._thread.start()
        self.settled.wait()
        if self.operations.error is not None:
            self._thread.join()
            raise self.operations.error

    def send(self, order: wire.Order, timeout: float) -> None:
        """Give an order to every rank. Raises the terminal error, or TimeoutError when ranks do not take orders."""
        try:
            self._give(wire.encode_order(order), timeout)
        except QueueClosed:
            raise self.operations.error or _shutdown_error() from None

    def _give(self, order: bytes, timeout: float) -> None:
        with self._ordering:
            frame = self._nodes.frame(order)
            if self.local:
                self.queue.enqueue(order, timeout)  # what the ranks here do not take, the others are not given either
            self._nodes.give(frame)

    def say_again(self) -> None:
        """See `Executor.say_again`."""
        with self._ordering:
            self._nodes.say_again()

    def on_failure(self, callback: Callable[[ExecutorError], None]) -> None:
        with self._callback_lock:
            self._callbacks.append(callback)
        error = self.operations.error
        if error is not None and error.kind != "shutdown":
            self._call_back(error)

    def stop(self) -> None:
        """End all processes and free everything. Never raises; may be called twice, by anyone but a forked child."""
        if os.getpid() != self._owner or not self._thread.ident:
            return
        if not self._stopping_since:
            self._stopping_since = time.monotonic()
            self.operations.fail(_shutdown_error())
            self.results.wake()
            with contextlib.suppress(TimeoutError, QueueClosed):
                self._give(wire.encode_order(wire.Stop()), 0.2)
            if self._thread.is_alive():
                self._bell.ring()
        if threading.current_thread() is not self._thread:
            self._thread.join(STOP_S + TERM_S + 5.0)

    # -- the monitor thread

    def _run(self) -> None:
        try:
            if self._nodes.gather(lambda: bool(self._stopping_since)):
                self._started = time.monotonic()
                self._spawn()
            else:
                self._over = True
            while not self._over:
                self._watch()
        except ExecutorError as e:
            self._fail(e)
        except Exception as e:
            _log.exception("the monitor of the ranks failed")
            error = ExecutorError(f"the monitor of the ranks failed: {type(e).__name__}: {e}", phase="monitor", error_type=type(e).__name__)
            error.__cause__ = e
            self._fail(error)
        finally:
            self._clean_up()

    def _spawn(self) -> None:
        if self.plan.leads_only:
            self._nodes.start(None, self._attend, self)
        else:
            self._spawn_with_own()
        self.workers += self._nodes.ranks
        self.operations.places = {rank.rank: rank.where for rank in self._nodes.ranks}
        self._selector.register(self._bell.fds[0], selectors.EVENT_READ, (self._bell.wait, 0))

    def _spawn_with_own(self) -> None:
        # Bound once and handed to rank 0: nobody can take the port in between.
        with Listener(self._door.address, env.rendezvous_port()) if self._door is not None else Listener() as listener:
            here = self.plan.output_rank in self.plan.ranks
            self._spawn_here(self.results.handle if here else None, (listener.host, listener.port), listener)
            self.workers += self.local
            self._nodes.start((listener.host, listener.port), self._attend, self)
            if self._door is not None:
                where = f"{rank_list(self.plan.ranks)} on node 0, the leader"
                self._nodes.tell_where_ranks_meet(f"{listener.host} ({net.interface_of(listener.host)})", listener.port, where)

    def _watch(self) -> None:
        """One round: sleep until something happens, then handle all of it, deaths last (their last words come first)."""
        ended = self._listen(self._nap())
        self._nodes.watch()
        if ended or self._closed_reply or any(rank.code is not None for rank in self._nodes.ranks):
            self._check_deaths()
        now = time.monotonic()
        if self._over:
            return
        if self._stopping_since:
            self._check_stopping(now)
        elif self._suspect is not None and now >= self._suspect[0]:
            # Is it about a node that is not known to be lost yet? That takes up to node_timeout_seconds to find out.
            if not (self._nodes.silent() and self._suspect_is_loss):
                self._fail(self._suspect[1])
        elif now - self._last_tick >= TICK_S:
            self._last_tick = now
            self._check_progress(now)

    def _nap(self) -> float:
        if self._stopping_since:
            return 0.05
        return 0.005 if self._suspect is not None or self._closed_reply else TICK_S

    def _replied(self, worker: WorkerProcess, data: bytes) -> None:
        self.replied(worker, data)

    def replied(self, worker: WorkerProcess | RemoteRank, data: bytes) -> None:
        """What a rank, here or on another host, answered; empty: its socket ended."""
        if not data:
            self._closed_reply.setdefault(worker.rank, time.monotonic())
            return
        try:
            for answer in worker.frames.feed(data):
                self._handle(worker, answer)
        except msgspec.DecodeError as e:
            message = f"rank {worker.rank}{worker.where} sent an answer that cannot be decoded: {e}"
            self._fail(ExecutorError(message, rank=worker.rank, kind="raised", error_type="DecodeError", log_tail=list(worker.tail.lines)))

    def _handle(self, worker: WorkerProcess | RemoteRank, answer: wire.Answer) -> None:
        if self.operations.frozen:
            return
        if isinstance(answer, wire.StepDone):
            self.operations.answer(worker.rank, answer.id, answer.result)
            self.results.wake()
        elif isinstance(answer, wire.CallDone):
            self.operations.answer(worker.rank, answer.id, wire.decode_value(answer.value))
        elif isinstance(answer, wire.Ready):
            worker.ready = True
            if all(w.ready for w in self.workers) and len(self.workers) == self.plan.world_size:
                self.settled.set()
        elif not answer.fatal:
            self.operations.answer_raised(worker.rank, answer)
        elif self._suspect is None:
            lost = failure.tells_of_a_lost_peer(answer)
            others = self.board.describe(w.rank for w in self.workers if w is not worker) if lost else ""
            error = failure.raised(worker.rank, answer, list(worker.tail.lines), others, worker.where)
            grace_s = LOSS_GRACE_S if lost else GRACE_S
            self._suspect, self._suspect_is_loss = (time.monotonic() + grace_s, error), lost

    def _said(self, worker: WorkerProcess, data: bytes) -> None:
        self.said(worker, data)

    def said(self, worker: WorkerProcess | RemoteRank, data: bytes) -> None:
        """What a rank wrote."""
        lines = worker.tail.feed(data)
        if self._forward and self.operations.error is None:
            with contextlib.suppress(OSError, ValueError, AttributeError):  # no standard error any more
                sys.stderr.write("".join(f"[rank {worker.rank}] {line}\n" for line in lines if line.startswith(self._only)))

    def node_lost(self, node: Node, why: str) -> None:
        """A host is gone, and its ranks with it."""
        self._unregister(node.link.socket)
        if self._stopping_since:
            for rank in node.ranks.values():
                rank.code = rank.code if rank.code is not None else -signal.SIGKILL
            return
        why += self._door.explain(node.number) if self._door is not None else ""
        others = [w.rank for w in self.workers if w.rank not in node.ranks]
        self._fail(failure.lost(node.name, list(node.ranks), why, self.board.describe(node.ranks), self.board.describe(others)))

    def _check_deaths(self) -> None:
        ended = exit_codes(self.workers)
        if self._stopping_since:
            self._over = len(ended) == len(self.workers)
            for worker, _ in ended:
                if isinstance(worker, WorkerProcess):
                    self._unregister(worker.pid_fd)
        elif ended:
            worker, code = ended[0]
            if isinstance(worker, WorkerProcess):
                self._drain(worker)
            worker.tail.finish()
            if self._over:  # its last words were a failure of their own
                return
            others = [w.rank for w in self.workers if w is not worker]
            tail = list(worker.tail.lines)
            oom = worker.oom if isinstance(worker, RemoteRank) else self._out_of_memory()
            hint = " by the out-of-memory killer (the cgroup counts it)" if oom else ""
            at, order = self.board.read(worker.rank), self._order()
            error = failure.died(worker.rank, code, at, self.board.describe(others), tail, hint, order, worker.where)
            # A rank that said why before it ended: the exception is the cause.
            said = self._suspect is not None and self._suspect[1].rank == worker.rank
            self._fail(self._suspect[1] if said and self._suspect else error)
        elif self._closed_reply:
            rank, since = min(self._closed_reply.items(), key=lambda item: item[1])
            if time.monotonic() - since > 1.0:
                worker = self.workers[rank]
                self._fail(failure.died(rank, None, self.board.read(rank), "", list(worker.tail.lines), where=worker.where))

    def _order(self) -> str:
        """The oldest order that is not answered, in words; "" when there is none."""
        operation = self.operations.oldest()
        return operation.what if operation is not None else ""

    def _check_progress(self, now: float) -> None:
        """Look for ranks that are stopped and for orders nobody works on."""
        stopped = self._stall.stopped(self.workers)
        if stopped is not None:
            order, where = self._order(), self.health()
            explain = self._stall.explain(stopped, self.workers, order)
            self._collect_stacks()
            self._fail(explain(), where)
        elif not self.settled.is_set():
            late_s = now - self._started
            if late_s > self._startup_limit_s:
                self._fail_hung(self._stall.starting(self.workers, self._startup_limit_s), late_s)
        else:
            self.results.take()  # a result that nobody fetches is not one that is owed
            error = self._stall.half_answered(self.workers)
            if error is not None:
                self._fail(error)
            elif (hung := self._stall.hung(now)) is not None:
                self._fail_hung(*hung)

    def _fail_hung(self, what: str, quiet_s: float) -> None:
        """Ask every rank for its Python stack, then fail with all of them."""
        everyone, where = self.board.all(), self.health()
        states = [w.state() for w in self.workers]
        self._collect_stacks()
        tail = [f"[rank {w.rank}] {line}" for w in self.workers for line in w.tail.lines]
        self._fail(failure.hung(what, quiet_s, everyone, states, tail), where)

    def _collect_stacks(self) -> None:
        self._forward = False  # the stacks belong to the error, not on the terminal
        self.operations.frozen = True  # what a stopped rank does when it is made to speak is no way back
        self._nodes.ask_for_stacks()
        self._await_stacks(self.workers, self._nodes.pump)

    def health(self) -> list[RankHealth]:
        """Every rank at this moment, from any thread; [] once all is over."""
        with contextlib.suppress(ValueError, IndexError):  # the board is closed
            return [failure.health_of(worker, self.board.read(worker.rank), STALE_S) for worker in list(self.workers)]
        return []

    def _fail(self, error: ExecutorError, where: list[RankHealth] | None = None) -> None:
        """First failure wins: wake everyone who waits, then end every rank. where: they were; default: are now."""
        self._over = True
        error.ranks = self.health() if where is None else where
        self.results.take()  # what was computed before counts
        if not self.operations.fail(error):
            return
        self.results.wake()
        self.settled.set()
        self.queue.close()
        kill_all(self.local)
        self._call_back(error)

    def _call_back(self, error: ExecutorError) -> None:
        with self._callback_lock:
            callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            try:
                callback(error)
            except Exception:
                _log.exception("a failure callback raised")

    def _check_stopping(self, now: float) -> None:
        """Shutdown: let ranks leave by themselves, then make them. Ranks that are starting look for no order: end them, and
        those of an engine that failed."""
        if not self.settled.is_set() or self.why:
            self._over = True
            return
        waited = now - self._stopping_since
        self._check_deaths()
        if self._over or waited < STOP_S:
            return
        if waited >= STOP_S + TERM_S:
            self._over = True
            return
        for worker in self.local:
            procs.kill_group(worker.pid, signal.SIGTERM)

    def _clean_up(self) -> None:
        """Leave nothing behind: no process, descriptor or mapping."""
        error = self.operations.error
        self._nodes.end(self.why if error is None or error.kind == "shutdown" else str(error).partition("\n")[0])
        self.settled.set()
        self._end_here()
        self.results.close()
        self._bell.close()


def _shutdown_error() -> ExecutorError:
    return ExecutorError("the executor was shut down", kind="shutdown")
