"""Offline inference: the shortest complete path from a prompt to its completion. Read this file first.

config -> resolve -> client (ranks start, load the model; one engine here, or replicas) -> step, step, step -> text

>>> with LLM("my-model", tensor_parallel_size=2) as llm:
...     for output in llm.generate(["Hello,", "def add("], SamplingParams(temperature=0)):
...         print(output.prompt, output.outputs[0].text)
"""

from __future__ import annotations

import time
import weakref
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future
from types import TracebackType
from typing import Any, get_args

import msgspec

from lockstep.cluster.factory import make_client
from lockstep.config.build import build_config
from lockstep.config.defaults import default_backend
from lockstep.config.source import tokenizer_folder
from lockstep.config.tree import RuntimeConfig
from lockstep.config.validate import resolve
from lockstep.engine.stats import EngineStats
from lockstep.executor.contract import ExecutorError, RankMemory
from lockstep.frontend.chat import Conversation, conversations, render
from lockstep.frontend.collector import Collector
from lockstep.frontend.embedding import NO_TEXT, EmbeddingOutput, EmbeddingRequestOutput, check_dimensions, finish
from lockstep.frontend.errors import PromptError
from lockstep.frontend.inputs import InputProcessor, Job
from lockstep.frontend.outputs import RequestOutput
from lockstep.frontend.progress import Progress
from lockstep.frontend.prompts import Prompt, named
from lockstep.frontend.tokenizer import load_in_background, load_tokenizer
from lockstep.observability import logging
from lockstep.observability.trace import Profile
from lockstep.protocol import Pooling, RequestOutputKind, SamplingParams

log = logging.get_logger(__name__)
Params = SamplingParams | Sequence[SamplingParams] | None


class LLM:
    """One model on this machine, split over its ranks. For use from one thread."""

    def __init__(self, model: str = "", *, tensor_parallel_size: int = 1, **settings: Any) -> None:
        """Start the ranks and load the model; `settings` are the fields of `lockstep.config.tree`, by name.

        Raises TypeError for an unknown setting, ConfigError (a ValueError) for an impossible one, ExecutorError when a
        rank does not start.
        """
        self.config, self.spec, self.folder = resolve(build_config(model=model, tensor_parallel_size=tensor_parallel_size, **settings))
        if self.config.runtime.log_level != RuntimeConfig().log_level:  # else the program's own logging is left alone
            logging.configure(self.config.runtime.log_level)
        words = tokenizer_folder(self.config.model, self.folder)
        parallel = self.config.parallel
        here = parallel.replicas_served == 1 and default_backend(parallel) in ("uni", "external_launcher")
        tokenizer: Future[Any] = load_in_background(lambda: load_tokenizer(words), "torch" if here else "")  # while the ranks start
        self._client = make_client(self.config, self.spec, self.folder)
        self._finalizer = weakref.finalize(self, self._client.shutdown)  # also at exit
        try:
            self._tokenizer = tokenizer.result()
        except BaseException:
            self._finalizer()
            raise
        self.config = self._client.config
        log.info("%s", self._client.memory.describe())
        self._inputs = InputProcessor(self.config, self.spec, self.folder, self._tokenizer)
        self._collector = Collector(self._tokenizer)
        self._running = self._asleep = False

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        sampling_params: Params = None,
        use_tqdm: bool = True,
        priority: Sequence[int] | None = None,
        *,
        data_parallel_rank: int | Sequence[int] | None = None,
        session_id: str | Sequence[str] | None = None,
    ) -> list[RequestOutput]:
        """Complete every prompt; the outputs in the prompts' order.

        A prompt is text, a list of token ids, or a dict with `prompt` or `prompt_token_ids`. `sampling_params`: one for
        all, or one per prompt. `priority`: per prompt, lower first, under scheduling_policy="priority". With replicas, and
        for all or per prompt: `data_parallel_rank` names the replica, `session_id` keeps those of one session together. Raises
        ValueError, before anything runs, when one of them cannot; ExecutorError when a rank fails in the middle.
        """
        jobs = self._jobs(prompts, sampling_params, RequestOutputKind.FINAL_ONLY, priority, data_parallel_rank, session_id)
        done: dict[str, RequestOutput] = {}
        with Progress(len(jobs), show=use_tqdm) as bar:
            for output in self._run(jobs):
                done[output.request_id] = output
                bar.advance(output)
        return [done[job.request_id] for job in jobs]

    def chat(
        self,
        messages: Conversation | Sequence[Conversation],
        sampling_params: Params = None,
        use_tqdm: bool = True,
        *,
        add_generation_prompt: bool = True,
        chat_template: str | None = None,
        chat_template_kwargs: Mapping[str, Any] | None = None,
    ) -> list[RequestOutput]:
        """Answer a conversation, or each of several: lists of `{"role": ..., "content": ...}`."""
        prompts = [
            render(self._tokenizer, talk, add_generation_prompt, chat_template, chat_template_kwargs) for talk in conversations(messages)
        ]
        return self.generate(prompts, sampling_params, use_tqdm)

    def embed(
        self,
        prompts: Prompt | Sequence[Prompt],
        *,
        pooling: Pooling = "last",
        normalize: bool = True,
        dimensions: int | None = None,
        use_tqdm: bool = True,
    ) -> list[EmbeddingRequestOutput]:
        """A vector for every prompt, in the prompts' order: of its hidden states after the last norm.

        pooling: the "last" position's, or the "mean" of all. dimensions: only the first so many. normalize: to length 1.
        Raises ValueError, before anything runs, when a prompt or a setting is impossible; ExecutorError when a rank fails.
        """
        if pooling not in get_args(Pooling):
            raise ValueError(f"pooling={pooling!r} is invalid: it must be one of {', '.join(get_args(Pooling))}.")
        check_dimensions(dimensions, self.spec.hidden_size)
        jobs = self._jobs(prompts, NO_TEXT, None, None, pooling=pooling)
        done: dict[str, EmbeddingRequestOutput] = {}
        with Progress(len(jobs), show=use_tqdm) as bar:
            for output in self._run(jobs):
                if output.embedding is None:
                    raise ExecutorError(output.error or f"request {output.request_id} ended without a vector.", kind="raised")
                vector = EmbeddingOutput(finish(output.embedding, dimensions=dimensions, normalize=normalize).tolist())
                done[output.request_id] = EmbeddingRequestOutput(output.request_id, output.prompt, output.prompt_token_ids, vector)
                bar.advance(output)
        return [done[job.request_id] for job in jobs]

    def stream(self, prompts: Prompt | Sequence[Prompt], sampling_params: Params = None) -> Iterator[RequestOutput]:
        """Complete every prompt, giving what there is as it comes: all so far, or as `output_kind` of the parameters says.

        Several prompts run at once, and their outputs come mixed: tell them apart by `request_id`, which counts up in
        the prompts' order. Leaving the iterator early aborts what is unfinished.
        """
        return self._run(self._jobs(prompts, sampling_params, None, None))

    def get_tokenizer(self) -> Any:
        """The `transformers` tokenizer in use."""
        return self._tokenizer

    def stats(self) -> EngineStats:
        """The engine's numbers at this moment."""
        return self._client.stats()

    def memory(self) -> list[RankMemory]:
        """Each rank's `RankMemory`: weights, KV cache and peak, in bytes, by rank."""
        return self._client.ranks()

    def collective_rpc(self, method: str, args: Sequence[Any] = (), kwargs: dict[str, Any] | None = None) -> list[Any]:
        """Call a method of `Worker` by name on every rank; the results by rank. Arguments and results are plain data."""
        return self._client.collective_rpc(method, args, kwargs)

    def start_profile(self) -> None:
        """Record what the engine and every rank do, from now on and until `stop_profile`. Costs a few per cent of speed."""
        self._client.start_profile()

    def stop_profile(self) -> Profile:
        """What was recorded since `start_profile`: `write(folder)` it as a Chrome trace, or print its `summary()`."""
        return self._client.stop_profile()

    def sleep(self, level: int = 1) -> None:
        """Give memory back until `wake_up`: the KV cache's (level 1), the weights' too (level 2). What was cached is forgotten."""
        self._idle()
        self._client.sleep(level)
        self._asleep = True

    def wake_up(self) -> None:
        """Take the memory again; level 2 reads the weights anew. Answers are as before."""
        self._client.wake_up()
        self._asleep = False

    def reset_prefix_cache(self) -> None:
        """Forget every cached prefix: after this, prompts are computed from their first token."""
        self._client.reset_prefix_cache()

    def _idle(self) -> None:
        if self._running:
            raise RuntimeError(
                "another generate or stream of this LLM is unfinished, and one runs at a time: exhaust or close its iterator, "
                "or wait for the thread that called it (`lockstep serve` serves many callers at once)."
            )

    def shutdown(self) -> None:
        """Stop the ranks and free everything. May be called twice; also done at exit and when the object is dropped."""
        self._client.shutdown()
        self._finalizer()

    def __enter__(self) -> LLM:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.shutdown()

    def _run(self, jobs: list[Job]) -> Iterator[RequestOutput]:
        """Queue every job, then step the engine until all are finished. However it ends, nothing is left running."""
        self._idle()
        if self._asleep:
            raise RuntimeError("this LLM sleeps: call wake_up() first.")
        left = {request.request_id for job in jobs for request in job.requests}
        self._running = True
        try:
            for job in jobs:
                for request in job.requests:
                    self._client.add_request(request)
                self._collector.start(job)
            while left:
                news = self._client.step()
                if self._client.failure is not None:
                    raise self._client.failure
                with self._client.timeline.span("detokenize", "engine"):
                    outputs, ended = self._collector.take(news)
                self._client.abort(ended)
                left -= {o.request_id for o in news if o.finish_reason is not None}
                left.difference_update(ended)
                yield from outputs
        finally:
            self._collector.forget(left)
            self._client.abort(left)
            self._running = False

    def _jobs(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: Params,
        kind: RequestOutputKind | None,
        priority: Sequence[int] | None,
        replica: int | Sequence[int] | None = None,
        session: str | Sequence[str] | None = None,
        pooling: Pooling | None = None,
    ) -> list[Job]:
        """Every prompt as a job, or ValueError for the first that cannot be one."""
        listed = _as_list(prompts)
        params = SamplingParams() if params is None else params
        several = params if isinstance(params, Sequence) and not isinstance(params, str) else None
        sampling = _per_prompt("sampling_params", several, listed, params)
        _check_sampling(sampling)
        priorities = _per_prompt("priority", priority, listed, 0)
        replicas = _per_prompt("data_parallel_rank", None if isinstance(replica, int) else replica, listed, replica)
        sessions = _per_prompt("session_id", None if isinstance(session, str) else session, listed, session)
        now_s = time.monotonic()
        if kind is not None:
            sampling = [msgspec.structs.replace(p, output_kind=kind) for p in sampling]
        jobs = []
        for index, (prompt, p, rank) in enumerate(zip(listed, sampling, priorities, strict=True)):
            with named(index, len(listed)):
                job = self._inputs.job(prompt, p, priority=rank, arrival_s=now_s, pooling=pooling)
                for request in job.requests:
                    request.data_parallel_rank, request.session_id = replicas[index], sessions[index]
                self._client.check_request(job.requests[0])  # the others of n differ from it in nothing that is checked
            jobs.append(job)
        return jobs


def _as_list(prompts: Any) -> list[Any]:
    """One prompt or several, as a list of them; a list of integers is one prompt."""
    if isinstance(prompts, str | Mapping | bytes):
        return [prompts]
    if not isinstance(prompts, Iterable):
        raise PromptError(f"prompts={prompts!r} is no prompt: give text, token ids, a dict with either, or a list of these.")
    listed = list(prompts)
    return [listed] if listed and all(isinstance(t, int) for t in listed) else listed


def _check_sampling(sampling: Sequence[Any]) -> None:
    """Raises PromptError for parameters of another kind: a dict is what other libraries take."""
    for given in sampling:
        if not isinstance(given, SamplingParams):
            remedy = f"SamplingParams(**{given!r})" if isinstance(given, Mapping) else "SamplingParams(temperature=0)"
            raise PromptError(f"sampling_params={given!r} is a {type(given).__name__}: give SamplingParams, like {remedy}.")


def _per_prompt(name: str, values: Sequence[Any] | None, prompts: list[Any], one_for_all: Any) -> list[Any]:
    """A value for each prompt. Raises ValueError when there are fewer or more than prompts."""
    if values is None:
        return [one_for_all] * len(prompts)
    if len(values) != len(prompts):
        raise PromptError(f"{name} has {len(values)} entries for {len(prompts)} prompts: give one for each, or a single one for all.")
    return list(values)
