"""What a rank does with an order, whichever way the order came."""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable
from typing import Any

import msgspec

from lockstep.distributed.message_queue import MessageQueue, MessageReader
from lockstep.distributed.progress import ProgressCell
from lockstep.executor import wire
from lockstep.executor.fault import Fault
from lockstep.observability.timeline import Timeline, now_s
from lockstep.protocol import StepPlan

TRACEBACK_CHARS = 16_000
_PHASE_OF_CALL = {"initialize_kv_cache": "warm-up"}


def worker_class(name: str) -> Any:
    """The class that "module:Class" names."""
    module, _, attribute = name.partition(":")
    return getattr(importlib.import_module(module), attribute)


def raised_answer(number: int, phase: str, error: BaseException, *, fatal: bool) -> wire.Raised:
    """An exception as an answer."""
    trace = "".join(traceback.format_exception(error))[-TRACEBACK_CHARS:]
    return wire.Raised(number, phase, type(error).__name__, str(error), trace, fatal)


def call_worker(worker: Any, call: wire.Call) -> wire.CallDone | wire.Raised:
    """Call a method of the worker. An exception, also one in encoding the result, fails this call only."""
    phase = f"call {call.method}"
    try:
        value = getattr(worker, call.method)(*call.args, **call.kwargs)
    except Exception as e:
        return raised_answer(call.id, phase, e, fatal=False)
    try:
        return wire.CallDone(call.id, msgspec.Raw(wire.encode_value(value)))
    except Exception as e:
        e.add_note(f"{call.method} returned {type(value).__name__}, which is not plain data: return numbers, strings, lists, dicts.")
        return raised_answer(call.id, phase, e, fatal=False)


def leave(timeline: Timeline, plan: StepPlan, last: str) -> None:
    """The step of `plan` has ended, and `last` was its last part."""
    if timeline.on:
        timeline.lap(last)
        timeline.leave(requests=len(plan.slots), tokens=sum(plan.num_tokens))


class WorkerLoop:
    """Takes orders until told to stop."""

    def __init__(
        self,
        worker: Any,
        queue: MessageReader,
        cell: ProgressCell,
        reply: Callable[[wire.Answer], None],
        fault: Fault,
        results: MessageQueue | None,
        reports: bool,
    ) -> None:
        """reports: this is the output rank, whose step results go back: through `results`, else as any other answer."""
        self._worker, self._queue, self._cell, self._reply, self._fault = worker, queue, cell, reply, fault
        self._results, self._reports = results, reports

    def run(self) -> None:
        """Raises QueueClosed when the driver goes away. An exception in a step is answered, then raised again."""
        timeline: Timeline = self._worker.timeline
        while True:
            self._cell.set(phase="idle")
            with timeline.span("wait for the engine", "idle"):
                message = self._queue.dequeue()
            received_s = now_s()
            order = wire.decode_order(message)
            if isinstance(order, wire.Step):
                self._step(order, received_s)
            elif isinstance(order, wire.Call):
                self._cell.set(phase=_PHASE_OF_CALL.get(order.method, f"call {order.method}"))
                self._fault.strike("call")
                self._reply(call_worker(self._worker, order))
            else:
                return

    def _step(self, order: wire.Step, received_s: float) -> None:
        plan, timeline = order.plan, self._worker.timeline
        timeline.enter(plan.step, received_s)
        self._cell.set(phase="step", step=plan.step)
        try:
            self._fault.strike_step(plan)
            timeline.lap("receive")
            result = self._worker.execute_model(plan)
            if self._reports:
                assert result is not None, "the output rank's execute_model returned nothing"
                self._report(wire.StepDone(order.id, result))
            self._cell.times.stepped(int(1e9 * (now_s() - received_s)))
            leave(timeline, plan, "reply")
        except Exception as e:
            self._reply(raised_answer(order.id, f"step {plan.step}", e, fatal=True))
            raise

    def _report(self, answer: wire.StepDone) -> None:
        if self._results is None:
            return self._reply(answer)
        try:
            self._results.enqueue(wire.encode_value(answer), 0.0)
        except TimeoutError:  # nobody has fetched results for a while
            self._reply(answer)
