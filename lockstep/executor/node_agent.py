"""The agent of a node: runs the ranks of one host for the leader on another. It decides nothing but when to give up.

Orders come from the leader and go to the ranks through this host's message queue; what the ranks answer and write, how they
end and what they are doing goes back as it is. The leader judges it as it judges its own ranks. Without a leader, or a
reason to go on, the ranks are ended, and so is the agent; another one looks for the leader again where that one said that it
comes again (`factory.serve_node`). No torch.
"""

from __future__ import annotations

import signal
import threading
import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from types import FrameType

from lockstep.config.model_spec import ModelSpec
from lockstep.config.tree import EngineConfig
from lockstep.distributed.message_queue import QueueClosed
from lockstep.distributed.progress import rank_list
from lockstep.executor import affinity, greeting
from lockstep.executor.contract import ExecutorError
from lockstep.executor.crew import Crew, received
from lockstep.executor.link import LinkLost
from lockstep.executor.node_wire import Again, Beat, End, Ended, Leaving, Meeting, Message, Order, Replied, Said, Stacks, Start
from lockstep.executor.spawn import Plan, WorkerProcess
from lockstep.observability.logging import get_logger
from lockstep.utils import env, net
from lockstep.utils.net import Listener
from lockstep.utils.words import joined

TICK_S = 0.1
FULL_S = 0.002  # how soon to try again when the ranks have no room for an order
LEAVE_S = 3.0  # how long ranks may take to leave by themselves, once it is over in good order
_log = get_logger(__name__)


class Interrupted(BaseException):
    """A signal asks this process to end."""

    def __init__(self, number: int) -> None:
        super().__init__(signal.Signals(number).name)
        self.number = number


class NodeAgent(Crew):
    """Make one, and `run` it."""

    def __init__(
        self,
        config: EngineConfig,
        spec: ModelSpec,
        folder: Path,
        worker_cls: str,
        *,
        key: str | None = None,
        place: tuple[int, int] | None = None,
        again: bool = False,
    ) -> None:
        """config: as this host has it; where nodes need not agree, the leader's holds. key: what both sides prove to have; default:
        LOCKSTEP_CLUSTER_KEY. place: (ranks of the same leader before these, all of them) on this host, where other agents have some.
        again: the leader told an agent before this one that it comes again."""
        parallel = config.parallel
        plan = Plan(config, spec, Path(folder), worker_cls)
        before, total = place or (0, len(plan.ranks))
        cores = affinity.plan_here(total, parallel)[before : before + len(plan.ranks)]
        super().__init__(plan, cores, len(plan.ranks))
        self._key = env.cluster_key() if key is None else key
        self._crowd = total / len(plan.ranks)
        self.name = f"node {parallel.node_rank} of {parallel.nnodes}"
        self._leader = f"the leader at {parallel.master_addr}:{parallel.report_port}"
        self._again = again
        self._orders: deque[bytes] = deque()  # that the ranks had no room for
        self._reported: set[int] = set()  # ranks whose end has been told
        self._end: End | None = None

    def run(self) -> bool:
        """Serve until it is over: whether the leader is to be looked for again, by a new agent.

        Raises ExecutorError where it is not, unless that was in good order; KeyboardInterrupt after Ctrl-C.
        """
        last: Leaving | None = None
        link = None
        try:
            with _signals():
                self._link = link = greeting.connect(self.plan.config, self.plan.spec, self._key)
                self._obey(link.early)
                while self._end is None:
                    self._watch()
                if self._end.reason:
                    return self._parted(f"{self.name} ended with its leader: {self._end.reason}")
                self._let_leave()
                return False
        except Interrupted as e:
            last = Leaving(f"it was interrupted ({e})")
            if e.number == signal.SIGINT:
                raise KeyboardInterrupt from None
            raise ExecutorError(f"{self.name} was ended by {e}", phase="node", kind="shutdown") from None
        except LinkLost as e:
            what = f" and ended its {rank_list(self.plan.ranks)}" if self.local else ""
            return self._parted(f"{self.name} lost {self._leader}: {e}. It gave up{what}.")
        except ExecutorError:
            raise
        except Exception as e:
            last = Leaving(f"its agent failed: {type(e).__name__}: {e}")
            raise
        finally:
            # Those first, so that whoever hears of the end finds no rank of this host alive.
            self._end_here()
            if link is not None:
                link.close(last)

    def _parted(self, why: str) -> bool:
        """It is over, and not in good order: True when the leader comes again. Raises ExecutorError when it does not."""
        if not self._again:
            raise ExecutorError(why, phase="node", kind="lost")
        limit_s = self.plan.config.runtime.startup_timeout_seconds
        _log.warning("%s", joined(why, f"It looks for {self._leader} again, for up to {limit_s:g} s (startup_timeout_seconds)."))
        return True

    def _watch(self) -> None:
        self._link.keep(self._beat)
        self._attend(self._link, self._read_leader, None)
        ended = self._listen(FULL_S if self._orders else TICK_S)
        self._give()
        if ended or any(w.pid_fd < 0 for w in self.local):
            self._tell_ends()

    def _beat(self) -> Beat:
        cells = [self.board.copy_out(i) for i in range(len(self.local))]
        return Beat(time.monotonic_ns(), cells, [w.state() for w in self.local])

    def _read_leader(self, _: None) -> None:
        messages, why = received(self._link)
        self._obey(messages)
        if why and self._end is None:
            raise LinkLost(why)

    def _obey(self, messages: Sequence[Message]) -> None:
        for message in messages:
            if isinstance(message, Order):
                self._orders.append(message.body)
            elif isinstance(message, Start):
                self._start(message)
            elif isinstance(message, Stacks):
                self._ask_for_stacks()
            elif isinstance(message, Again):
                self._again = True
            elif isinstance(message, End):
                self._end = message

    def _start(self, start: Start) -> None:
        own, self._again = self.plan.config, start.again
        parallel = replace(
            start.config.parallel,
            node_rank=own.parallel.node_rank,
            threads_per_rank=own.parallel.threads_per_rank,
            cpu_binding=own.parallel.cpu_binding,
        )
        config = replace(start.config, parallel=parallel, runtime=replace(start.config.runtime, log_level=own.runtime.log_level))
        config = replace(config, model=replace(start.config.model, model=own.model.model, tokenizer=own.model.tokenizer))
        share = config.cache.gpu_memory_utilization
        if share is not None and config.runtime.device == "cpu":  # of the host's memory: agents that share it each take their part
            config = replace(config, cache=replace(config.cache, gpu_memory_utilization=share / self._crowd))
        self.plan = replace(self.plan, config=config, spec=start.spec)
        address = self._link.socket.getsockname()[0]  # as others reach it too
        host, port = start.host, start.port
        if port:
            self._spawn_here(None, (host, port))
        else:
            with Listener(address, env.rendezvous_port()) as listener:
                host, port = listener.host, listener.port
                self._spawn_here(None, (host, port), listener)
            self._link.send(Meeting(host, port))
        _log.info(
            "%s: %s; at %s (%s), the leader at %s, ranks meet at port %d of %s",
            *(self.name, rank_list(self.plan.ranks), address, net.interface_of(address), self._link.socket.getpeername()[0]),
            *(port, host),
        )

    def _give(self) -> None:
        """Hand orders to the ranks, as far as they have room."""
        while self._orders:
            try:
                self.queue.enqueue(self._orders[0], 0.0)
            except TimeoutError:
                return
            except QueueClosed:  # a rank is dead: its end says more
                self._orders.clear()
                return
            self._orders.popleft()

    def _replied(self, worker: WorkerProcess, data: bytes) -> None:
        self._link.send(Replied(worker.rank, data))

    def _said(self, worker: WorkerProcess, data: bytes) -> None:
        self._link.send(Said(worker.rank, data))

    def _tell_ends(self) -> None:
        for worker in self.local:
            code = worker.exit_code()
            if code is None or worker.rank in self._reported:
                continue
            self._reported.add(worker.rank)
            self._unregister(worker.pid_fd)
            self._drain(worker)
            self._link.send(self._beat())  # where it was
            self._link.send(Ended(worker.rank, code, self._out_of_memory()))

    def _let_leave(self) -> None:
        """It is over in good order: ranks that are on their way out may finish."""
        until = time.monotonic() + LEAVE_S
        while self._reported and time.monotonic() < until and any(w.exit_code() is None for w in self.local):
            time.sleep(0.01)


@contextmanager
def _signals() -> Iterator[None]:
    """SIGINT and SIGTERM raise Interrupted, in the main thread."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def interrupt(number: int, _: FrameType | None) -> None:
        raise Interrupted(number)

    before = {number: signal.signal(number, interrupt) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
