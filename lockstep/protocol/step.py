"""One engine step as a message: the plan that every rank executes, and the result that comes back.

A plan is decided once, by the scheduler, and only executed by the ranks: no rank decides anything by itself, so no two
ranks can issue different collectives. Requests are named by *slot* (a small integer, the row of the worker's batch
state), assigned by the scheduler when a request starts running and given back when it stops.
"""

from __future__ import annotations

from typing import Literal

import msgspec

from lockstep.protocol.sampling import SamplingParams

Pooling = Literal["last", "mean"]


class NewRequest(msgspec.Struct, array_like=True, gc=False):
    """A request that takes a slot: for the first time, or again after preemption (then with its output so far)."""

    slot: int
    request_id: str
    token_ids: list[int]  # all known tokens: the prompt, then outputs generated before a preemption
    num_prompt_tokens: int
    block_ids: list[int]  # its block table; blocks for this step included
    sampling: SamplingParams
    seed: int  # always set: sampling.seed, or one drawn by the frontend
    choice: int = 0  # which of the n completions of its prompt this is
    eos_token_ids: list[int] = []  # end the text, so not to be sampled before min_tokens; empty under ignore_eos
    pooling: Pooling | None = None  # wants no tokens but a vector: of its last position, or the mean of all


class StepPlan(msgspec.Struct, array_like=True, gc=False):
    """What all ranks do in one step. The four row lists are parallel: one entry per scheduled request.

    Row i computes tokens [num_computed[i], num_computed[i] + num_tokens[i]) of the request in slots[i], writing their
    keys and values to its blocks. If samples[i], the last of them yields logits and one new token, which every rank
    appends to the request's tokens by itself, so that the next plan may be made before this one's result is known.

    In a pipeline only its last stage knows a token, and hands it back to the first one, which waits for it. So a request whose
    token is in flight is not scheduled before every stage has had a step since.
    """

    step: int
    slots: list[int]
    num_computed: list[int]
    num_tokens: list[int]
    samples: list[bool]
    new: list[NewRequest] = []
    new_blocks: list[tuple[int, list[int]]] = []  # (slot, block ids appended to its table)
    freed: list[int] = []  # slots given back; applied before `new`


class TokenLogprobs(msgspec.Struct, array_like=True, gc=False):
    """Log-probabilities at one position: first the chosen (or prompt) token, then the top ones, most likely first."""

    token_ids: list[int]
    logprobs: list[float]
    rank: int  # of the chosen token among the whole vocabulary, 1 is the most likely


class StepResult(msgspec.Struct, array_like=True, gc=False):
    """What the output rank reports of a step; `tokens` and `logprobs` are parallel to the sampled rows, in row order."""

    step: int
    tokens: list[int]
    logprobs: list[TokenLogprobs | None] | None = None  # None when no request of the step asked
    prompt_logprobs: list[tuple[int, list[TokenLogprobs]]] = []  # (slot, positions computed in this step)
    ended: list[tuple[int, str | None]] = []  # (index in tokens, why): None, its grammar is complete; text, an error of this row alone
    embeddings: list[tuple[int, bytes]] = []  # (slot, float32 vector) of prompts that ended in this step, and asked for one
    compute_s: float = 0.0  # seconds the rank spent in the step
