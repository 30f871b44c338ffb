"""The attention kernels of every variant against plain torch, and their promise: one set of bits, however the work is cut."""

from __future__ import annotations

import random

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.kernels.variants import EMULATED, usable
from tests.unit.kernel_attention_rows import Shape, Weights, alone, cut, run
from tests.unit.kernel_variants import load_or_skip

VARIANTS = [*usable(), *([EMULATED] if EMULATED.needs <= usable()[0].needs else [])]
GROUPINGS = [(0, 0, 1, 1), (0,), (0, 1, 2), (0, 0, 0, 0, 0, 0, 0), (0, 0, 1), (0, 1, 1, 1, 1, 1, 2), (1, 0, 1, 0), (0,) * 40]
BOUND = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 3e-3}
DTYPES = list(BOUND)


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda v: v.name)
def lib(request):
    return load_or_skip(request.param)


def shapes(rng: random.Random) -> Shape:
    head_dim = rng.choice([2, 8, 16, 24, 64, 80, 128])
    return Shape(
        kv_of_q=rng.choice(GROUPINGS),
        head_dim=head_dim,
        half=rng.choice([head_dim // 2, head_dim // 4, head_dim // 2]),
        scale=head_dim**-0.5,
        window=rng.choice([0, 0, 1, 5, 16, 33, 300]),
        softcap=rng.choice([0.0, 0.0, 2.0]),
        qk_norm=rng.choice([None, None, False, True]),
        dtype=rng.choice(DTYPES),
    )


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 10**6))
def test_random_batches_compute_attention(lib, seed):
    rng = random.Random(seed)
    shape = shapes(rng)
    lengths = [rng.choice([1, 2, 15, 16, 17, rng.randint(1, 90), rng.randint(200, 600)]) for _ in range(rng.randint(1, 4))]
    weights = Weights(shape, lengths, seed)
    found = run(lib, weights, cut(rng, lengths), block_size=rng.choice([16, 32, 48]), threads=rng.choice([1, 2, 3]), deal=seed)
    for row, result in enumerate(found):
        assert torch.isfinite(result).all(), "what was never written reached the result"
        assert (result.float() - weights.wanted(row).float()).abs().max() < BOUND[shape.dtype]


@settings(max_examples=25, deadline=None, derandomize=True)
@given(st.integers(0, 10**6))
def test_bits_do_not_depend_on_how_the_work_is_cut(lib, seed):
    """Steps, rows around, their order, block tables and sizes, threads, and what was in the cache's memory."""
    rng = random.Random(seed)
    shape = shapes(rng)
    lengths = [rng.choice([1, 16, 31, rng.randint(1, 90), rng.randint(250, 800)]) for _ in range(rng.randint(1, 3))]
    weights = Weights(shape, lengths, seed)
    wanted = run(lib, weights, fill=0.0)
    order = rng.sample(range(len(lengths)), len(lengths))
    for block_size, threads in ((16, 2), (32, 3), (48, 1)):
        fill = rng.choice([torch.nan, torch.inf, -3e38 if shape.dtype != torch.float16 else -6e4])
        found = run(lib, weights, cut(rng, lengths), block_size=block_size, threads=threads, deal=rng.randrange(99), fill=fill, order=order)
        assert all(map(torch.equal, found, wanted))
    row = rng.randrange(len(lengths))
    assert torch.equal(run(lib, alone(weights, row), threads=2)[0], wanted[row])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("threads", [2, 3, 5])
def test_long_rows_shared_out_within_a_row(lib, dtype, threads):
    """Fewer items than threads: one row's context is cut between them, at spans."""
    shape = Shape((0, 0, 0), 24, 12, dtype=dtype)
    weights = Weights(shape, [1500, 300], 3)
    steps = [[1498, 299], [1, 1], [1, 0]]
    wanted = run(lib, weights, steps)
    assert all(map(torch.equal, run(lib, weights, steps, threads=threads, block_size=32), wanted))
    assert all(map(torch.equal, run(lib, weights, threads=threads, deal=4), wanted))


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [1, 16, 17, 40, 256])
def test_windows_far_from_the_start(lib, dtype, window):
    shape = Shape((0, 0), 16, 8, window=window, dtype=dtype)
    weights = Weights(shape, [700], 5)
    wanted = weights.wanted(0).float()
    chunked = run(lib, weights, [[333], [1], [1], [200], [165]])[0]
    assert (chunked.float() - wanted).abs().max() < BOUND[dtype]
    assert torch.equal(chunked, run(lib, weights)[0])


@pytest.mark.parametrize("dtype", DTYPES)
def test_scores_of_any_size(lib, dtype):
    """Softmax over scores of thousands: one key has all the weight, and nothing overflows."""
    shape = Shape((0, 0), 16, 8, scale=300.0, dtype=dtype)
    weights = Weights(shape, [300], 7)
    found, wanted = run(lib, weights)[0].float(), weights.wanted(0).float()
    assert torch.isfinite(found).all()
    close = (found - wanted).abs().amax(-1) < BOUND[dtype] * 10
    assert close.float().mean() > 0.97  # two keys within float32 rounding of each other may share the weight differently


def test_a_queries_own_nan_shows(lib):
    weights = Weights(Shape(), [40], 1)
    weights.qkv[0][20, 0] = torch.nan  # one query head of one token
    found = run(lib, weights)[0].view(40, 4, 16)
    assert found[20, 0].isnan().all()
    found[20, 0] = 0
    assert torch.isfinite(found).all()


@pytest.mark.parametrize("value", [torch.inf, -torch.inf, torch.nan], ids=str)
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("window", [0, 4, 40])
def test_what_is_not_finite_reaches_those_that_see_it_and_nobody_else(lib, dtype, value, window):
    """A weight of 0 times infinity is not 0: neither earlier tokens nor those whose window has gone on may be touched."""
    weights, length, bad = Weights(Shape(window=window, dtype=dtype, head_dim=24, half=12), [600], 11), 600, 277
    good = run(lib, weights)[0].view(length, 4, 24)
    weights.qkv[0][bad, 6, 5] = value  # one dim of the first KV head's value
    sees = torch.zeros(length, dtype=torch.bool)
    sees[bad : bad + window if window else length] = True
    for steps in (None, [[bad + 1], [1], [length - bad - 2]], [[250], [350]]):
        found = run(lib, weights, steps, threads=2)[0].view(length, 4, 24)
        spoilt = found != good
        assert torch.equal(spoilt[:, :2, 5], sees[:, None].expand(-1, 2)) and not found[sees][:, :2, 5].isfinite().any()
        spoilt[:, :2, 5] = False
        assert not spoilt.any()


@pytest.mark.parametrize(
    ("change", "word"),
    [
        ({"block_size": 8}, "block_size=8"),
        ({"block_size": 0}, "block_size=0"),
        ({"head_dim": 7}, "head_dim=7"),
        ({"scale": 0.0}, "scale > 0"),
    ],
)
def test_what_cannot_be_is_refused(lib, change, word):
    args = {"num_q": 1, "num_kv": 1, "head_dim": 16, "scale": 1.0, "block_size": 16, **change}
    heads = torch.zeros(1, dtype=torch.int32)
    with pytest.raises(ValueError, match=word):
        lib.op_attention(0, 0, 0, 0, 1, 1, args["head_dim"], heads.data_ptr(), args["scale"], 0, 0.0, 0, 4, args["block_size"], 0)


def test_a_head_that_is_not_there_is_refused(lib):
    heads = torch.tensor([0, 2], dtype=torch.int32)
    with pytest.raises(ValueError, match=r"kv_of_q\[1\]=2"):
        lib.op_attention(0, 0, 0, 0, 2, 2, 16, heads.data_ptr(), 1.0, 0, 0.0, 0, 4, 16, 0)
