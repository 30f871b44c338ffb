"""An app whose model writes what the test says: the real routes over an engine that plays a text, token by token."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import time
from collections.abc import Iterable
from typing import Any, cast

import httpx

from lockstep.config.build import build_config
from lockstep.config.serve import ServeOptions
from lockstep.config.validate import resolve
from lockstep.engine.stats import EngineStats
from lockstep.frontend.async_engine import AsyncEngine
from lockstep.frontend.collector import Collector
from lockstep.frontend.inputs import InputProcessor, Job
from lockstep.frontend.streams import Stream, submitted
from lockstep.frontend.tokenizer import load_tokenizer
from lockstep.protocol import EngineOutput, SamplingParams
from lockstep.server.app import create_app
from lockstep.server.state import ServerState


class ScriptedEngine:
    """Plays `text` for every choice. error: fails with this after the text. hangs: never ends by itself."""

    failure = observer = None
    index = 0

    def __init__(self, text: str, *, error: str | None = None, hangs: bool = False) -> None:
        self.config, self.spec, self.folder = resolve(build_config(max_model_len=2048))
        self.tokenizer = load_tokenizer(self.folder)
        self.text, self.error, self.hangs = text, error, hangs
        self.jobs: list[Job] = []
        self.aborted: list[str] = []
        self._streams: dict[str, tuple[Stream, Job]] = {}
        self._inputs = InputProcessor(self.config, self.spec, self.folder, self.tokenizer)
        self._collector = Collector(self.tokenizer)

    async def job(self, prompt: Any, sampling: SamplingParams, *, priority: int = 0, **options: Any) -> Job:
        self.jobs.append(self._inputs.job(prompt, sampling, request_id=str(len(self.jobs)), arrival_s=time.monotonic()))
        return self.jobs[-1]

    async def submit(self, job: Job) -> Stream:
        stream = Stream()
        self._streams[job.request_id] = stream, job
        if (noted := submitted.get()) is not None:
            noted.append(job.request_id)
        self._collector.start(job)
        ids = self.tokenizer(self.text)["input_ids"]
        for at, token in enumerate(ids):
            self._put(stream, job, [token], "stop" if at == len(ids) - 1 and not self.error and not self.hangs else None)
        if self.error:
            self._put(stream, job, [], "error")
        return stream

    def _put(self, stream: Stream, job: Job, tokens: list[int], reason: Any) -> None:
        # a stop token is not text: it stands after the last one
        tokens = [*tokens, 0] if reason == "stop" else tokens
        news = [EngineOutput(request_id=r.request_id, new_token_ids=tokens, finish_reason=reason, error=self.error) for r in job.requests]
        for output in self._collector.take(news)[0]:
            stream.put(output)

    async def abort(self, names: Iterable[str]) -> None:
        for name in names:
            self.aborted.append(name)
            if name in self._streams:
                self._put(*self._streams[name], [], "abort")  # of which the collector makes nothing where it has ended

    async def stats(self) -> EngineStats:
        return EngineStats(**dict.fromkeys(EngineStats.__struct_fields__, 1))


class Scripted:
    """`with_text(...)` and then `post`, as a client would."""

    def __init__(self, text: str, *, error: str | None = None, hangs: bool = False, **options: Any) -> None:
        self.engine = ScriptedEngine(text, error=error, hangs=hangs)
        state = ServerState(dataclasses.replace(ServeOptions(), **options), cast(AsyncEngine, self.engine), ["scripted"])
        self.app = create_app(state)

    def post(self, path: str, **body: Any) -> httpx.Response:
        async def call() -> httpx.Response:
            transport = httpx.ASGITransport(self.app, raise_app_exceptions=False)
            async with httpx.AsyncClient(transport=transport, base_url="http://test") as client:
                return await client.post(path, json=body)

        return asyncio.run(asyncio.wait_for(call(), 60))

    def chat(self, **body: Any) -> dict[str, Any]:
        answer = self.post("/v1/chat/completions", messages=[{"role": "user", "content": "hi"}], **body)
        assert answer.status_code == 200, answer.text
        return dict(answer.json())

    def chat_events(self, **body: Any) -> list[dict[str, Any]]:
        answer = self.post("/v1/chat/completions", messages=[{"role": "user", "content": "hi"}], stream=True, **body)
        assert answer.status_code == 200, answer.text
        blocks = answer.text.split("\n\n")
        assert blocks[-2:] == ["data: [DONE]", ""]
        return [json.loads(b.removeprefix("data: ")) for b in blocks[:-2]]
