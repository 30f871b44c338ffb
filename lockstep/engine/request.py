"""One request as the engine knows it: its tokens, how far they are computed, and what it holds."""

from __future__ import annotations

from enum import IntEnum

from lockstep.protocol import EngineRequest, FinishReason, NewRequest, TokenLogprobs

NEVER = 1 << 62  # a token count that no sequence reaches


class Status(IntEnum):
    """Where a request is. Preempted requests wait again."""

    WAITING = 0
    RUNNING = 1
    FINISHED = 2


class Request:
    """The scheduler is the only writer.

    Three numbers say where the request stands (prompt, then outputs; `^` is a boundary). The result of a request with `pooling`
    counts as a token in flight, which never becomes known.

        tokens        p p p p p o o ? ?          ? = sampled by a step in flight, not known here yet
        num_computed  ------------------^        keys and values that issued steps write: at most total - 1
        known         --------------^            len(token_ids)
        total         --------------------^      known + in_flight; never above max_total
    """

    __slots__ = (
        "added_s",
        "block_hashes",
        "block_ids",
        "eos",
        "in_flight",
        "key",
        "max_total",
        "min_tokens",
        "next_publish",
        "num_cached",
        "num_computed",
        "num_prompt",
        "pooling",
        "preemptions",
        "prompt_logprobs",
        "queued_s",
        "request_id",
        "sampled_in",
        "slot",
        "source",
        "status",
        "stops",
        "token_ids",
    )

    def __init__(self, source: EngineRequest, key: tuple[int, float, int], max_total: int) -> None:
        sampling = source.sampling
        self.source = source
        self.request_id = source.request_id
        self.key = key  # order among requests: (priority, arrival_s, sequence number), unique
        self.token_ids = source.prompt_token_ids + source.output_token_ids
        self.num_prompt = len(source.prompt_token_ids)
        self.pooling = source.pooling
        self.max_total = max_total  # tokens of prompt and output when it must end
        self.min_tokens = sampling.min_tokens
        self.eos = frozenset(() if sampling.ignore_eos else source.eos_token_ids)
        self.stops = self.eos | frozenset(sampling.stop_token_ids or ())
        self.status = Status.WAITING
        self.slot = -1  # row of the workers' batch state while running
        self.block_ids: list[int] = []
        self.num_computed = 0
        self.in_flight = 0  # sampled tokens that have not arrived
        self.sampled_in = 0  # the last step that sampled for it; kept in pipelines only
        self.block_hashes: list[bytes] = []  # names of its first full blocks, as far as they were needed
        self.next_publish = NEVER  # number of computed tokens that completes the next block to publish
        self.num_cached = -1  # prompt tokens found in the cache when it first ran
        self.preemptions = 0
        self.added_s = self.queued_s = 0.0  # when it came, and how long it waited to run
        # A request that goes on after its first token has given its prompt's away already.
        owed = sampling.prompt_logprobs is not None and not source.output_token_ids and source.pooling is None
        self.prompt_logprobs: list[TokenLogprobs] | None = [] if owed else None

    @property
    def total(self) -> int:
        """Tokens known or in flight."""
        return len(self.token_ids) + self.in_flight

    @property
    def num_output(self) -> int:
        """Output tokens that have arrived."""
        return len(self.token_ids) - self.num_prompt

    @property
    def reads_cache(self) -> bool:
        """Whether it may skip computing a prefix: not if every position counts, for a mean or for the prompt's log-probabilities."""
        return self.prompt_logprobs is None and self.pooling != "mean"

    def finish_reason(self) -> tuple[FinishReason, int | None] | None:
        """(reason, stop reason) when the token that arrived last ends the request."""
        token = self.token_ids[-1]
        if token in self.stops and self.num_output >= self.min_tokens:
            return "stop", None if token in self.eos else token
        if len(self.token_ids) >= self.max_total:
            return "length", None
        return None

    def as_new(self) -> NewRequest:
        """The message with which the workers give it a slot."""
        source = self.source
        return NewRequest(
            slot=self.slot,
            request_id=self.request_id,
            token_ids=self.token_ids.copy(),
            num_prompt_tokens=self.num_prompt,
            block_ids=self.block_ids.copy(),
            sampling=source.sampling,
            seed=source.seed,
            choice=source.choice,
            eos_token_ids=sorted(self.eos),
            pooling=self.pooling,
        )
