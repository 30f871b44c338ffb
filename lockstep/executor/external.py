"""One rank of many, in a process that a launcher (torchrun) started: every rank runs the same engine over its own worker.

All engines are given the same requests in the same order, so they make the same plans, and none needs to be sent. A step's
result goes from the output rank to the others (`relay`); what ranks must agree on is gathered on all of them.
"""

from __future__ import annotations

import contextlib
import hashlib
import os
import socket
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from lockstep.config import launcher
from lockstep.config.errors import ConfigError
from lockstep.config.model_spec import ModelSpec
from lockstep.config.tree import EngineConfig
from lockstep.config.validate import settings
from lockstep.executor import failure, wire
from lockstep.executor.affinity import plan_here
from lockstep.executor.causes import Causes, is_echo
from lockstep.executor.contract import ExecutorError, StepFuture
from lockstep.executor.in_process import InProcessExecutor
from lockstep.executor.join import Membership
from lockstep.executor.relay import Relay, ResultTimeout
from lockstep.executor.worker_loop import call_worker, leave, raised_answer, worker_class
from lockstep.observability.timeline import Timeline
from lockstep.protocol import StepPlan
from lockstep.utils.cores import keep_on

FLUSH_S = 5.0  # at the end, for the other ranks to take the last results
# What may differ between ranks: where the model lies on each host, and how a rank computes.
_OWN = {"model", "tokenizer", "data_parallel_rank", "threads_per_rank", "cpu_binding", "log_level"}
_DIFFER = " differ: rank "  # so say communicators whose ranks bring sizes that do not fit
_ALIKE = "all ranks of a replica must be given the same prompts, parameters and settings, in the same order"


class ExternalLauncherExecutor(InProcessExecutor):
    """See `Executor`. Ranks are numbered within the replica; each method is called on all of them, in the same order.

    Steps and calls run on the caller's thread. A wait for another rank ends after distributed_timeout_seconds. The process is
    bound to its share of the cores until `shutdown`.
    """

    def __init__(self, config: EngineConfig, spec: ModelSpec, folder: Path, *, worker_cls: str) -> None:
        """Meets the other ranks; returns when all have loaded. Raises ConfigError for an environment that does not fit."""
        super().__init__()
        parallel, place = config.parallel, launcher.place(config.parallel)
        self.max_concurrent_batches = parallel.pipeline_parallel_size
        self._rank, self._number = place.rank % parallel.world_size, 0
        self._causes: Causes | None = None
        self._replica: Any = None
        self._relay: Relay | None = None
        self._cores = os.sched_getaffinity(0) if hasattr(os, "sched_getaffinity") else set()
        share = plan_here(place.local_world_size, replace(parallel, data_parallel_rank=None))[place.local_rank]
        self._membership: Membership | None = None
        try:
            self._membership = self._join(config, place)
            groups = self._membership.groups
            self._replica, self._causes = groups.replica, Causes(groups, Membership.lives, self._membership.spared)
            self._check_alike(config)
            self._compares = parallel.check_collectives and self._replica.world_size > 1
            output_rank = parallel.world_size - parallel.stage_size
            limit_s = parallel.distributed_timeout_seconds
            self._relay = Relay(self._replica, output_rank, self.max_concurrent_batches, limit_s, self._ending)
            with self._ending("init"):
                keep_on(share.cores)  # after the groups, whose threads must run while this one computes on its core
                cls = worker_class(worker_cls)
                self._worker = cls(config, spec, Path(folder), self._rank, place.local_rank, groups, None)
                self._worker.init_device(share, own_process=True)
            with self._ending("load"):
                self._worker.load_model()
                self._replica.all_gather_objects("loaded")  # nobody runs a step that another rank will not come to
        except BaseException:
            self.shutdown()
            raise

    def execute_model(self, plan: StepPlan) -> StepFuture:
        self.check_health()
        assert self._relay is not None
        self._number += 1
        with self._ending(f"step {plan.step}"):
            if self._compares:
                self._check_plan(plan)
            with self.timeline.span("run step", "engine", plan.step):
                timeline: Timeline = self._worker.timeline
                timeline.enter(plan.step)
                future = self._relay.hand_over(plan.step, self._worker.execute_model(plan))
                leave(timeline, plan, "result")
            return future

    def collective_rpc(
        self, method: str, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None, timeout: float | None = None
    ) -> list[Any]:
        """See `Executor`; `timeout` does not interrupt a worker's method."""
        call = self._call(self._number + 1, method, args, kwargs)
        assert self._causes is not None
        self._number += 1
        mine = call_worker(self._worker, call)
        if isinstance(mine, wire.Raised):
            self._causes.tell(mine)  # others may be inside a collective of this very call
        with self._ending(f"call {method}"):
            gathered = self._replica.all_gather_objects([method, wire.encode_value(mine)])
            self._check_equal([name for name, _ in gathered], "called")
        answers = [wire.decode_answer(data) for _, data in gathered]
        raised = [(rank, a) for rank, a in enumerate(answers) if isinstance(a, wire.Raised)]
        if raised:
            raised.sort(key=lambda found: is_echo(found[1]))
            raise failure.raised(*raised[0])
        return [wire.decode_value(a.value) for a in answers if isinstance(a, wire.CallDone)]

    def shutdown(self) -> None:
        relay, self._relay = self._relay, None
        if self._error is None and relay is not None:
            with contextlib.suppress(Exception):
                relay.flush(FLUSH_S)
        super().shutdown()
        membership, self._membership = self._membership, None
        if self._causes is not None:
            self._causes.close()
        self._causes, self._replica = None, None  # sockets close with the last reference to their group
        if membership is not None:
            with contextlib.suppress(Exception):
                membership.leave()
        cores, self._cores = self._cores, set()
        keep_on(cores)

    def _join(self, config: EngineConfig, place: launcher.Place) -> Membership:
        with self._ending("rendezvous", ConfigError):
            return Membership(config, place)

    def _check_alike(self, config: EngineConfig) -> None:
        """Raises ConfigError, on every rank, for the first setting in which they differ. Where they are is noted."""
        mine = [[name, repr(value)] for name, _, value in settings(config) if name not in _OWN]
        with self._ending("init"):
            everyone = self._replica.all_gather_objects([socket.gethostname(), mine])
        if self._causes is not None:
            self._causes.hosts = [host for host, _ in everyone]
        for rank, (_, theirs) in enumerate(everyone):
            for (name, first), (_, value) in zip(everyone[0][1], theirs, strict=True):
                if first != value:
                    raise ConfigError(f"{name} is {first} on rank 0 and {value} on rank {rank}: {_ALIKE}.")

    def _check_plan(self, plan: StepPlan) -> None:
        """Compare the plan with the other ranks'."""
        digest = hashlib.blake2b(wire.encode_value(plan), digest_size=8).hexdigest()
        words = f"step {plan.step} of {sum(plan.num_tokens)} tokens of {len(plan.slots)} requests ({len(plan.new)} new), plan {digest}"
        self._check_equal(self._replica.all_gather_objects(words), "planned")

    def _check_equal(self, everyone: list[str], verb: str) -> None:
        """Fail, naming the rank that differs from most."""
        usual = Counter(everyone).most_common(1)[0][0]
        for rank, words in enumerate(everyone):
            if words != usual:
                text = f"rank {rank} {verb} {words}, but rank {everyone.index(usual)} {verb} {usual}: {_ALIKE}."
                raise ExecutorError(text, rank=rank, kind="raised", error_type="Divergence")

    @contextlib.contextmanager
    def _ending(self, phase: str, *allowed: type[Exception]) -> Iterator[None]:
        """An exception inside ends the executor: told to the other ranks, and raised as the ExecutorError of the rank to blame.

        Not so those of type `allowed`, nor the end of the caller's own patience.
        """
        self.check_health()
        try:
            yield
        except (ResultTimeout, *allowed):
            raise
        except Exception as e:
            self._fail(phase, e)

    def _fail(self, phase: str, cause: Exception) -> None:
        error = cause if isinstance(cause, ExecutorError) else self._blame(phase, cause)
        self._break(error)
        raise error from (None if error is cause else cause)

    def _blame(self, phase: str, cause: Exception) -> ExecutorError:
        """The error of the rank that is at the bottom of an exception here."""
        answer = raised_answer(self._number, phase, cause, fatal=True)
        if _DIFFER in answer.message:
            answer.message += f" Either way, {_ALIKE}; check_collectives=True says what differs."
        return failure.raised(self._rank, answer) if self._causes is None else self._causes.explain(answer)
