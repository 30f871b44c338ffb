"""The paged attention backend against attention written out token by token, over random batches."""

import random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.attention import plan as plans
from lockstep.attention import torch_backend
from lockstep.attention.backends import BACKENDS, make_backend
from lockstep.attention.batch import AttentionBatch
from lockstep.attention.layer import Attention, HeadGroups, KVLayerSpec
from lockstep.testing.attention import Rows

GROUPINGS = [(0, 0, 1, 1), (0, 1), (0, 0, 0), (0, 0, 1), (0, 1, 1, 1, 2), (0,), (0, 0, 1, 1, 1, 2, 2)]


@pytest.fixture(autouse=True)
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def make_layer(kv_of_q=(0, 0, 1, 1), head_dim=8, backend="torch", **kwargs):
    num_kv = max(kv_of_q) + 1
    return Attention(len(kv_of_q), kv_of_q, num_kv, head_dim, **{"scale": 0.4, **kwargs}, backend=make_backend(backend))


def run(layer, lengths, steps, *, block_size=4, seed=0, dtype=torch.float32):
    """Every step's result against the oracle's. `steps` hold each row's token count (0: not in this step)."""
    rows = Rows(layer, lengths, block_size=block_size, seed=seed, dtype=dtype)
    worst = 0.0
    for counts in steps:
        found, wanted = rows.step(counts)
        assert found.shape == wanted.shape and found.dtype == dtype
        assert torch.isfinite(found).all(), "what was never written reached the result"
        worst = max(worst, (found.double() - wanted).abs().max().item())
    return worst


@pytest.mark.parametrize("backend", sorted(BACKENDS))
@pytest.mark.parametrize("window", [None, 1, 3, 8, 100])
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("kv_of_q", GROUPINGS)
def test_prefill_chunks_and_decode(backend, window, softcap, kv_of_q):
    layer = make_layer(kv_of_q, window=window, softcap=softcap, backend=backend)
    steps = [[7, 12, 1, 3, 0], [1, 1, 4, 1, 1], [1, 1, 1, 1, 9], [5, 1, 0, 2, 1], [1, 1, 1, 1, 1]]
    assert run(layer, [16] * 5, steps) < 1e-5


@settings(max_examples=60, deadline=None)
@given(st.data())
def test_random_batches(data):
    seed = data.draw(st.integers(0, 10**6))
    rng = random.Random(seed)
    layer = make_layer(
        rng.choice(GROUPINGS), rng.choice([4, 8, 24]), window=rng.choice([None, 1, 5, 16]), softcap=rng.choice([None, None, 2.0])
    )
    lengths = [data.draw(st.integers(1, 40)) for _ in range(data.draw(st.integers(1, 6)))]
    steps, done = [], [0] * len(lengths)
    while done != lengths:
        counts = [min(rng.choice([0, 1, 1, rng.randint(1, 12)]), n - at) for n, at in zip(lengths, done, strict=True)]
        if any(counts):
            steps.append(counts)
        done = [at + n for at, n in zip(done, counts, strict=True)]
    assert run(layer, lengths, steps, block_size=rng.choice([1, 2, 8, 16]), seed=seed) < 1e-5


@pytest.mark.parametrize("window", [None, 6])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_small_chunks_and_tiles(monkeypatch, window, softcap):
    """Limits so low that every row is a chunk of its own and prompts take many tiles."""
    monkeypatch.setitem(torch_backend.WORKSPACE_BYTES, "cpu", 1)
    monkeypatch.setattr(torch_backend, "TILE", 3)
    monkeypatch.setattr(torch_backend, "SOFTCAP_TILE", 2)
    layer = make_layer(window=window, softcap=softcap)
    assert run(layer, [30, 11, 20], [[17, 5, 1], [1, 1, 8], [9, 1, 1], [1, 1, 1]]) < 1e-5


@pytest.mark.parametrize(("dtype", "bound"), [(torch.bfloat16, 3e-2), (torch.float16, 4e-3)])
@pytest.mark.parametrize("softcap", [None, 2.0])
def test_half_types(dtype, bound, softcap):
    assert run(make_layer(softcap=softcap), [20, 9], [[12, 1], [1, 5], [1, 1]], dtype=dtype) < bound


def test_rows_in_another_order_give_the_same():
    """Rows may come in any order, prefill between decode: each one's result follows it."""
    layer = make_layer()
    lengths = [30, 5, 17, 12, 24]
    rows = Rows(layer, lengths, block_size=4)
    rows.step([29, 4, 10, 11, 23])
    counts = [1, 1, 7, 1, 1]
    for order in ([0, 1, 2, 3, 4], [3, 2, 4, 0, 1], [2, 4, 3, 1, 0]):
        found, wanted = rows.step(counts, order=order, advance=False)
        assert (found - wanted).abs().max() < 1e-5


def test_values_left_by_an_earlier_owner_never_matter():
    """A block's last owner overflowed: its NaN and infinities are still there when the block is dealt again."""
    for poison in (torch.nan, torch.inf, 3e38):
        layer = make_layer()
        rows = Rows(layer, [19, 6, 33], block_size=8, fill=poison)
        for counts in ([2, 3, 20], [1, 1, 1], [7, 1, 5], [1, 1, 1]):
            found, wanted = rows.step(counts)
            assert (found - wanted).abs().max() < 1e-5


def test_another_rows_cache_is_untouched():
    layer = make_layer()
    rows = Rows(layer, [20, 20], block_size=4)
    rows.step([9, 10])
    before = layer.kv[:, rows.tables[1]].clone()
    rows.step([6, 0])
    assert torch.equal(layer.kv[:, rows.tables[1]].nan_to_num(-1), before.nan_to_num(-1))


def test_the_batch_built_from_lists():
    tables = [[7, 3, 9], [4], [1, 5]]
    batch = AttentionBatch.build([3, 1, 2], [10, 1, 7], tables, 4)
    assert batch.positions.tolist() == [7, 8, 9, 0, 5, 6]
    assert batch.slot_mapping.tolist() == [3 * 4 + 3, 9 * 4, 9 * 4 + 1, 4 * 4, 5 * 4 + 1, 5 * 4 + 2]
    assert batch.query_start.tolist() == [0, 3, 4, 6] and batch.num_tokens == 6 and batch.num_rows == 3
    # Row 0 begins block 9 and row 1 block 4; row 2's last block was begun before.
    assert batch.fresh_blocks.tolist() == [9, 4]
    wide = np.array([[7, 3, 9, 99], [4, 99, 99, 99], [1, 5, 99, 99]], np.int32)
    for same in (wide, torch.from_numpy(wide)):
        other = AttentionBatch.build(np.array([3, 1, 2]), np.array([10, 1, 7]), same, 4)
        assert torch.equal(other.slot_mapping, batch.slot_mapping) and torch.equal(other.positions, batch.positions)


def test_no_fresh_block_where_a_step_fills_it():
    assert AttentionBatch.build([4], [8], [[2, 3]], 4).fresh_blocks is None
    assert AttentionBatch.build([1], [7], [[2, 3]], 4).fresh_blocks is None
    assert AttentionBatch.build([1], [5], [[2, 3]], 4).fresh_blocks.tolist() == [3]


@pytest.mark.parametrize(
    ("queries", "seqs", "tables"),
    [([0], [4], [[1]]), ([5], [4], [[1, 2]]), ([1], [9], [[1, 2]]), ([1, 1], [2], [[1], [2]]), ([1], [2], [[1], [2]])],
)
def test_impossible_batches_are_refused(queries, seqs, tables):
    with pytest.raises(AssertionError):
        AttentionBatch.build(queries, seqs, tables, 4)


def test_plans_are_made_once_a_step():
    layer = make_layer()
    made = []
    original = torch_backend.decode_plan
    torch_backend.decode_plan = lambda *args: made.append(1) or original(*args)
    try:
        layer.bind_kv(torch.zeros(2, 4, 4, 2, 8))
        batch = AttentionBatch.build([1, 1], [3, 5], [[0], [1, 2]], 4)
        for _ in range(5):
            layer(torch.randn(2, 4, 8), torch.randn(2, 2, 8), torch.randn(2, 2, 8), batch)
    finally:
        torch_backend.decode_plan = original
    assert made == [1]


@given(st.lists(st.integers(1, 300), min_size=1, max_size=200), st.integers(1, 2000))
def test_decode_chunks_cover_rows_within_bounds(needs, room):
    needs.sort()
    cuts = plans._cut(needs, room)
    assert [i for start, stop in cuts for i in range(start, stop)] == list(range(len(needs)))
    for start, stop in cuts:
        padded = (stop - start) * needs[stop - 1]
        assert stop - start == 1 or (padded <= room and padded <= plans.PADDING * sum(needs[start:stop]) + 8)


def test_equal_rows_share_one_chunk():
    assert plans._cut([5] * 40, 1000) == [(0, 40)]


@pytest.mark.parametrize("kv_of_q", GROUPINGS)
def test_head_groups_there_and_back(kv_of_q):
    groups = HeadGroups(kv_of_q, max(kv_of_q) + 1)
    q = torch.arange(3 * len(kv_of_q) * 2.0).view(3, len(kv_of_q), 2)
    split = groups.split(q)
    assert split.shape[1] == max(kv_of_q) + 1
    assert torch.equal(groups.join(split), q)
    for i, kv in enumerate(kv_of_q):
        assert any(torch.equal(split[:, kv, j], q[:, i]) for j in range(split.shape[2]))
    if len({kv_of_q.count(kv) for kv in kv_of_q}) == 1:
        assert split.data_ptr() == q.data_ptr(), "an even grouping is a view"


def test_an_unread_kv_head_is_a_bug():
    with pytest.raises(AssertionError, match="unread"):
        HeadGroups((0, 2), 3)


def test_the_cache_must_fit_the_layer():
    layer = make_layer()
    for shape in ((2, 4, 4, 3, 8), (2, 4, 4, 2, 4), (3, 4, 4, 2, 8), (2, 4, 2, 8)):
        with pytest.raises(AssertionError):
            layer.bind_kv(torch.zeros(shape))
    with pytest.raises(AssertionError, match="contiguous"):
        layer.bind_kv(torch.zeros(2, 4, 2, 4, 8).transpose(2, 3))
    assert KVLayerSpec(2, 8).bytes_per_block(4, 2) == torch.zeros(2, 1, 4, 2, 8, dtype=torch.bfloat16).numel() * 2


def test_unknown_backend():
    with pytest.raises(ValueError, match=r"'fast' is not known: use one of .*torch"):
        make_backend("fast")


@pytest.mark.cuda
@pytest.mark.parametrize("kv_of_q", GROUPINGS)
@pytest.mark.parametrize("softcap", [None, 1.5])
@pytest.mark.parametrize("window", [None, 5])
def test_cuda(kv_of_q, softcap, window):
    groups = Attention(
        len(kv_of_q), kv_of_q, max(kv_of_q) + 1, 8, scale=0.4, window=window, softcap=softcap, backend=make_backend(), device="cuda"
    )
    rows = Rows(groups, [16] * 4, block_size=4, device="cuda")
    for counts in ([7, 12, 1, 3], [1, 1, 4, 1], [1, 1, 1, 1], [5, 1, 1, 2]):
        found, wanted = rows.step(counts)
        assert (found.cpu().double() - wanted).abs().max() < 1e-4
