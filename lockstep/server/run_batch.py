"""`lockstep run-batch` from its settings to its end: a file's requests to a whole server in this process, which nobody else can ask.

    lines of the file  ->  so many workers  ->  middleware and routes  --ZeroMQ-->  the engine's process
                           so many workers  ->  one writer  ->  the part file, line by line

Answers are written in the order in which they are done: what is done is out, whatever happens then, and nothing waits for a slow line.

SIGINT, SIGTERM           what runs is ended, and the exit code is 128 + its number; a second one ends the process
the engine is gone        ExecutorError; no answer tells of it
"""

from __future__ import annotations

import asyncio
import contextlib
import signal
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec
import uvloop
from starlette.types import ASGIApp
from tqdm import tqdm

from lockstep.config.endpoint import check_folder, check_options
from lockstep.config.errors import ConfigError
from lockstep.config.serve import BatchOptions
from lockstep.config.source import tokenizer_folder
from lockstep.config.tree import EngineConfig
from lockstep.config.validate import resolve
from lockstep.executor.contract import ExecutorError
from lockstep.frontend.engine_handle import CLIENT
from lockstep.frontend.engine_keeper import EngineKeeper
from lockstep.observability import logging
from lockstep.server.app import create_app
from lockstep.server.batch_file import PIPE, Ask, BatchInput, BatchOutput, Refused, Response, Result, result_of
from lockstep.server.inside import post
from lockstep.server.launch import check_chat_template, model_names, state_over
from lockstep.server.launch_serving import Failure, connect, until_dead
from lockstep.server.processes import connect_limit_s
from lockstep.server.state import ServerState
from lockstep.utils.interrupt import heard, terminable
from lockstep.utils.words import counted

AHEAD = 2  # requests under way for each that the engine runs: the next is ready when one ends


def run_batch(config: EngineConfig, options: BatchOptions, *, client: str = CLIENT) -> int:
    """Answer the file; the exit code. Raises ConfigError, ExecutorError when the engine cannot start or go on, BrokenPipeError."""
    logging.configure(config.runtime.log_level)
    given, told = _files(options)
    serving = options.served()
    check_chat_template(serving)
    serving = check_options(serving)
    check_folder("incident_dir", config.runtime.incident_dir, 0o700)
    serving.api_key = []  # the environment's are for strangers
    with BatchInput(given) as lines, BatchOutput(told) as out:
        config, spec, folder = resolve(config)
        with terminable(), contextlib.closing(EngineKeeper(config, spec, folder, client=client)) as keeper:
            words = tokenizer_folder(config.model, folder)
            state = state_over(keeper, serving, spec, folder, words, model_names(config, serving))
            run = BatchRun(state, create_app(state), lines, out, most=options.max_concurrency, quiet=options.quiet)
            try:
                with asyncio.Runner(loop_factory=uvloop.new_event_loop) as runner:
                    runner.run(_run(run, state, keeper.failure, connect_limit_s(config)))
            finally:
                if run.whole:
                    out.finish()
                _say(run, out, options.quiet)
        assert run.whole or run.signalled, "a run that was not stopped has answered every line"
    return 0 if run.whole else 128 + run.signalled


def _files(options: BatchOptions) -> tuple[str, str]:
    """The names of both files. Raises ConfigError."""
    given, told, most = options.input_file, options.output_file, options.max_concurrency
    if not given or not told:
        missing = "input_file" if not given else "output_file"
        raise ConfigError(f"{missing} is not set: name the file of requests (-i) and the one for the answers (-o), or - for a pipe.")
    if PIPE not in (given, told) and Path(given).resolve() == Path(told).resolve():
        raise ConfigError(f"output_file={told!r} is the input_file too: its requests would be lost; give another one.")
    if most is not None and most < 1:
        raise ConfigError(f"max_concurrency={most} is impossible: it must be at least 1.")
    return given, told


async def _run(run: BatchRun, state: ServerState, failure: Failure, limit_s: float) -> None:
    """Until all is answered, or a signal comes."""
    loop, told = asyncio.get_running_loop(), heard()

    def stop(number: int) -> None:
        run.stop(number)
        for one in told:  # the next does what it would do to any process
            loop.remove_signal_handler(one)
            signal.signal(one, signal.SIG_DFL)

    for number in told:
        loop.add_signal_handler(number, stop, number)
    if await connect(state.engine, limit_s, failure, lambda: bool(run.signalled)):
        try:
            await run.until_done(failure)
        finally:
            await state.engine.close()


class BatchRun:
    """The lines of one file on their way. `done` are written, `wrong` of them are not the answer that was asked for."""

    def __init__(
        self, state: ServerState, app: ASGIApp, given: BatchInput, out: BatchOutput, *, most: int | None = None, quiet: bool = False
    ) -> None:
        self._state, self._app, self._given, self._out, self._most = state, app, given, out, most
        self._results: asyncio.Queue[tuple[Result, asyncio.Future[None]] | None] = asyncio.Queue()
        self._stopped, self.signalled = asyncio.Event(), 0
        self.done, self.wrong = 0, 0
        self._quiet = quiet

    @property
    def count(self) -> int:
        return self._given.count

    @property
    def whole(self) -> bool:
        """Whether every line has been answered."""
        return self.done == self.count

    def stop(self, number: int) -> None:
        """End early, because of a signal of this number."""
        self.signalled = number
        self._stopped.set()

    async def until_done(self, failure: Failure) -> None:
        """Answer every line, or until stopped. Whatever it ends by, results that are there are written.

        Raises ExecutorError when the engine is gone, and as `BatchOutput.write`.
        """
        lines = self._given.lines()
        most = min(self.count, self._most or AHEAD * self._state.admission.bounds.running)
        writer = asyncio.create_task(self._write(), name="writer")
        workers = [asyncio.create_task(self._work(lines), name=f"worker {i}") for i in range(most)]
        stops = [asyncio.create_task(self._stopped.wait()), asyncio.create_task(until_dead(self._state.engine, failure))]
        ends: list[asyncio.Future[Any]] = [asyncio.gather(*workers), *stops]
        await asyncio.wait([writer, *ends], return_when=asyncio.FIRST_COMPLETED)
        for task in (*workers, *stops):
            task.cancel()
        outcomes = await asyncio.gather(*ends, *workers, return_exceptions=True)
        self._results.put_nowait(None)
        await writer
        if self._state.engine.failure is not None:
            raise ExecutorError(str(self._state.engine.failure))
        for outcome in outcomes:
            if isinstance(outcome, Exception):
                raise outcome

    async def _work(self, lines: Iterator[Ask | Refused]) -> None:
        for asked in lines:
            response = None
            if isinstance(asked, Ask):
                answer = await post(self._app, asked.url, bytes(asked.body))
                if self._state.engine.failure is not None:
                    return  # the run's end, not the line's answer
                response = Response(answer.status, answer.request_id, msgspec.Raw(answer.body))
            written = asyncio.get_running_loop().create_future()
            self._results.put_nowait((result_of(asked, response), written))
            await written  # nothing more is begun for a reader who does not come along

    async def _write(self) -> None:
        """Beside the event loop: whoever reads a pipe may be slow, and the engine must be listened to."""
        with tqdm(total=self.count, desc="Requests", unit="req", dynamic_ncols=True, disable=self._quiet or None) as bar:
            while (found := await self._results.get()) is not None:
                result, written = found
                await asyncio.to_thread(self._out.write, result)
                self.done, self.wrong = self.done + 1, self.wrong + result.wrong
                bar.update()
                if not written.done():  # its worker is there
                    written.set_result(None)


def _say(run: BatchRun, out: BatchOutput, quiet: bool) -> None:
    if quiet:
        return
    what = f"{counted(run.done, 'line')} answered" if run.whole else f"ended early: {run.done} of {counted(run.count, 'line')} answered"
    wrong = f", {run.wrong} of them with an error" if run.wrong else ""
    print(f"{what}{wrong}{f', in {out.where}' if run.done else ''}", file=sys.stderr, flush=True)
