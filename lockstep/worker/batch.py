"""What a worker remembers of its running requests: one row per slot, the same on every rank.

Every rank applies the same plans and appends the same sampled tokens, so all ranks' states stay equal without talking.
(In a pipeline most append placeholders: see `returns`.)

    field         written by                          holds
    tokens        apply (new), append        all tokens, prompt then output
    lengths       apply (new), append        how many of them
    tenants       apply (new)                counts who has had the slot: tokens that come late must find theirs
    prompt_lens   apply (new)                how many of them are prompt
    block_tables  apply (new, new_blocks)    the KV blocks of the request, in order
    num_blocks    apply (new, new_blocks)    how many of them
    sampling ...  apply (new)                how its next token is chosen
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from lockstep.protocol import NewRequest, Pooling, SamplingParams, StepPlan

I64 = npt.NDArray[np.int64]
I32 = npt.NDArray[np.int32]
F64 = npt.NDArray[np.float64]
Flags = npt.NDArray[np.bool_]


@dataclass(frozen=True)
class AlteredRow:
    """A sampled row whose logits are changed before a token is chosen from them."""

    row: int
    params: SamplingParams
    tokens: I32  # [length], prompt then output; a view
    num_prompt_tokens: int
    eos_token_ids: Sequence[int] = ()  # that end this request; none where it ignores them
    slot: int = -1


@dataclass(frozen=True)
class SampleRows:
    """How each sampled row of a step chooses its token. Arrays are `[rows]`."""

    greedy: Flags
    temperature: F64
    top_k: I64  # 0 is off
    top_p: F64
    min_p: F64
    seeds: I64
    choices: I64
    positions: I64  # where the new token will stand in its request
    logprobs: I64  # how many top ones are asked for; -1 is none
    altered: list[AlteredRow]

    def __len__(self) -> int:
        return len(self.greedy)

    @property
    def plain_greedy(self) -> bool:
        """Whether every row takes the most likely token of its unchanged logits, and none wants more than that token."""
        return bool(self.greedy.all()) and not self.altered and bool((self.logprobs < 0).all())


def alters_logits(p: SamplingParams) -> bool:
    """Whether the parameters change logits before the choice (temperature and truncation do not count)."""
    return bool(
        p.repetition_penalty != 1.0
        or p.presence_penalty
        or p.frequency_penalty
        or p.logit_bias
        or p.allowed_token_ids is not None
        or p.bad_words_token_ids
        or p.min_tokens
        or p.structured_outputs
    )


class BatchState:
    """The rows of `capacity` slots; `max_model_len` tokens fit a row. Pages of unused rows cost no memory."""

    def __init__(self, capacity: int, max_model_len: int, block_size: int) -> None:
        self.capacity, self.max_model_len, self.block_size = capacity, max_model_len, block_size
        self.active: Flags = np.zeros(capacity, np.bool_)
        self.tenants: I64 = np.zeros(capacity, np.int64)
        self.request_ids: list[str] = [""] * capacity
        self.tokens: I32 = np.zeros((capacity, max_model_len), np.int32)
        self.lengths: I64 = np.zeros(capacity, np.int64)
        self.prompt_lens: I64 = np.zeros(capacity, np.int64)
        self.block_tables: I32 = np.zeros((capacity, -(-max_model_len // block_size)), np.int32)
        self.num_blocks: I64 = np.zeros(capacity, np.int64)
        self.sampling: list[SamplingParams] = [SamplingParams()] * capacity
        self.eos: list[Sequence[int]] = [()] * capacity
        self._greedy: Flags = np.ones(capacity, np.bool_)
        self._altered: Flags = np.zeros(capacity, np.bool_)
        self._temperature: F64 = np.ones(capacity)
        self._top_k: I64 = np.zeros(capacity, np.int64)
        self._top_p: F64 = np.ones(capacity)
        self._min_p: F64 = np.zeros(capacity)
        self.seeds: I64 = np.zeros(capacity, np.int64)
        self._choices: I64 = np.zeros(capacity, np.int64)
        self._logprobs: I64 = np.full(capacity, -1, np.int64)
        self.prompt_logprobs: I64 = np.full(capacity, -1, np.int64)
        self.pooling: list[Pooling | None] = [None] * capacity
        self.pools: Flags = np.zeros(capacity, np.bool_)
        self.choosy: set[int] = set()  # slots that do not just take the most likely token
        self.curious: set[int] = set()  # slots that want more of their prompt than its KV: log-probabilities, a pooled vector

    @property
    def nbytes(self) -> int:
        """Of all arrays, touched or not."""
        return sum(v.nbytes for v in vars(self).values() if isinstance(v, np.ndarray))

    def apply(self, plan: StepPlan) -> None:
        """Take the plan's changes in: slots given back, then new requests, then new blocks."""
        for slot in plan.freed:
            assert self.active[slot], f"step {plan.step} frees slot {slot}, which holds no request"
            self.active[slot] = False
            self.choosy.discard(slot)
            self.curious.discard(slot)
        for request in plan.new:
            self._start(request, plan.step)
        for slot, blocks in plan.new_blocks:
            assert self.active[slot], f"step {plan.step} gives blocks to slot {slot}, which holds no request"
            self._extend(slot, blocks)

    def append(self, slots: I64, tokens: I64) -> None:
        """Append one sampled token to each of `slots`."""
        at = self.lengths[slots]
        assert at.max(initial=0) < self.max_model_len, f"a request grew over max_model_len={self.max_model_len}"
        self.tokens[slots, at] = tokens
        self.lengths[slots] = at + 1

    def sample_rows(self, slots: I64) -> SampleRows:
        """How the requests in `slots` choose their next token."""
        altered = [
            AlteredRow(row, self.sampling[slot], self.tokens[slot, : self.lengths[slot]], int(self.prompt_lens[slot]), self.eos[slot], slot)
            for row, slot in ((int(row), int(slots[row])) for row in np.flatnonzero(self._altered[slots]))
        ]
        return SampleRows(
            greedy=self._greedy[slots],
            temperature=self._temperature[slots],
            top_k=self._top_k[slots],
            top_p=self._top_p[slots],
            min_p=self._min_p[slots],
            seeds=self.seeds[slots],
            choices=self._choices[slots],
            positions=self.lengths[slots],
            logprobs=self._logprobs[slots],
            altered=altered,
        )

    def _start(self, request: NewRequest, step: int) -> None:
        slot, count, p = request.slot, len(request.token_ids), request.sampling
        assert 0 <= slot < self.capacity, f"step {step} names slot {slot} of {self.capacity}"
        assert not self.active[slot], f"step {step} puts {request.request_id} in slot {slot}, which holds {self.request_ids[slot]}"
        assert 0 < request.num_prompt_tokens <= count <= self.max_model_len, f"{request.request_id} has {count} tokens"
        self.active[slot] = True
        self.tenants[slot] += 1
        self.request_ids[slot] = request.request_id
        self.tokens[slot, :count] = request.token_ids
        self.lengths[slot], self.prompt_lens[slot] = count, request.num_prompt_tokens
        self.num_blocks[slot] = 0
        self._extend(slot, request.block_ids)
        self.sampling[slot], self.eos[slot] = p, request.eos_token_ids
        self._greedy[slot], self._altered[slot] = p.greedy, alters_logits(p)
        self._temperature[slot] = p.temperature
        self._top_k[slot], self._top_p[slot], self._min_p[slot] = p.top_k, p.top_p, p.min_p
        self.seeds[slot], self._choices[slot] = request.seed, request.choice
        self._logprobs[slot] = -1 if p.logprobs is None else p.logprobs
        self.prompt_logprobs[slot] = -1 if p.prompt_logprobs is None or request.pooling else p.prompt_logprobs
        self.pooling[slot], self.pools[slot] = request.pooling, request.pooling is not None
        if not p.greedy or self._altered[slot] or self._logprobs[slot] >= 0:
            self.choosy.add(slot)
        if self.pools[slot] or self.prompt_logprobs[slot] >= 0:
            self.curious.add(slot)

    def _extend(self, slot: int, blocks: list[int]) -> None:
        have = int(self.num_blocks[slot])
        room = self.block_tables.shape[1]
        assert have + len(blocks) <= room, f"slot {slot} would hold {have + len(blocks)} blocks of at most {room}"
        self.block_tables[slot, have : have + len(blocks)] = blocks
        self.num_blocks[slot] = have + len(blocks)
