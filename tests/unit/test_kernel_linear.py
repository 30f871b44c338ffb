"""The packed linear kernel of every variant that this CPU runs: right, and the same bits however the work is cut."""

from __future__ import annotations

import contextlib
import functools
from itertools import accumulate, pairwise

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.distributed.reduction_tree import ADD, ReductionTree, subtrees
from lockstep.kernels import build, library, variants
from lockstep.kernels.packed import PackedLinear, dtype_code
from lockstep.kernels.reference import linear as reference
from tests.unit.kernel_variants import load_or_skip

USABLE = variants.usable()
VARIANTS = {v.name: v for v in (*USABLE, variants.EMULATED) if v in USABLE or v.needs <= USABLE[0].needs}
FLOATS = (torch.float32, torch.bfloat16, torch.float16)
EVERY_VARIANT = pytest.mark.parametrize("name", VARIANTS)
FEW = settings(max_examples=12, deadline=None)


@functools.cache
def load(name: str):
    return load_or_skip(VARIANTS[name])


@contextlib.contextmanager
def team(lib, threads: int):
    lib.team_set(threads, 0, 0)
    try:
        yield
    finally:
        lib.team_set(1, 0, 0)


def run_op(lib, op, tokens: int) -> None:
    """One step of `tokens` rows with this operation alone."""
    program, step = lib.program_new(), lib.step_new()
    try:
        lib.program_add(program, op, "op")
        lib.step_set(step, tokens, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0)
        assert lib.program_run(program, step, 0) == -1
    finally:
        lib.program_free(program)
        lib.step_free(step)


def run_linear(p: PackedLinear, x, out_dtype, bias=None):
    out = torch.full((x.shape[0], p.shape[0]), float("nan"), dtype=out_dtype)
    op = p._lib.op_linear(
        p.handle,
        x.data_ptr(),
        x.stride(0),
        dtype_code(x.dtype),
        out.data_ptr(),
        p.shape[0],
        dtype_code(out_dtype),
        0 if bias is None else bias.data_ptr(),
    )
    run_op(p._lib, op, x.shape[0])
    return out


def run_gated(p: PackedLinear, x, activation, bias=None):
    out = torch.full((x.shape[0], p.shape[0] // 2), float("nan"), dtype=x.dtype)
    op = p._lib.op_gated(
        p.handle,
        x.data_ptr(),
        x.stride(0),
        dtype_code(x.dtype),
        out.data_ptr(),
        p.shape[0] // 2,
        0 if bias is None else bias.data_ptr(),
        activation,
    )
    run_op(p._lib, op, x.shape[0])
    return out


def close(got, want, x, weight, dtype=torch.float32):
    """Within float32's rounding of a sum of k products, and once the rounding of `dtype`."""
    bound = x.float().abs() @ weight.float().abs().T
    slack = bound.max() * 2e-6 * weight.shape[1] ** 0.5 + 1e-6
    assert torch.isfinite(got).all()
    torch.testing.assert_close(got.float(), want.to(dtype).float(), atol=float(slack), rtol=2 * torch.finfo(dtype).eps)


@st.composite
def problems(draw, gated=False):
    """Seed, rows, n, the atoms' sizes, type of rows, type of weights, bias or not."""
    n = draw(st.integers(1, 150)) * (2 if gated else 1)
    sizes = draw(st.lists(st.integers(1, 90), min_size=1, max_size=8))
    x_dtype = draw(st.sampled_from(FLOATS))
    return (
        draw(st.integers(0, 99)),
        draw(st.integers(1, 40)),
        n,
        sizes,
        x_dtype,
        draw(st.sampled_from((*FLOATS, torch.int8))),
        draw(st.booleans()),
    )


def make(problem, lib, gated=False):
    seed, m, n, sizes, x_dtype, w_dtype, has_bias = problem
    g = torch.Generator().manual_seed(seed)
    k, bounds = sum(sizes), [0, *accumulate(sizes)]
    w = torch.randn(n, k, generator=g) / k**0.5
    w = w if w_dtype is torch.int8 else w.to(w_dtype)
    p = PackedLinear(w, bounds=bounds, gated=gated, dtype=w_dtype, lib=lib)
    x = torch.randn(m, k, generator=g).to(x_dtype)
    return w, p, x, torch.randn(n, generator=g).to(x_dtype) if has_bias else None


@EVERY_VARIANT
def test_is_right(name):
    @FEW
    @given(problems())
    def check(problem):
        _, p, x, bias = make(problem, load(name))
        stored = p.unpacked()
        want = reference.linear(x, stored, bias, bounds=p.bounds)
        for dtype in {torch.float32, x.dtype}:
            close(run_linear(p, x, dtype, bias), want, x, stored, dtype)

    check()


@EVERY_VARIANT
def test_gated_is_right(name):
    @FEW
    @given(problems(gated=True), st.integers(0, 2))
    def check(problem, activation):
        _, p, x, bias = make(problem, load(name), gated=True)
        stored = p.unpacked()
        want = reference.gated(x, stored, bias, activation=activation, bounds=p.bounds)
        got = run_gated(p, x, activation, bias)
        assert torch.isfinite(got).all()
        torch.testing.assert_close(got.float(), want.to(x.dtype).float(), atol=2e-5, rtol=max(2e-5, 2 * torch.finfo(x.dtype).eps))

    check()


@EVERY_VARIANT
def test_weight_comes_back(name):
    @FEW
    @given(problems(gated=True), st.booleans())
    def check(problem, gated):
        w, p, _, _ = make(problem, load(name), gated=gated)
        if p.scale is None:
            assert torch.equal(p.unpacked(), w.float())
            assert torch.equal(p.row(0, torch.bfloat16), w[0].to(torch.bfloat16))
        else:
            assert torch.equal(p.scale, w.abs().amax(dim=1) / 127)
            assert torch.equal(p.unpacked(), reference.quantize_int8(w, p.scale) * p.scale[:, None])

    check()


@EVERY_VARIANT
@pytest.mark.parametrize("w_dtype", [*FLOATS, torch.int8], ids=str)
def test_same_bits_for_any_number_of_rows_and_threads(name, w_dtype):
    lib = load(name)
    g = torch.Generator().manual_seed(3)
    w = torch.randn(200, 600, generator=g)
    for x_dtype in {torch.bfloat16, torch.float32 if w_dtype is torch.int8 else w_dtype}:
        p = PackedLinear(w.to(w_dtype) if w_dtype.is_floating_point else w, bounds=(0, 290, 301, 600), dtype=w_dtype, lib=lib)
        x = torch.randn(200, 600, generator=g).to(x_dtype)
        alone = torch.cat([run_linear(p, row[None], torch.float32) for row in x])
        for rows in (*range(1, 34), 200):
            assert torch.equal(run_linear(p, x[:rows], torch.float32), alone[:rows]), rows
        for threads in (2, 3):
            with team(lib, threads):
                for rows in (1, 7, 33, 200):
                    assert torch.equal(run_linear(p, x[:rows], torch.float32), alone[:rows]), (threads, rows)


@EVERY_VARIANT
def test_same_bits_for_many_rows(name):
    """More rows than one block of them, with three threads, of which one works on parts of two blocks."""
    lib = load(name)
    w = torch.randn(130, 2100)
    x = torch.randn(500, 2100).bfloat16()
    for p in (PackedLinear(w.bfloat16(), lib=lib), PackedLinear(w, dtype=torch.int8, lib=lib)):
        one = run_linear(p, x, torch.float32)
        assert torch.equal(run_linear(p, x[137:138], torch.float32), one[137:138])
        assert torch.equal(run_linear(p, x[470:], torch.float32), one[470:])
        with team(lib, 3):
            assert torch.equal(run_linear(p, x, torch.float32), one)


@EVERY_VARIANT
def test_same_bits_for_any_split_of_the_columns(name):
    @FEW
    @given(problems(), st.integers(0, 10**6))
    def check(problem, at):
        w, p, x, _ = make(problem, load(name))
        at %= p.shape[0]
        if not at:
            return
        whole = p.partials(x)
        parts = [PackedLinear(part, bounds=p.bounds, dtype=p.stored, scale=s, lib=p._lib) for part, s in halves(w, p.scale, at)]
        assert torch.equal(torch.cat([part.partials(x) for part in parts], dim=2), whole)

    check()


def halves(w, scale, at):
    return [(w[:at], None if scale is None else scale[:at]), (w[at:], None if scale is None else scale[at:])]


@EVERY_VARIANT
def test_gated_has_the_bits_of_the_plain_product(name):
    lib = load(name)
    w, x = torch.randn(2 * 75, 128).bfloat16(), torch.randn(9, 128).bfloat16()
    gate = torch.full((9, 75), 40.0)  # silu(40) = 40: the up half shows through a gate that is constant
    w[:75] = 0
    p, plain = PackedLinear(w, gated=True, lib=lib), PackedLinear(w[75:].contiguous(), lib=lib)
    bias = torch.cat([gate[0], torch.zeros(75)]).bfloat16()
    assert torch.equal(run_gated(p, x, 0, bias), (40 * run_linear(plain, x, torch.float32)).bfloat16())


@EVERY_VARIANT
def test_split_runs_finish_to_the_same_bits(name):
    @FEW
    @given(problems(), st.data())
    def check(problem, data):
        w, p, x, _ = make(problem, load(name))
        total, bounds = len(p.bounds) - 1, p.bounds
        cuts = sorted({0, total, *data.draw(st.lists(st.integers(0, total), max_size=4))})
        runs = list(pairwise(cuts))
        leaves = []
        for lo, hi in runs:
            columns = w[:, bounds[lo] : bounds[hi]]
            local = [b - bounds[lo] for b in bounds[lo : hi + 1]]
            part = PackedLinear(columns, bounds=local, first=lo, total=total, dtype=p.stored, scale=p.scale, lib=p._lib)
            assert part.subtrees == len(subtrees(total, lo, hi))
            sums = part.partials(x[:, bounds[lo] : bounds[hi]])
            want = part.reference(x[:, bounds[lo] : bounds[hi]])
            assert sums.shape == want.shape
            leaves += list(sums)
        stack: list[torch.Tensor] = []
        for code in ReductionTree.of(total, runs).code:
            right = None if code != ADD else stack.pop()
            stack.append(leaves[code] if right is None else stack.pop() + right)
        assert torch.equal(stack[0], p.partials(x)[0])

    check()


@EVERY_VARIANT
def test_ignores_memory_beside_the_rows(name):
    """Not a number in the gaps between rows, and beyond an odd k, must not be read into a sum."""
    lib = load(name)
    for w_dtype in (torch.bfloat16, torch.float32, torch.int8):
        p = PackedLinear(torch.randn(70, 37), bounds=(0, 5, 37), dtype=w_dtype, lib=lib)
        wide = torch.full((9, 50), float("nan"), dtype=torch.bfloat16)
        wide[:, :37] = torch.randn(9, 37)
        assert torch.equal(p.partials(wide[:, :37]), p.partials(wide[:, :37].contiguous()))


def test_partials_of_a_run_need_the_collective():
    lib = load(next(iter(VARIANTS)))
    p = PackedLinear(torch.randn(8, 30), bounds=(0, 10, 20, 30), first=1, total=4, lib=lib)
    assert p.subtrees == 2
    with pytest.raises(ValueError, match="collective"):
        lib.op_linear(p.handle, 0, 30, 0, 0, 8, 0, 0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"bounds": (0, 10)}, "cover"),
        ({"bounds": (0, 10, 10, 30)}, "empty"),
        ({"bounds": (0, 10, 30), "first": 1, "total": 2}, "total"),
        ({"gated": True}, "gate"),
        ({"scale": torch.ones(7), "dtype": torch.bfloat16}, "int8"),
        ({"dtype": torch.int8, "scale": torch.ones(6)}, "one number per row"),
        ({"dtype": torch.float64}, "float64"),
    ],
)
def test_impossible_weights_are_refused(change, message):
    with pytest.raises(ValueError, match=message):
        PackedLinear(torch.randn(7, 30), lib=load(next(iter(VARIANTS))), **change)


def test_memory_is_given_back():
    lib = load(next(iter(VARIANTS)))
    before = lib.huge_used()
    p = PackedLinear(torch.randn(100, 64), lib=lib)
    assert p.nbytes == 128 * 64 * 4
    assert lib.huge_used() - before == p.nbytes
    del p
    assert lib.huge_used() == before


@EVERY_VARIANT
def test_selfcheck_agrees(name):
    assert load(name).linear_selfcheck() == 0


def test_a_library_that_fails_its_check_is_not_used(monkeypatch, caplog):
    """A CPU without its tiles' permission: the next variant takes over and the log says so."""
    good = library.load(build.build(USABLE[-1]))

    class Refused:
        def linear_selfcheck(self):
            return -1

        def variant(self):
            return "amx"

    monkeypatch.setattr(library, "choose", lambda: USABLE[0])
    monkeypatch.setattr(library, "load", lambda path: Refused() if USABLE[0].name in path.name and len(USABLE) > 1 else good)
    monkeypatch.setattr(library, "usable", lambda: [USABLE[0], USABLE[-1]])
    with caplog.at_level("WARNING", logger="lockstep"):
        assert library.library.__wrapped__() is good
    assert "tile registers" in caplog.text


def test_every_variant_keeps_its_own_functions():
    """However often they are loaded: a handle of one given to another's functions is memory of nobody."""
    first = [load_or_skip(v) for v in VARIANTS.values()]
    weights = [PackedLinear(torch.ones(8, 8), bounds=[0, 8], gated=False, dtype=torch.float32, lib=lib) for lib in first]
    again = [load_or_skip(v) for v in VARIANTS.values()]
    assert len({id(lib) for lib in (*first, *again)}) == 2 * len(VARIANTS)
    assert [lib.variant() for lib in first] == [lib.variant() for lib in again] == list(VARIANTS)
    del weights  # each freed by whose it is
