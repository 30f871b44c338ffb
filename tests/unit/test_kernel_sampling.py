"""Choosing tokens: the kernels of every variant against numpy, share by share, and one row's choice whatever its batch."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.kernels import rows
from lockstep.kernels.reference import sampling as reference
from lockstep.kernels.variants import EMULATED, usable
from tests.unit.kernel_variants import load_or_skip

VARIANTS = [*usable(), *([EMULATED] if EMULATED.needs <= usable()[0].needs else [])]
BORDER = 1e-12  # how far shares may lie apart: sums of float64 in two orders
VOCABS = st.one_of(st.integers(1, 300), st.sampled_from([1024, 1025, 4999]))


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda v: v.name)
def lib(request):
    return load_or_skip(request.param)


@pytest.fixture(autouse=True)
def chosen(lib, monkeypatch):
    """`rows` calls this variant."""
    monkeypatch.setattr(rows, "library", lambda: lib)
    lib.team_set(1, 0, 0)


@st.composite
def cuts(draw):
    """(temperature, min_p, top_k, top_p) of one row, each cut off in half of the cases."""
    return (
        draw(st.sampled_from([0.01, 0.3, 1.0, 1.7, 50.0])),
        draw(st.one_of(st.just(0.0), st.floats(0.001, 1.0))),
        draw(st.one_of(st.just(0), st.integers(1, 400))),
        draw(st.one_of(st.just(1.0), st.floats(0.001, 0.9999))),
    )


def line(vocab: int, seed: int, kind: str) -> np.ndarray:
    """[1, vocab] logits. kind: smooth; tied (few values, so many equals); banned (half -inf); flat; peaked."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal(vocab) * {"peaked": 20.0}.get(kind, 3.0)
    if kind == "tied":
        x = np.round(x)
    if kind == "banned":
        x[rng.random(vocab) < 0.5] = -np.inf
        x[rng.integers(vocab)] = 1.0
    return (x * (kind != "flat") if kind != "banned" else x).astype(np.float32)[None]


def shares(lib, logits, temperature, min_p, top_k, top_p):
    out = np.empty(logits.shape[1])
    lib.draw_shares(logits.ctypes.data, logits.shape[1], temperature, min_p, top_k, top_p, out.ctypes.data)
    return out


def reference_shares(logits, temperature, min_p, top_k, top_p):
    sums = reference.running_sums(logits, np.array([temperature]), np.array([min_p]), np.array([top_k]), np.array([top_p]))[0]
    return sums / sums[-1]


def nearby(logits, temperature, min_p, top_k, top_p):
    """The reference's shares with limits as given, then nudged: a token right at one may fall on either side."""
    for a in (0, BORDER, -BORDER):
        for b in (0, BORDER, -BORDER):
            yield reference_shares(logits, temperature, min_p * (1 + a), top_k, min(top_p * (1 + b), 1.0))


@settings(max_examples=150, derandomize=True)
@given(VOCABS, st.integers(0, 10**6), st.sampled_from(["smooth", "tied", "banned", "flat", "peaked"]), cuts())
def test_every_share_is_the_references(lib, vocab, seed, kind, cut):
    logits = line(vocab, seed, kind)
    found = shares(lib, logits, *cut)
    assert any(np.abs(found - wanted).max() <= BORDER for wanted in nearby(logits, *cut))


@settings(max_examples=60, derandomize=True)
@given(VOCABS, st.integers(0, 10**6), st.sampled_from(["smooth", "tied", "banned", "peaked"]), cuts())
def test_a_token_is_the_one_whose_share_holds_u(lib, vocab, seed, kind, cut):
    logits = line(vocab, seed, kind)
    found = shares(lib, logits, *cut)
    u = np.sort(np.random.default_rng(seed).random(20))
    one = np.ones(20)
    tokens = rows.draw(logits.repeat(20, 0), u, temperature=cut[0] * one, min_p=cut[1] * one, top_k=np.full(20, cut[2]), top_p=cut[3] * one)
    before = np.concatenate(([0.0], found[:-1]))
    assert (before[tokens] <= u + BORDER).all() and (u < found[tokens] + BORDER).all()
    assert (found[tokens] > before[tokens]).all(), "a token of no share"


@pytest.mark.parametrize("vocab", [32000, 128256])
def test_large_vocabularies_choose_the_references_tokens(lib, vocab):
    n = 6
    rng = np.random.default_rng(vocab)
    logits = (rng.standard_normal((n, vocab)) * 3).astype(np.float32)
    how = {
        "temperature": np.array([1.0, 0.7, 1.3, 1.0, 0.0, 1.0]),
        "min_p": np.array([0, 0, 0, 0.05, 0, 0.01]),
        "top_k": np.array([0, 50, 0, 0, 0, 1000]),
        "top_p": np.array([1, 1, 0.9, 1, 1, 0.95]),
    }
    for _ in range(2):
        u = rng.random(n)
        assert rows.draw(logits, u, **how).tolist() == reference.draw(logits, u, **how).tolist()


def test_both_ends_of_u(lib):
    logits = line(777, 1, "banned")
    off = {"temperature": np.ones(2), "min_p": np.zeros(2), "top_k": np.zeros(2, np.int64), "top_p": np.ones(2)}
    allowed = np.flatnonzero(np.isfinite(logits[0]))
    assert rows.draw(logits.repeat(2, 0), np.array([0.0, 1 - 2**-53]), **off).tolist() == [allowed[0], allowed[-1]]


def test_a_weight_too_small_for_a_double_is_none(lib):
    """exp of -745 still is a number, of -746 not: such a token must not be drawn, and nothing becomes NaN."""
    logits = np.array([[0.0, -745.0, -746.0, -1e30, -np.inf, 0.0]], np.float32)
    found = shares(lib, logits, 1.0, 0.0, 0, 1.0)
    assert found.tolist() == [0.5, 0.5, 0.5, 0.5, 0.5, 1.0]
    assert shares(lib, logits * 0.01, 0.01, 0.0, 0, 1.0).tolist() == found.tolist()


def test_small_weights_are_exact(lib):
    """Each exponential by itself, over the whole range, to the last bits: beside its like, so that the share tells."""
    for at in np.linspace(-700, -1e-3, 200):
        logits = np.array([[0.0] + [at] * 2], np.float32)
        found = shares(lib, logits[:, 1:], 1.0, 0.0, 0, 1.0)
        assert found.tolist() == [0.5, 1.0]
        wanted = np.exp(np.float64(logits[0, 1]))
        share = shares(lib, logits[:, :2][:, ::-1].copy(), 1.0, 0.0, 0, 1.0)[0]
        assert share == pytest.approx(wanted / (1 + wanted), rel=1e-15, abs=0)


@pytest.mark.parametrize("threads", [1, 2, 3])
def test_a_rows_token_depends_on_nothing_else(lib, threads):
    n, vocab = 33, 9001  # large enough to be shared out
    rng = np.random.default_rng(3)
    logits = (rng.standard_normal((n, vocab)) * 3).astype(np.float32)
    logits[4], logits[9, 7], logits[20, 3] = -np.inf, np.nan, np.inf
    how = {
        "temperature": rng.choice([0.0, 0.5, 1.0], n), "min_p": rng.choice([0, 0.02], n),
        "top_k": rng.choice([0, 5, 200], n), "top_p": rng.choice([0.5, 0.9, 1.0], n),
    }  # fmt: skip
    u = rng.random(n)
    alone = [int(rows.draw(logits[i : i + 1], u[i : i + 1], **{k: v[i : i + 1] for k, v in how.items()})[0]) for i in range(n)]
    assert alone[4] == 0 and alone[9] == 7 and alone[20] == 3
    lib.team_set(threads, 0, 0)
    for count in (1, 2, 5, 16, 33):
        assert rows.draw(logits[:count], u[:count], **{k: v[:count] for k, v in how.items()}).tolist() == alone[:count]
    wide = np.full((n, vocab + 21), np.inf, np.float32)
    wide[:, :vocab] = logits
    assert rows.draw(wide[:, :vocab], u, **how).tolist() == alone, "reads past a row"


@settings(max_examples=150, derandomize=True)
@given(st.integers(1, 4), VOCABS, st.data())
def test_argmax_is_numpys(lib, n, vocab, data):
    rng = np.random.default_rng(data.draw(st.integers(0, 10**6)))
    x = torch.from_numpy(np.round(rng.standard_normal((n, vocab + 5)) * 2).astype(np.float32))[:, :vocab]
    for value in data.draw(st.lists(st.sampled_from([np.nan, np.inf, -np.inf, 9.0, -0.0]), max_size=4)):
        x[data.draw(st.integers(0, n - 1)), data.draw(st.integers(0, vocab - 1))] = value
    if data.draw(st.booleans()):
        x[0] = data.draw(st.sampled_from([-np.inf, np.inf, np.nan, 0.0]))
    wanted = x.numpy().argmax(axis=1)
    ids, values = np.empty(n, np.int64), np.empty(n, np.float32)
    lib.argmax_rows(x.data_ptr(), n, vocab, x.stride(0), ids.ctypes.data, values.ctypes.data)
    assert ids.tolist() == wanted.tolist() == rows.row_argmax(x).tolist()
    assert np.array_equal(values, np.take_along_axis(x.numpy(), wanted[:, None], 1)[:, 0], equal_nan=True)


@settings(max_examples=100, derandomize=True)
@given(st.integers(1, 4), VOCABS, st.integers(0, 10**6), st.integers(0, 40), st.booleans())
def test_logprobs_are_those_of_the_distribution(lib, n, vocab, seed, count, tied):
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((n, vocab)) * 4
    logits = torch.from_numpy((np.round(x) if tied else x).astype(np.float32))
    tokens, count = rng.integers(0, vocab, n), min(count, vocab)
    own, ranks, ids, values = rows.logprobs(logits, tokens, count)
    exact = torch.log_softmax(logits.double(), -1).numpy()
    order = np.lexsort((np.arange(vocab)[None].repeat(n, 0), -logits.numpy()), axis=1)[:, :count]
    assert ids.tolist() == order.tolist()
    assert values == pytest.approx(np.take_along_axis(exact, order, 1), rel=2e-7, abs=1e-7)
    assert own == pytest.approx(np.take_along_axis(exact, tokens[:, None], 1)[:, 0], rel=2e-7, abs=1e-7)
    mine = np.take_along_axis(logits.numpy(), tokens[:, None], 1)
    assert ranks.tolist() == ((logits.numpy() > mine).sum(1) + 1).tolist()
    reference_own, _, _, reference_values = reference.logprobs(logits, tokens, count)
    assert own == pytest.approx(reference_own, rel=1e-5, abs=1e-5) and values == pytest.approx(reference_values, rel=1e-5, abs=1e-5)


def test_logprobs_of_rows_that_are_no_distribution(lib):
    logits = torch.randn(4, 50)
    good = rows.logprobs(logits[3:], np.array([5]), 2)
    logits[0], logits[1, 7], logits[2, 8] = -torch.inf, torch.nan, torch.inf
    own, ranks, ids, values = rows.logprobs(logits, np.array([1, 2, 3, 5]), 2)
    assert np.isnan(own[:3]).all() and np.isnan(values[:3]).all() and ranks[:3].tolist() == [1] * 3 and ids[:3].tolist() == [[0, 1]] * 3
    assert (own[3], ranks[3], ids[3].tolist(), values[3].tolist()) == (good[0][0], good[1][0], good[2][0].tolist(), good[3][0].tolist())


def test_a_banned_token_has_no_probability(lib):
    logits = torch.zeros(1, 20)
    logits[0, 3] = -torch.inf
    own, ranks, ids, values = rows.logprobs(logits, np.array([3]), 20)
    assert own[0] == -np.inf and ranks[0] == 20 and ids[0, -1] == 3 and values[0, -1] == -np.inf
    assert values[0, 0] == pytest.approx(-np.log(19), rel=1e-7)


def test_logprobs_are_the_same_in_any_batch(lib):
    logits, tokens = torch.randn(33, 9001), np.arange(33)
    alone = [rows.logprobs(logits[i : i + 1], tokens[i : i + 1], 5) for i in range(33)]
    for threads in (1, 2, 3):
        lib.team_set(threads, 0, 0)
        for found, one in zip(rows.logprobs(logits, tokens, 5), zip(*alone, strict=True), strict=True):
            assert np.array_equal(found, np.concatenate(one))


def test_a_row_without_a_distribution_has_no_shares(lib):
    x = np.full((1, 4), -np.inf, np.float32)
    with pytest.raises(ValueError, match="no distribution"):
        shares(lib, x, 1.0, 0.0, 0, 1.0)
