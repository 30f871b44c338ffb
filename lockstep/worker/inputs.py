"""A plan's rows as flat arrays: which tokens enter the model, at which positions, with which KV blocks."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from lockstep.protocol import StepPlan
from lockstep.worker.batch import I32, I64, BatchState


@dataclass(frozen=True)
class StepInputs:
    """One step's inputs. Row i's tokens stand next to each other, rows in the plan's order.

    tokens: input_ids, positions are `[tokens]`. rows: slots, query_lens (tokens computed now), seq_lens (tokens in the
    KV cache after the step) are `[rows]`, block_tables is `[rows, blocks of the longest row]`. sampled_rows are the
    rows that sample, last_tokens the index in `[tokens]` of each one's last token.
    """

    input_ids: I64
    positions: I64
    slots: I64
    query_lens: I64
    seq_lens: I64
    block_tables: I32
    sampled_rows: I64
    last_tokens: I64

    @property
    def sampled_slots(self) -> I64:
        """The slots whose requests get a token in this step, in row order."""
        return self.slots[self.sampled_rows]


def build_inputs(state: BatchState, plan: StepPlan) -> StepInputs:
    """The inputs of `plan`, whose changes `state` has already applied. Asserts that the two fit together."""
    slots = np.array(plan.slots, np.int64)
    starts = np.array(plan.num_computed, np.int64)
    counts = np.array(plan.num_tokens, np.int64)
    ends = starts + counts
    sampled_rows = np.flatnonzero(np.array(plan.samples, np.bool_))
    _check(state, plan.step, slots, counts, ends=ends, sampled_rows=sampled_rows)
    total = int(counts.sum())
    after = np.cumsum(counts)
    if total == len(slots):  # all decode: one token a row
        positions, owner = starts, slots
    else:
        positions = np.arange(total) + np.repeat(starts - (after - counts), counts)
        owner = np.repeat(slots, counts)
    widest = -(-int(ends.max(initial=0)) // state.block_size)
    return StepInputs(
        input_ids=state.tokens[owner, positions].astype(np.int64),
        positions=positions,
        slots=slots,
        query_lens=counts,
        seq_lens=ends,
        block_tables=state.block_tables[slots, :widest],
        sampled_rows=sampled_rows,
        last_tokens=after[sampled_rows] - 1,
    )


def rehearsal_inputs(query_lens: list[int], seq_lens: list[int], block_size: int) -> StepInputs:
    """Inputs of a step of no request: token 0 everywhere, every row samples, and all its KV is in block 0.

    Block 0 must not hold anything yet. Reads as much KV as `seq_lens` say, however few blocks there are.
    """
    counts, ends = np.array(query_lens, np.int64), np.array(seq_lens, np.int64)
    rows = np.arange(len(counts))
    return StepInputs(
        input_ids=np.zeros(counts.sum(), np.int64),
        positions=np.concatenate([np.arange(end - count, end) for count, end in zip(counts, ends, strict=True)]),
        slots=rows,
        query_lens=counts,
        seq_lens=ends,
        block_tables=np.zeros((len(rows), -(-int(ends.max()) // block_size)), np.int32),
        sampled_rows=rows,
        last_tokens=np.cumsum(counts) - 1,
    )


def _check(state: BatchState, step: int, slots: I64, counts: I64, *, ends: I64, sampled_rows: I64) -> None:
    """Assert what a plan promises; a plan that breaks it would read or write another request's memory."""
    assert len(slots) and counts.min() > 0, f"step {step} has a row without tokens"
    assert state.active[slots].all(), f"step {step} runs slots that hold no request: {slots[~state.active[slots]]}"
    assert np.bincount(slots).max() == 1, f"step {step} names a slot twice"
    known = state.lengths[slots]
    assert (ends <= known).all(), f"step {step} computes tokens that are not known yet, in slots {slots[ends > known]}"
    assert (ends[sampled_rows] == known[sampled_rows]).all(), f"step {step} samples before all known tokens are computed"
    assert (state.num_blocks[slots] * state.block_size >= ends).all(), f"step {step} has a row without a block for its tokens"
