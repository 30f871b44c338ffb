"""What a caller gets back, with the field's names."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import NamedTuple

from lockstep.protocol import FinishReason, TokenLogprobs


class Logprob(NamedTuple):
    """One token's log-probability at one position; rank 1 is the most likely."""

    logprob: float
    rank: int
    decoded_token: str | None = None


Position = dict[int, Logprob]  # token id -> its logprob; the token that was chosen (or prompted) comes first


@dataclass
class CompletionOutput:
    """One completion of a prompt. `logprobs` and `cumulative_logprob` only where they were asked for."""

    index: int
    text: str = ""
    token_ids: list[int] = field(default_factory=list)
    cumulative_logprob: float | None = None
    logprobs: list[Position] | None = None
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop token or string that ended it

    @property
    def finished(self) -> bool:
        return self.finish_reason is not None


@dataclass
class RequestOutput:
    """A prompt with its completions, by index. `prompt_logprobs[0]` is None: the first token has nothing before it."""

    request_id: str
    prompt: str | None
    prompt_token_ids: list[int]
    outputs: list[CompletionOutput]
    finished: bool = False
    prompt_logprobs: list[Position | None] | None = None
    num_cached_tokens: int = 0
    error: str | None = None  # why an output's finish_reason is "error"
    embedding: bytes | None = None  # of a request with `pooling`, at its end; see `frontend.embedding`


def position(entry: TokenLogprobs, text_of: Callable[[int], str | None]) -> Position:
    """A step's log-probabilities at one position as a map, the chosen token first."""
    chosen, *top = zip(entry.token_ids, entry.logprobs, strict=True)
    found: Position = {chosen[0]: Logprob(chosen[1], entry.rank, text_of(chosen[0]))}
    for rank, (token, logprob) in enumerate(top, start=1):
        found.setdefault(token, Logprob(logprob, rank, text_of(token)))
    return found


def bare_end(
    request_id: str, prompt: str | None, prompt_token_ids: list[int], n: int, reason: FinishReason, error: str | None
) -> RequestOutput:
    """The last output of a request whose completions cannot be told."""
    return RequestOutput(
        request_id, prompt, prompt_token_ids, [CompletionOutput(i, finish_reason=reason) for i in range(n)], True, error=error
    )
