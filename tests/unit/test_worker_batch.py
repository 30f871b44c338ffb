"""The batch state and the inputs built from it, against the slow way with lists."""

from __future__ import annotations

import random
import time

import numpy as np
import pytest

from lockstep.protocol import NewRequest, SamplingParams, StepPlan
from lockstep.worker.batch import BatchState
from lockstep.worker.inputs import build_inputs, rehearsal_inputs

BLOCK = 4


def new(slot: int, tokens: list[int], blocks: list[int], *, prompt: int | None = None, **kw: object) -> NewRequest:
    return NewRequest(
        slot=slot,
        request_id=f"r{slot}",
        token_ids=tokens,
        num_prompt_tokens=prompt or len(tokens),
        block_ids=blocks,
        sampling=SamplingParams(**kw),  # type: ignore[arg-type]
        seed=slot,
    )


def plan(rows: list[tuple[int, int, int, bool]], **kw: object) -> StepPlan:
    """rows: (slot, num_computed, num_tokens, samples)."""
    columns = [list(c) for c in zip(*rows, strict=True)] if rows else [[], [], [], []]
    return StepPlan(7, *columns, **kw)  # type: ignore[arg-type]


def test_mixed_step_equals_the_slow_way() -> None:
    """A random life of 200 steps: freed, new, chunked prefill, decode; inputs compared with lists of lists."""
    rng = random.Random(5)
    state = BatchState(8, 64, BLOCK)
    live: dict[int, dict[str, list[int] | int]] = {}
    free_blocks = list(range(1000))
    for _ in range(200):
        freed = [s for s in live if rng.random() < 0.1 or len(live[s]["tokens"]) > 56]  # type: ignore[arg-type]
        for s in freed:
            del live[s]
        started, grown = [], []
        for s in range(8):
            if s not in live and rng.random() < 0.4:
                tokens = [rng.randrange(1000) for _ in range(rng.randint(1, 20))]
                live[s] = {"tokens": tokens, "computed": 0, "blocks": [free_blocks.pop()]}
                started.append(new(s, list(tokens), list(live[s]["blocks"])))  # type: ignore[call-overload]
        rows = []
        for s, request in live.items():
            known, computed = len(request["tokens"]), request["computed"]  # type: ignore[arg-type]
            if rng.random() < 0.8:
                count = rng.randint(1, known - computed)  # type: ignore[operator]
                need = -(-(computed + count) // BLOCK) - len(request["blocks"])  # type: ignore[arg-type,operator]
                if need > 0:
                    blocks = [free_blocks.pop() for _ in range(need)]
                    request["blocks"] += blocks  # type: ignore[operator]
                    grown.append((s, blocks))
                rows.append((s, computed, count, computed + count == known))
        step = plan(rows, new=started, new_blocks=grown, freed=freed)
        state.apply(step)
        if not rows:
            continue
        inputs = build_inputs(state, step)
        ids, positions, last = [], [], []
        for s, computed, count, samples in rows:
            ids += live[s]["tokens"][computed : computed + count]  # type: ignore[index]
            positions += range(computed, computed + count)
            if samples:
                last.append(len(ids) - 1)
        assert inputs.input_ids.tolist() == ids and inputs.positions.tolist() == positions
        assert inputs.query_lens.tolist() == [r[2] for r in rows]
        assert inputs.seq_lens.tolist() == [r[1] + r[2] for r in rows]
        assert inputs.last_tokens.tolist() == last
        for row, (s, *_) in enumerate(rows):
            needed = -(-int(inputs.seq_lens[row]) // BLOCK)
            assert inputs.block_tables[row, :needed].tolist() == live[s]["blocks"][:needed]  # type: ignore[index]
        sampled = [rng.randrange(1000) for _ in last]
        state.append(inputs.sampled_slots, np.array(sampled, np.int64))
        for row, token in zip([r for r in rows if r[3]], sampled, strict=True):
            live[row[0]]["tokens"].append(token)  # type: ignore[union-attr]
        for s, computed, count, _ in rows:
            live[s]["computed"] = computed + count


def test_a_reused_slot_forgets_its_last_request() -> None:
    state = BatchState(2, 16, BLOCK)
    odd = {"temperature": 0.0, "logprobs": 3, "prompt_logprobs": 1, "presence_penalty": 1.0, "top_k": 4}
    state.apply(plan([], new=[new(1, [1, 2, 3, 4, 5], [9, 8], **odd)]))
    state.apply(plan([(1, 0, 2, True)], freed=[1], new=[new(1, [6, 7], [5])]))
    rows = state.sample_rows(np.array([1]))
    assert not rows.greedy[0] and rows.logprobs[0] == -1 and rows.top_k[0] == 0 and not rows.altered
    assert state.prompt_logprobs[1] == -1 and state.num_blocks[1] == 1 and state.lengths[1] == 2


def test_resumed_request_keeps_its_prompt_length_and_position() -> None:
    state = BatchState(2, 16, BLOCK)
    request = new(0, [1, 2, 3, 4, 5], [0, 1], prompt=3, min_tokens=4)
    request.eos_token_ids = [7, 9]  # of this request: the model's, the tokenizer's, or none
    state.apply(plan([], new=[request]))
    rows = state.sample_rows(np.array([0]))
    assert rows.positions[0] == 5 and rows.altered[0].num_prompt_tokens == 3 and rows.altered[0].eos_token_ids == [7, 9]


@pytest.mark.parametrize(
    ("bad", "message"),
    [
        (plan([], freed=[0]), "frees slot 0"),
        (plan([], new=[new(1, [1], [0])]), "slot 1, which holds r1"),
        (plan([], new_blocks=[(0, [1])]), "gives blocks to slot 0"),
        (plan([], new=[new(5, [1], [0])]), "names slot 5 of 4"),
        (plan([(0, 0, 1, True)]), "hold no request"),
        (plan([(1, 0, 6, False)]), "not known yet"),
        (plan([(1, 0, 3, True)]), "before all known tokens"),
        (plan([(1, 0, 5, True)]), "without a block"),
        (plan([(1, 0, 1, False), (1, 1, 1, False)]), "twice"),
        (plan([(1, 0, 0, False)]), "without tokens"),
        (plan([], new=[new(2, list(range(17)), [0])]), "17 tokens"),
    ],
)
def test_a_plan_that_does_not_fit_is_our_bug(bad: StepPlan, message: str) -> None:
    state = BatchState(4, 16, BLOCK)
    state.apply(plan([], new=[new(1, [1, 2, 3, 4, 5], [0])]))
    with pytest.raises(AssertionError, match=message):
        state.apply(bad)
        build_inputs(state, bad)


def test_append_over_the_length_is_our_bug() -> None:
    state = BatchState(1, 4, BLOCK)
    state.apply(plan([], new=[new(0, [1, 2, 3, 4], [0])]))
    with pytest.raises(AssertionError, match="max_model_len=4"):
        state.append(np.array([0]), np.array([1]))


def test_rehearsal_reads_block_zero_only() -> None:
    inputs = rehearsal_inputs([3, 1], [10, 6], BLOCK)
    assert inputs.positions.tolist() == [7, 8, 9, 5] and inputs.last_tokens.tolist() == [2, 3]
    assert inputs.block_tables.shape == (2, 3) and not inputs.block_tables.any()


def test_256_decode_rows_are_cheap() -> None:
    state = BatchState(256, 2048, 16)
    requests = [new(s, list(range(500)), list(range(s * 32, s * 32 + 32))) for s in range(256)]
    state.apply(plan([], new=requests))
    step = plan([(s, 499, 1, True) for s in range(256)], new_blocks=[(s, [9000 + s]) for s in range(0, 256, 16)])
    best = float("inf")
    for _ in range(30):
        began = time.perf_counter()
        inputs = build_inputs(state, step)
        state.sample_rows(inputs.sampled_slots)
        best = min(best, time.perf_counter() - began)
    assert best < 3e-3, f"{best * 1e3:.2f} ms"  # about 0.15 ms on an idle core; slack for a busy machine
