"""Each sampling parameter alone, against the plainest possible oracle."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lockstep.kernels.library import library
from lockstep.protocol import SamplingParams
from lockstep.worker.batch import AlteredRow, BatchState, SampleRows, alters_logits
from lockstep.worker.sampler import Sampler, draw

VOCAB = 61


@pytest.fixture(autouse=True, params=["kernels", "numpy"])
def way(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every test runs with the kernels, where they can be had, and without."""
    if request.param == "numpy":
        monkeypatch.setattr("lockstep.kernels.rows.library", lambda: None)
    elif library() is None:
        pytest.skip("no kernels here")


def rows_of(
    params: list[SamplingParams],
    prompts: list[list[int]],
    outputs: list[list[int]] | None = None,
    seeds: list[int] | None = None,
    eos: tuple[int, ...] = (),
) -> SampleRows:
    """Sample rows as the batch state would make them."""
    outputs = outputs or [[] for _ in prompts]
    n = len(params)
    lengths = [len(a) + len(b) for a, b in zip(prompts, outputs, strict=True)]
    return SampleRows(
        greedy=np.array([p.greedy for p in params]),
        temperature=np.array([p.temperature for p in params], np.float64),
        top_k=np.array([p.top_k for p in params]),
        top_p=np.array([p.top_p for p in params], np.float64),
        min_p=np.array([p.min_p for p in params], np.float64),
        seeds=np.array(seeds or range(n), np.int64),
        choices=np.zeros(n, np.int64),
        positions=np.array(lengths, np.int64),
        logprobs=np.array([-1 if p.logprobs is None else p.logprobs for p in params], np.int64),
        altered=[
            AlteredRow(i, p, np.array(prompts[i] + outputs[i], np.int32), len(prompts[i]), eos)
            for i, p in enumerate(params)
            if alters_logits(p)
        ],
    )


def logits_of(n: int, seed: int = 0, vocab: int = VOCAB) -> torch.Tensor:
    return torch.randn(n, vocab, generator=torch.Generator().manual_seed(seed)) * 3


def one(
    logits: torch.Tensor, params: SamplingParams, prompt: list[int], output: list[int], eos: tuple[int, ...] = (), seed: int = 0
) -> int:
    rows = rows_of([params], [prompt], [output], [seed], eos=eos)
    return int(Sampler().sample(logits[None].clone(), rows).tokens[0])


def greedy_order(logits: torch.Tensor) -> list[int]:
    return logits.argsort(descending=True).tolist()


def test_greedy_takes_the_first_of_the_largest() -> None:
    logits = torch.zeros(3, VOCAB)
    logits[1, [7, 40]] = 5.0
    logits[2, VOCAB - 1] = 1.0
    out = Sampler().sample(logits, rows_of([SamplingParams(temperature=0)] * 3, [[1]] * 3))
    assert out.tokens.tolist() == [0, 7, VOCAB - 1] and out.logprobs is None


def test_allowed_token_ids() -> None:
    logits = logits_of(1)[0]
    worst = greedy_order(logits)[-3:]
    assert one(logits, SamplingParams(temperature=0, allowed_token_ids=worst), [1], []) == worst[0]


def test_bad_word_of_one_token() -> None:
    logits = logits_of(1)[0]
    first, second = greedy_order(logits)[:2]
    assert one(logits, SamplingParams(temperature=0, bad_words_token_ids=[[first]]), [1], []) == second


def test_bad_word_of_three_tokens_is_banned_only_after_its_prefix() -> None:
    logits = logits_of(1)[0]
    first, second = greedy_order(logits)[:2]
    params = SamplingParams(temperature=0, bad_words_token_ids=[[8, 9, first]])
    assert one(logits, params, [1, 8], [9]) == second
    assert one(logits, params, [1, 9], [8]) == first
    assert one(logits, params, [9], []) == first  # shorter than the prefix
    assert one(logits, SamplingParams(temperature=0, bad_words_token_ids=[[]]), [9], []) == first  # a word of no tokens


def test_min_tokens_keeps_eos_and_stop_tokens_away() -> None:
    logits = logits_of(1)[0]
    order = greedy_order(logits)
    params = SamplingParams(temperature=0, min_tokens=2, stop_token_ids=[order[1]])
    assert one(logits, params, [1], [2], eos=(order[0],)) == order[2]
    assert one(logits, params, [1], [2, 3], eos=(order[0],)) == order[0]
    # A request that ignores end tokens comes without them, and may choose them at any time.
    assert one(logits, params, [1], [2], eos=()) == order[0]


def test_logit_bias() -> None:
    logits = logits_of(1)[0]
    order = greedy_order(logits)
    assert one(logits, SamplingParams(temperature=0, logit_bias={order[0]: -100.0, order[5]: 100.0}), [1], []) == order[5]


def test_repetition_penalty_covers_prompt_and_output() -> None:
    logits = torch.full((VOCAB,), -9.0)
    logits[3], logits[4], logits[5] = 4.0, 3.9, 1.5
    params = SamplingParams(temperature=0, repetition_penalty=2.0)
    assert one(logits, params, [1], []) == 3
    assert one(logits, params, [3], []) == 4
    assert one(logits, params, [3, 3], [4]) == 3  # halved once, however often it was used
    negative = torch.full((VOCAB,), -9.0)
    negative[3], negative[4] = -1.0, -1.5
    assert one(negative, params, [3], []) == 4


def test_presence_and_frequency_cover_output_only() -> None:
    logits = torch.full((VOCAB,), -9.0)
    logits[3], logits[4] = 4.0, 3.0
    presence = SamplingParams(temperature=0, presence_penalty=1.5)
    assert one(logits, presence, [3, 3], []) == 3
    assert one(logits, presence, [1], [3]) == 4
    frequency = SamplingParams(temperature=0, frequency_penalty=0.6)
    assert one(logits, frequency, [1], [3]) == 3
    assert one(logits, frequency, [1], [3, 3]) == 4
    assert one(logits, SamplingParams(temperature=0, frequency_penalty=-1.1), [1], [4]) == 4


def test_nothing_left_lifts_the_bans_of_this_token() -> None:
    logits = logits_of(1)[0]
    params = SamplingParams(temperature=0, allowed_token_ids=[5], min_tokens=3, bad_words_token_ids=[[5]])
    assert one(logits, params, [1], [], eos=(5,)) == 5
    assert one(logits, SamplingParams(allowed_token_ids=[5], min_tokens=3), [1], [], eos=(5,)) == 5


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_improper_logits_name_a_token_and_leave_other_rows_alone(bad: float) -> None:
    logits = logits_of(3)
    good = Sampler().sample(logits.clone(), rows_of([SamplingParams(top_p=0.9)] * 3, [[1]] * 3)).tokens
    logits[1] = bad
    out = Sampler().sample(logits, rows_of([SamplingParams(top_p=0.9)] * 3, [[1]] * 3)).tokens
    assert out[[0, 2]].tolist() == good[[0, 2]].tolist() and 0 <= out[1] < VOCAB


def kept_by(params: SamplingParams, logits: torch.Tensor) -> set[int]:
    """The tokens that can be drawn, seen by walking u through [0, 1)."""
    n = 4000
    u = (np.arange(n) + 0.5) / n
    many = logits.numpy()[None].repeat(n, 0)
    full = {name: np.full(n, getattr(params, name)) for name in ("temperature", "min_p", "top_k", "top_p")}
    return set(draw(many, u, **full).tolist())


def test_truncation_keeps_exactly_the_oracles_tokens() -> None:
    logits = torch.log(torch.tensor([0.30, 0.02, 0.25, 0.01, 0.20, 0.15, 0.07]))
    assert kept_by(SamplingParams(), logits) == set(range(7))
    assert kept_by(SamplingParams(top_k=3), logits) == {0, 2, 4}
    assert kept_by(SamplingParams(top_k=1), logits) == {0}
    assert kept_by(SamplingParams(top_k=100), logits) == set(range(7))
    assert kept_by(SamplingParams(top_p=0.5), logits) == {0, 2}
    assert kept_by(SamplingParams(top_p=0.6), logits) == {0, 2, 4}
    assert kept_by(SamplingParams(top_p=1e-9), logits) == {0}
    assert kept_by(SamplingParams(min_p=0.49), logits) == {0, 2, 4, 5}
    assert kept_by(SamplingParams(min_p=1.0), logits) == {0}
    # top_p counts within what top_k left: 0.30 and 0.25 of 0.55
    assert kept_by(SamplingParams(top_k=2, top_p=0.5), logits) == {0}
    assert kept_by(SamplingParams(top_k=2, top_p=0.6), logits) == {0, 2}


def test_ties_top_k_keeps_equals_and_top_p_the_lower_ids() -> None:
    flat = torch.zeros(8)
    assert kept_by(SamplingParams(top_k=2), flat) == set(range(8))
    assert kept_by(SamplingParams(top_p=0.5), flat) == {0, 1, 2, 3}


def test_draw_inverts_the_cdf_in_token_order() -> None:
    logits = torch.log(torch.tensor([[0.1, 0.2, 0.3, 0.4]])).repeat(5, 1).numpy()
    u = np.array([0.0, 0.0999, 0.1001, 0.5999, 1 - 2**-53])
    off = np.zeros(5)
    cuts = {"min_p": off, "top_k": off.astype(np.int64), "top_p": np.ones(5)}
    assert draw(logits, u, temperature=np.ones(5), **cuts).tolist() == [0, 0, 1, 2, 3]


def test_logprobs_are_of_the_raw_distribution() -> None:
    logits = logits_of(3)
    expected = torch.log_softmax(logits.double(), -1)
    params = [SamplingParams(temperature=0, logprobs=4, logit_bias={9: 100.0}), SamplingParams(temperature=0), SamplingParams(logprobs=0)]
    out = Sampler().sample(logits.clone(), rows_of(params, [[1]] * 3))
    assert out.logprobs is not None and out.logprobs[1] is None
    first, last = out.logprobs[0], out.logprobs[2]
    assert first is not None and last is not None
    assert first.token_ids == [9, *greedy_order(logits[0])[:4]]
    assert first.logprobs == pytest.approx([float(expected[0, t]) for t in first.token_ids], abs=1e-5)
    assert first.rank == greedy_order(logits[0]).index(9) + 1
    token = int(out.tokens[2])
    assert last.token_ids == [token] and last.logprobs == pytest.approx([float(expected[2, token])], abs=1e-5)


def test_logprobs_with_ties_list_the_lower_id_first() -> None:
    logits = torch.zeros(1, VOCAB)
    out = Sampler().sample(logits, rows_of([SamplingParams(temperature=0, logprobs=VOCAB)], [[1]]))
    assert out.logprobs is not None and out.logprobs[0] is not None
    assert out.logprobs[0].token_ids == [0, *range(VOCAB)] and out.logprobs[0].rank == 1


def test_state_rows_and_columns_agree() -> None:
    """The batch state hands the sampler what the request asked for."""
    from lockstep.protocol import NewRequest, StepPlan

    state = BatchState(4, 32, 4)
    params = SamplingParams(temperature=0.5, top_k=3, top_p=0.9, min_p=0.1, logprobs=2, presence_penalty=1.0)
    new = NewRequest(slot=2, request_id="a", token_ids=[5, 6, 7], num_prompt_tokens=2, block_ids=[0], sampling=params, seed=-9, choice=3)
    state.apply(StepPlan(step=0, slots=[2], num_computed=[0], num_tokens=[3], samples=[True], new=[new]))
    rows = state.sample_rows(np.array([2]))
    got = [x[0] for x in (rows.greedy, rows.temperature, rows.top_k, rows.top_p, rows.min_p, rows.seeds, rows.choices, rows.positions)]
    assert got == [False, 0.5, 3, 0.9, 0.1, -9, 3, 3] and rows.logprobs[0] == 2
    altered = rows.altered[0]
    assert altered.row == 0 and altered.tokens.tolist() == [5, 6, 7] and altered.num_prompt_tokens == 2 and altered.params is params
