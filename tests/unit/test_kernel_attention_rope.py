"""Angles, head norms, rotation and the paged KV store of every variant against plain torch."""

from __future__ import annotations

import pytest
import torch

from lockstep.kernels.reference import attention as reference
from lockstep.kernels.variants import EMULATED, usable
from tests.unit.kernel_attention_rows import Cache, Layer, Shape, Weights
from tests.unit.kernel_variants import load_or_skip

VARIANTS = [*usable(), *([EMULATED] if EMULATED.needs <= usable()[0].needs else [])]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
STEP = {torch.float32: 4e-6, torch.bfloat16: 2**-7, torch.float16: 2**-10}  # one step of rounding, or some


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda v: v.name)
def lib(request):
    return load_or_skip(request.param)


def cached(lib, layer: Layer, row: int, length: int):
    """A row's keys and values as the cache holds them, `[length, num_kv, head_dim]` each."""
    shape, cache = layer.weights.shape, layer.cache
    k, v = (torch.full((length, shape.num_kv, shape.head_dim), torch.nan, dtype=shape.dtype) for _ in range(2))
    slots = cache.slots(row, length)
    place = (cache.kv.data_ptr(), cache.num_blocks, cache.block_size, shape.num_kv, shape.head_dim, shape.code)
    lib.kv_read(*place, slots.data_ptr(), length, k.data_ptr(), v.data_ptr())
    return k, v


def near(found, wanted, *, steps=1.0):
    return ((found.float() - wanted.float()).abs() <= steps * STEP[found.dtype] * wanted.float().abs().clamp(min=0.25)).all()


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize(("head_dim", "half"), [(16, 8), (2, 1), (24, 12), (80, 16), (128, 64), (64, 0)])
@pytest.mark.parametrize("qk_norm", [None, False, True])
def test_norm_rotation_and_store(lib, dtype, head_dim, half, qk_norm):
    lib.team_set(2, 0, 0)
    shape = Shape((0, 0, 1), head_dim, half, qk_norm=qk_norm, dtype=dtype)
    weights = Weights(shape, [50, 3], 1)
    layer = Layer(lib, weights, Cache(shape, [50, 3], 32, 1, torch.nan), 53)
    layer.run([0, 1], [0, 0], [50, 3])
    queries = layer.qkv[:53, : 3 * head_dim].reshape(53, 3, head_dim).clone()
    for row, length, mine in ((0, 50, slice(0, 50)), (1, 3, slice(50, 53))):
        q, k, v = weights.prepared(row)
        found_k, found_v = cached(lib, layer, row, length)
        steps = 2 if qk_norm is not None else 1  # rounded twice
        assert near(queries[mine], q, steps=steps) and near(found_k, k, steps=steps)
        assert torch.equal(found_v, v)
    layer.close()


@pytest.mark.parametrize("dtype", DTYPES)
def test_bits_of_the_store_do_not_depend_on_the_step(lib, dtype):
    shape = Shape((0, 0, 1), 24, 12, qk_norm=False, dtype=dtype)
    weights = Weights(shape, [70], 2)
    found = []
    for threads, counts in ((1, [70]), (3, [70]), (2, [1, 15, 1, 30, 23])):
        lib.team_set(threads, 0, 0)
        layer = Layer(lib, weights, Cache(shape, [70], 16, threads, torch.nan), 70)
        done = 0
        for n in counts:
            layer.run([0], [done], [n])
            done += n
        found.append(cached(lib, layer, 0, 70))
        layer.close()
    assert all(torch.equal(k, found[0][0]) and torch.equal(v, found[0][1]) for k, v in found)


def test_angles(lib):
    positions = torch.tensor([0, 1, 7, 2047, 131071])
    inv_freq = 1.0 / 500000 ** (torch.arange(20) / 20)
    out = torch.empty(5, 40)
    program, step = lib.program_new(), lib.step_new()
    lib.program_add(program, lib.op_angles(inv_freq.data_ptr(), 20, out.data_ptr()), "angles")
    lib.step_set(step, 5, 0, positions.data_ptr(), 0, 0, 0, 0, 0, 0, 0, 0)
    lib.program_run(program, step, 0)
    wanted = reference.angles(positions.double(), inv_freq)
    assert (out - wanted).abs().max() < 3e-7
    lib.program_free(program)
    lib.step_free(step)


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("block_size", [16, 48])
def test_what_is_written_is_read(lib, dtype, block_size):
    shape = Shape((0, 1, 2), 10, 5, dtype=dtype)
    place = (3, block_size, 3, 10, shape.code)
    generator = torch.Generator().manual_seed(0)
    k, v, k2, v2 = (torch.randn(3 * block_size, 3, 10, generator=generator).to(dtype) for _ in range(4))
    kv = torch.full((2, 3, block_size * 30), torch.nan, dtype=dtype)
    slots = torch.randperm(3 * block_size, generator=generator)
    lib.kv_write(kv.data_ptr(), *place, slots.data_ptr(), len(slots), k.data_ptr(), v.data_ptr())
    assert torch.isfinite(kv).all(), "a place that no token has"
    lib.kv_read(kv.data_ptr(), *place, slots.data_ptr(), len(slots), k2.data_ptr(), v2.data_ptr())
    assert torch.equal(k, k2) and torch.equal(v, v2)


def test_others_blocks_are_untouched(lib):
    lib.team_set(1, 0, 0)
    weights = Weights(Shape(), [20, 33], 1)
    layer = Layer(lib, weights, Cache(weights.shape, [20, 33], 16, 0, torch.nan), 64)
    layer.run([1], [0], [33])
    before = layer.cache.kv[:, layer.cache.tables[1]].clone()
    layer.run([0], [0], [20])
    assert torch.equal(layer.cache.kv[:, layer.cache.tables[1]].nan_to_num(-1), before.nan_to_num(-1))
    layer.close()


def test_more_rotated_dims_than_there_are_is_refused(lib):
    with pytest.raises(ValueError, match="head_dim=16"):
        lib.op_rope_store(0, 0, 1, 1, 16, 9, 0, 0, 0, 1e-6, False, 0, 4, 16, 0)
