"""Sampling as a whole: right distributions, and a row's token depends on nothing but the row."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.protocol import SamplingParams
from lockstep.worker.sampler import Sampler
from tests.unit.test_sampler import logits_of, rows_of

DRAWS = 20_000


def oracle(logits: np.ndarray, p: SamplingParams) -> np.ndarray:
    """Probabilities, the slow way: sorted lists and loops."""
    weights = np.exp((logits.astype(np.float64) - logits.max()) / p.temperature)
    probs = weights / weights.sum()
    probs = np.where(probs >= p.min_p * probs.max(), probs, 0)
    if 0 < p.top_k < len(probs):
        probs = np.where(probs >= sorted(probs, reverse=True)[p.top_k - 1], probs, 0)
    probs /= probs.sum()
    kept, mass = np.zeros_like(probs), 0.0
    for token in sorted(range(len(probs)), key=lambda t: (-probs[t], t)):
        if p.top_p < 1 and mass >= p.top_p:
            break
        kept[token], mass = probs[token], mass + probs[token]
    return kept / kept.sum()


@pytest.mark.parametrize(
    "params",
    [
        SamplingParams(),
        SamplingParams(temperature=0.6),
        SamplingParams(temperature=1.7),
        SamplingParams(top_k=5),
        SamplingParams(top_p=0.8),
        SamplingParams(min_p=0.1),
        SamplingParams(temperature=1.3, min_p=0.02, top_k=12, top_p=0.95),
    ],
    ids=str,
)
def test_chi_square(params: SamplingParams) -> None:
    logits = logits_of(1, seed=5, vocab=24) * 0.6
    expected = oracle(logits[0].numpy(), params) * DRAWS
    many = logits.repeat(DRAWS, 1)
    tokens = Sampler().sample(many, rows_of([params] * DRAWS, [[1]] * DRAWS, seeds=list(range(100, 100 + DRAWS)))).tokens
    seen = np.bincount(tokens, minlength=24)
    assert (seen[expected == 0] == 0).all(), "a token outside the kept set was drawn"
    rare = expected < 5
    cells_seen = np.append(seen[~rare], seen[rare].sum())
    cells_expected = np.append(expected[~rare], expected[rare].sum())
    live = cells_expected > 0
    chi2 = ((cells_seen - cells_expected)[live] ** 2 / cells_expected[live]).sum()
    df = int(live.sum()) - 1
    assert chi2 < df + 4 * (2 * df) ** 0.5 + 8, f"chi2={chi2} with {df} degrees of freedom"


param_sets = st.builds(
    SamplingParams,
    temperature=st.sampled_from([0.0, 0.3, 1.0, 2.5]),
    top_k=st.sampled_from([0, 1, 4, 1000]),
    top_p=st.sampled_from([1.0, 0.9, 0.3, 1e-6]),
    min_p=st.sampled_from([0.0, 0.05, 0.9]),
    logprobs=st.sampled_from([None, 0, 5]),
    repetition_penalty=st.sampled_from([1.0, 1.5]),
    presence_penalty=st.sampled_from([0.0, -1.0]),
    frequency_penalty=st.sampled_from([0.0, 0.5]),
    logit_bias=st.sampled_from([None, {3: 2.5}]),
    min_tokens=st.sampled_from([0, 8]),
    bad_words_token_ids=st.sampled_from([None, [[1, 2], [4]]]),
)


@settings(max_examples=60, deadline=None)
@given(
    params=st.lists(param_sets, min_size=2, max_size=33),
    vocab=st.sampled_from([7, 61, 1031, 5000]),
    seed=st.integers(-(2**63), 2**63 - 1),
    data=st.data(),
)
def test_a_row_alone_equals_the_row_among_others(params: list[SamplingParams], vocab: int, seed: int, data: st.DataObject) -> None:
    n = len(params)
    logits = logits_of(n, seed=seed % 1000, vocab=vocab)
    tokens = np.random.default_rng(seed % 1000).integers(0, vocab, (n, 6)).tolist()
    prompts, outputs = [t[:3] for t in tokens], [t[3:] for t in tokens]
    for p in params:
        if vocab == 7 and p.logit_bias:
            assert max(p.logit_bias) < vocab
    sampler = Sampler()
    together = sampler.sample(logits.clone(), rows_of(params, prompts, outputs, [seed] * n, eos=(5,)))
    row = data.draw(st.integers(0, n - 1))
    alone = sampler.sample(logits[row : row + 1].clone(), rows_of([params[row]], [prompts[row]], [outputs[row]], [seed], eos=(5,)))
    assert alone.tokens[0] == together.tokens[row]
    assert (alone.logprobs or [None])[0] == (together.logprobs or [None] * n)[row]
    if params[row].temperature > 0 and not (params[row].min_tokens or params[row].bad_words_token_ids):
        assert 0 <= alone.tokens[0] < vocab


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), top_p=st.floats(1e-6, 0.999999), spread=st.sampled_from([0.0, 0.01, 1.0, 8.0]))
def test_top_p_never_sorts_away_a_token_it_should_keep(seed: int, top_p: float, spread: float) -> None:
    """The pre-filter before the sort changes nothing: same kept set as the oracle's, up to mass that rounds."""
    from lockstep.kernels.reference.sampling import keep_top_p

    logits = logits_of(1, seed=seed, vocab=300)[0].numpy() * spread
    weights = np.exp(logits.astype(np.float64) - logits.max())
    full = weights / weights.sum()
    keep_top_p(weights, top_p)
    kept = full[weights > 0]
    assert kept.sum() >= top_p * (1 - 1e-9), "the kept set holds its share"
    assert kept.sum() - kept.min() <= top_p * (1 + 1e-9), "and no token more"
    assert kept.min() >= full[weights == 0].max(initial=0), "of the largest"


def test_same_seed_same_tokens_other_seed_others() -> None:
    logits = logits_of(1, vocab=500).repeat(64, 1) * 0.1
    params = [SamplingParams()] * 64

    def run(base: int) -> list[int]:
        return Sampler().sample(logits.clone(), rows_of(params, [[1]] * 64, seeds=[base + i for i in range(64)])).tokens.tolist()

    assert run(0) == run(0)
    assert run(0) != run(1000)


def test_thread_count_changes_nothing() -> None:
    logits = logits_of(8, vocab=40_000)
    rows = rows_of([SamplingParams(logprobs=3, top_p=0.9), SamplingParams(temperature=0, logprobs=3)] * 4, [[1]] * 8)
    before = torch.get_num_threads()
    try:
        results = []
        for threads in (1, 2, 3):
            torch.set_num_threads(threads)
            out = Sampler().sample(logits.clone(), rows)
            results.append((out.tokens.tolist(), out.logprobs))
    finally:
        torch.set_num_threads(before)
    assert results[0] == results[1] == results[2]
