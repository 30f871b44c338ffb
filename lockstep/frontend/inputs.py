"""Prompts on their way in: tokenized, checked, and turned into engine requests."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import msgspec

from lockstep.config.model_spec import ModelSpec
from lockstep.config.tree import EngineConfig
from lockstep.frontend.errors import PromptError
from lockstep.frontend.prompts import Prompt, parse
from lockstep.frontend.structured import StructuredChecker
from lockstep.frontend.tokenizer import encode, eos_ids
from lockstep.protocol import EngineRequest, Pooling, SamplingParams


@dataclass
class Job:
    """One prompt, ready to run: its engine requests, one for each of the n completions, by index."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    sampling: SamplingParams
    requests: list[EngineRequest]

    def call(self, external_id: str, response_id: str) -> None:
        """Note what its client knows it by: the id of the HTTP request, and of the response."""
        for request in self.requests:
            request.external_id, request.response_id = external_id, response_id

    @property
    def external_id(self) -> str:
        """The HTTP request's id; the engine's name where there is none."""
        return self.requests[0].external_id or self.request_id


class InputProcessor:
    """Makes jobs of prompts. Pure but for a counter, which numbers the requests and their seeds."""

    def __init__(self, config: EngineConfig, spec: ModelSpec, folder: Path, tokenizer: Any) -> None:
        self._seed = config.model.seed
        self._tokenizer = tokenizer
        self._eos = [t for t in eos_ids(tokenizer, folder, spec.eos_token_ids) if t < spec.vocab_size]
        self._count = 0
        self.structured = StructuredChecker()

    def job(
        self,
        prompt: Prompt,
        sampling: SamplingParams,
        *,
        request_id: str | None = None,
        priority: int = 0,
        arrival_s: float = 0.0,
        pooling: Pooling | None = None,
    ) -> Job:
        """The job of one prompt: text, token ids, or a dict with `prompt` or `prompt_token_ids` (and `cache_salt`).

        pooling: the prompt's vector is wanted, and no tokens (`sampling` only says that there is one completion, without text).

        Raises PromptError for a prompt that cannot be read, or a grammar that cannot be kept to. Lengths and ids are checked by
        the engine, when it takes it.
        """
        text, ids, salt = parse(prompt)
        if ids is None:
            ids = encode(self._tokenizer, text or "", "prompt")
        if sampling.stop and not sampling.detokenize:
            raise PromptError(f"stop={sampling.stop!r} needs text to look in, but detokenize=False: use stop_token_ids, or detokenize.")
        if sampling.structured_outputs is not None:
            self.structured.check(sampling.structured_outputs)
        number, self._count = self._count, self._count + 1
        name = request_id or str(number)
        seed = sampling.seed if sampling.seed is not None else _draw_seed(self._seed, number)
        first = self._for_engine(sampling)
        # The prompt is the same for all completions: one of them reports its log-probabilities.
        others = msgspec.structs.replace(first, prompt_logprobs=None) if first.prompt_logprobs is not None else first
        requests = [
            EngineRequest(
                request_id=name if sampling.n == 1 else f"{name}.{choice}",  # see job_of
                prompt_token_ids=ids,
                sampling=others if choice else first,
                seed=seed,
                choice=choice,
                eos_token_ids=self._eos,
                priority=priority,
                arrival_s=arrival_s,
                cache_salt=salt,
                pooling=pooling,
            )
            for choice in range(sampling.n)
        ]
        return Job(name, text, ids, sampling, requests)

    def _for_engine(self, sampling: SamplingParams) -> SamplingParams:
        if not sampling.bad_words:
            return sampling
        ids: list[list[int]] = []
        for word in sampling.bad_words:
            # A word is spelled with other tokens inside a line (after a space) than at its start.
            for spelling in (word.lstrip(), " " + word.lstrip()):
                tokens = encode(self._tokenizer, spelling, "bad_words", add_special_tokens=False)
                if tokens and tokens not in ids:
                    ids.append(tokens)
        return msgspec.structs.replace(sampling, bad_words_token_ids=ids)


def _draw_seed(engine_seed: int, number: int) -> int:
    """The seed of the engine's `number`-th request: the same on every run, and unrelated to its neighbours'."""
    return int.from_bytes(hashlib.blake2b(f"{engine_seed}:{number}".encode(), digest_size=8).digest(), "little") >> 1
