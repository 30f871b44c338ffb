"""A request on its way in, and its outputs on their way out."""

from __future__ import annotations

from typing import Literal

import msgspec

from lockstep.protocol.sampling import SamplingParams
from lockstep.protocol.step import Pooling, TokenLogprobs

FinishReason = Literal["stop", "length", "abort", "error"]


class EngineRequest(msgspec.Struct, kw_only=True):
    """One prompt, one completion. A request with n > 1 is n of these, told apart by `choice`."""

    request_id: str
    prompt_token_ids: list[int]
    sampling: SamplingParams
    seed: int
    choice: int = 0
    eos_token_ids: list[int] = []
    priority: int = 0  # lower runs first, under the priority policy
    arrival_s: float = 0.0  # monotonic clock
    output_token_ids: list[int] = []  # generated before its replica was lost: it goes on after them
    cache_salt: str | None = None  # requests share cached prefixes only within one salt
    data_parallel_rank: int | None = None  # the replica that is to run it; None: the router chooses
    session_id: str | None = None  # requests of one session go to one replica, as far as loads allow
    external_id: str = ""  # of the HTTP request that it is of: X-Request-Id, in every log line about it
    response_id: str = ""  # of the response that it is for
    pooling: Pooling | None = None  # no tokens are generated, but the prompt's vector is made; `sampling` does not matter then


class EngineOutput(msgspec.Struct, kw_only=True, omit_defaults=True, gc=False):
    """What one step brought for one request. `finish_reason` is set on the last, and only there.

    A request whose grammar is complete ends with an output of its own, without tokens: its last token belongs to its text.
    """

    request_id: str
    new_token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None  # parallel to new_token_ids
    prompt_logprobs: list[TokenLogprobs] | None = None  # on the first output of a request that asked; [0] is position 1
    finish_reason: FinishReason | None = None
    stop_reason: int | str | None = None  # the stop token or string that ended it
    num_cached_tokens: int = 0
    error: str | None = None
    embedding: bytes | None = None  # on the last output of a request with `pooling`: float32, little-endian, not normalised
    queued_s: float = 0.0  # on the first output of a request: how long it waited before it first ran
    preemptions: int = 0  # on the last: how often it lost its blocks and began again
    replica: int = 0  # that brought it; written by the router
