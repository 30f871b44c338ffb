"""Engine outputs on their way out: gathered by the caller's request, as text."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

import msgspec

from lockstep.frontend.completion import Completion
from lockstep.frontend.detokenizer import Detokenizer
from lockstep.frontend.inputs import Job
from lockstep.frontend.outputs import RequestOutput, position
from lockstep.frontend.tokenizer import decoder_of, special_ids
from lockstep.protocol import EngineOutput, EngineRequest, RequestOutputKind


@dataclass
class _Running:
    job: Job
    completions: list[Completion]
    result: RequestOutput  # what is common to all outputs of the request; `outputs` is filled per output

    @property
    def finished(self) -> bool:
        return all(c.output.finished for c in self.completions)


class Collector:
    """Turns engine outputs into RequestOutputs, as each request's `output_kind` asks. One per engine."""

    def __init__(self, tokenizer: Any) -> None:
        self._decode = {skip: decoder_of(tokenizer, skip) for skip in (True, False)}
        self._special = special_ids(tokenizer)
        self._text_of = lru_cache(maxsize=8192)(lambda token: self._decode[False]([token]))
        self._running: dict[str, tuple[_Running, int]] = {}  # engine request id -> (request, choice); gone once finished

    def start(self, job: Job) -> None:
        """Expect the outputs of a job's requests."""
        completions = [Completion(i, job.sampling, self._detokenizer(job), self._text_of) for i in range(job.sampling.n)]
        result = RequestOutput(job.request_id, job.prompt, job.prompt_token_ids, [])
        running = _Running(job, completions, result)
        self._running.update({request.request_id: (running, i) for i, request in enumerate(job.requests)})

    def resumed(self, job: Job) -> list[EngineRequest]:
        """The job's requests that have not ended, with what came of each: as another engine has to be given them."""
        return [
            msgspec.structs.replace(request, output_token_ids=list(self._running[request.request_id][0].completions[i].output.token_ids))
            for i, request in enumerate(job.requests)
            if request.request_id in self._running
        ]

    def forget(self, request_ids: Iterable[str]) -> None:
        """Drop engine requests; what the engine still says of them is ignored."""
        for request_id in request_ids:
            self._running.pop(request_id, None)

    def take(self, news: Iterable[EngineOutput]) -> tuple[list[RequestOutput], list[str]]:
        """(outputs to give to the callers, engine requests to abort because a stop string ended them)."""
        touched: dict[str, _Running] = {}
        abort: list[str] = []
        for output in news:
            if output.request_id not in self._running:
                continue  # ended here by a stop string, or forgotten, while a step was under way
            running, choice = self._running[output.request_id]
            completion = running.completions[choice]
            if completion.take(output):
                abort.append(output.request_id)
            if completion.output.finished:
                del self._running[output.request_id]
            self._note(running.result, output)
            touched[running.job.request_id] = running
        outputs = (self._output(running) for running in touched.values())
        return [o for o in outputs if o is not None], abort

    def _note(self, result: RequestOutput, output: EngineOutput) -> None:
        if output.prompt_logprobs is not None:
            result.prompt_logprobs = [None, *(position(p, self._text_of) for p in output.prompt_logprobs)]
        result.num_cached_tokens = max(result.num_cached_tokens, output.num_cached_tokens)
        result.error = output.error or result.error
        result.embedding = output.embedding or result.embedding

    def _output(self, running: _Running) -> RequestOutput | None:
        kind, done, common = running.job.sampling.output_kind, running.finished, running.result
        if kind == RequestOutputKind.FINAL_ONLY:
            shown = [c.output for c in running.completions] if done else []
        elif kind == RequestOutputKind.DELTA:
            shown = [d for c in running.completions if (d := c.delta()) is not None]
        else:
            shown = [c.snapshot() for c in running.completions]
        if not shown:
            return None
        return RequestOutput(
            common.request_id,
            common.prompt,
            common.prompt_token_ids,
            shown,
            done,
            common.prompt_logprobs,
            common.num_cached_tokens,
            common.error,
            common.embedding,
        )

    def _detokenizer(self, job: Job) -> Detokenizer | None:
        if not job.sampling.detokenize:
            return None
        skip = job.sampling.skip_special_tokens
        return Detokenizer(self._decode[skip], context=job.prompt_token_ids[-64:], skip=self._special if skip else frozenset())
