"""Structured outputs as an API process asks for them: compiled beside its event loop, refused at the door, ended with reasons."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import pytest

from lockstep import SamplingParams, StructuredOutputs
from lockstep.config.build import build_config
from lockstep.config.validate import resolve
from lockstep.frontend import structured
from lockstep.frontend.async_engine import AsyncEngine
from lockstep.frontend.engine_handle import EngineHandle
from lockstep.frontend.errors import PromptError
from lockstep.frontend.outputs import RequestOutput
from lockstep.frontend.tokenizer import load_tokenizer
from tests.parity.structured_cases import CASES, check, params


@asynccontextmanager
async def connected() -> AsyncIterator[AsyncEngine]:
    config, spec, folder = resolve(build_config(tensor_parallel_size=2, max_model_len=160, device="cpu", cpu_binding=False))
    handle = EngineHandle(config, spec, folder)
    try:
        await asyncio.to_thread(handle.wait)
        engine = AsyncEngine(handle.endpoint, handle.secret, spec, folder, load_tokenizer(folder))
        await engine.connect()
        yield engine
        await engine.close()
    finally:
        handle.close()


async def finished(engine: AsyncEngine, wanted: SamplingParams) -> RequestOutput:
    *_, last = [output async for output in engine.generate("{", wanted)]
    assert last.finished
    return last


def test_an_engine_behind_its_door(monkeypatch: pytest.MonkeyPatch) -> None:
    """One engine for all of it: each takes seconds to start."""
    compiled_on: list[str] = []
    real = structured.check

    def slow(wanted: StructuredOutputs) -> None:
        compiled_on.append(threading.current_thread().name)
        if wanted.regex == "slow":
            time.sleep(0.3)
        real(wanted)

    monkeypatch.setattr("lockstep.frontend.structured.check", slow)

    async def tell() -> None:
        async with connected() as engine:
            outputs = await asyncio.gather(*(finished(engine, params(name, temperature=0, max_tokens=140)) for name in CASES))
            assert sum(check(name, output) for name, output in zip(CASES, outputs, strict=True)) > len(CASES) // 2
            with pytest.raises(PromptError, match="structured_outputs cannot be kept to"):
                await engine.job("a", SamplingParams(structured_outputs=StructuredOutputs(regex="(a")))
            assert await beats_while(engine.job("a", SamplingParams(structured_outputs=StructuredOutputs(regex="slow")))) > 3
            wrong = SamplingParams(structured_outputs=StructuredOutputs(grammar="start: <|nobody-knows|>"))
            bad, good = await asyncio.gather(finished(engine, wrong), finished(engine, params("choice")))
            assert bad.outputs[0].finish_reason == "error" and "nobody-knows" in str(bad.error)
            assert check("choice", good) and engine.failure is None and engine.unfinished == 0

    asyncio.run(tell())
    assert compiled_on and all(name.startswith("grammars") for name in compiled_on)


async def beats_while(work: Any) -> int:
    """How often the event loop came round while something was awaited."""
    task, beats = asyncio.ensure_future(work), 0
    while not task.done():
        await asyncio.sleep(0.01)
        beats += 1
    await task
    return beats
