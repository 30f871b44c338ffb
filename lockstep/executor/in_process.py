"""What executors have in common whose worker is in the caller's own process: it runs on the caller's thread."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import Any

import msgspec

from lockstep.executor import wire
from lockstep.executor.contract import Executor, ExecutorError, RankMemory
from lockstep.observability.timeline import Timeline


class InProcessExecutor(Executor):
    """See `Executor`. The subclass makes `_worker`, and gives `_break` the error that ends it."""

    def __init__(self) -> None:
        self.timeline = Timeline()
        self._worker: Any = None
        self._error: ExecutorError | None = None
        self._callbacks: list[Callable[[ExecutorError], None]] = []

    def memory(self) -> list[RankMemory]:
        return msgspec.convert(self.collective_rpc("memory"), list[RankMemory])

    def initialize_kv_cache(self, num_blocks: int) -> None:
        self.collective_rpc("initialize_kv_cache", (num_blocks,))

    def check_health(self) -> None:
        if self._error is not None:
            raise self._error

    def register_failure_callback(self, callback: Callable[[ExecutorError], None]) -> None:
        if self._error is None:
            self._callbacks.append(callback)
        elif self._error.kind != "shutdown":
            callback(self._error)

    def shutdown(self) -> None:
        if self._error is None:
            self._error = ExecutorError("the executor was shut down", kind="shutdown")
        worker, self._worker = self._worker, None
        if hasattr(worker, "shutdown"):
            with contextlib.suppress(Exception):
                worker.shutdown()

    def _call(self, number: int, method: str, args: Sequence[Any], kwargs: dict[str, Any] | None) -> wire.Call:
        """A call as a worker in another process would get it: what works here works there, and nothing mutable is shared."""
        if method.startswith("_"):
            raise ValueError(f"method={method!r} is private to the worker: call a public one.")
        self.check_health()
        call = wire.decode_order(wire.encode_order(wire.Call(number, method, list(args), dict(kwargs or {}))))
        assert isinstance(call, wire.Call)
        return call

    def _break(self, error: ExecutorError) -> None:
        """It is over: tell those who asked for it."""
        self._error = error
        callbacks, self._callbacks = self._callbacks, []
        for callback in callbacks:
            with contextlib.suppress(Exception):
                callback(error)
