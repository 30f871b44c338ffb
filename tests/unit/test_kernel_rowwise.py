"""Norms and activations of every variant against plain torch, and one row's bits whatever the batch and the threads."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.kernels import library
from lockstep.kernels.program import Program, StepArgs
from lockstep.kernels.reference import rowwise as reference
from lockstep.kernels.variants import EMULATED, usable
from lockstep.layers.norm import RMSNorm
from tests.unit.kernel_variants import load_or_skip

VARIANTS = [*usable(), *([EMULATED] if EMULATED.needs <= usable()[0].needs else [])]
DTYPES = [torch.float32, torch.bfloat16, torch.float16]
RELATIVE = {torch.float32: 1e-6, torch.bfloat16: 2.0**-7, torch.float16: 2.0**-10}  # float32 as promised, else one step of the type
WIDTHS = st.one_of(st.integers(1, 70), st.sampled_from([127, 128, 256, 1000]))
ROOM = 5  # elements at the end of each row that an operation must not touch


@pytest.fixture(scope="module", params=VARIANTS, ids=lambda v: v.name)
def lib(request):
    return load_or_skip(request.param)


class Runner:
    """Calls one operation over rows that are longer than what it reads and writes."""

    def __init__(self, lib, threads: int = 1) -> None:
        self.lib = lib
        lib.team_set(threads, 0, 0)

    def _run(self, op: int, rows: int) -> None:
        program, step = Program(self.lib), StepArgs(self.lib)
        program.add("op", op)
        step.set_rows(rows)
        program.run(step)

    def _padded(self, x: torch.Tensor) -> torch.Tensor:
        """A copy of `x [rows, width]` within longer rows, NaN around it."""
        room = torch.full((x.shape[0], x.shape[1] + ROOM), torch.nan, dtype=x.dtype)
        room[:, : x.shape[1]] = x
        return room

    def norm(self, x, weight, eps, plus_one, delta=None):
        """(normed, residual) of `x [rows, width]`, `delta` added to it first if there is one."""
        (rows, width), code = x.shape, library.DTYPE_CODES[str(x.dtype).removeprefix("torch.")]
        x, out = self._padded(x), self._padded(torch.full_like(x, torch.nan))
        tail = (weight.data_ptr(), out.data_ptr(), out.stride(0), width, eps, plus_one, code)
        if delta is None:
            op = self.lib.op_norm(x.data_ptr(), x.stride(0), *tail)
        else:
            op = self.lib.op_add_norm(delta.data_ptr(), delta.stride(0), x.data_ptr(), x.stride(0), *tail)
        self._run(op, rows)
        assert out[:, width:].isnan().all() and x[:, width:].isnan().all(), "wrote past a row"
        return out[:, :width].clone(), x[:, :width].clone()

    def act(self, x, activation):
        rows, width, code = x.shape[0], x.shape[1] // 2, library.DTYPE_CODES[str(x.dtype).removeprefix("torch.")]
        x, out = self._padded(x), torch.full((rows, width + ROOM), torch.nan, dtype=x.dtype)
        self._run(self.lib.op_gated_act(x.data_ptr(), x.stride(0), out.data_ptr(), out.stride(0), width, activation, code), rows)
        assert out[:, width:].isnan().all(), "wrote past a row"
        return out[:, :width].clone()


def numbers(rows: int, width: int, dtype: torch.dtype, seed: int, size: float = 1.0) -> torch.Tensor:
    return (torch.randn(rows, width, generator=torch.Generator().manual_seed(seed)) * size).to(dtype)


def close(found: torch.Tensor, wanted: torch.Tensor, scale: torch.Tensor | None = None) -> bool:
    """Whether each element is within the type's bound of `wanted`, relative to it or to `scale`."""
    base = (wanted if scale is None else scale).abs().double()
    smallest = torch.finfo(found.dtype).tiny  # below it a type has fewer bits, or a CPU makes them zero
    return bool(((found.double() - wanted.double()).abs() <= RELATIVE[found.dtype] * base + smallest).all())


@settings(max_examples=60, derandomize=True)
@given(st.integers(1, 5), WIDTHS, st.sampled_from(DTYPES), st.booleans(), st.sampled_from([1e-3, 1.0, 100.0]), st.integers(0, 999))
def test_norm_is_the_references(lib, rows, width, dtype, plus_one, size, seed):
    x, weight = numbers(rows, width, dtype, seed, size), numbers(1, width, dtype, seed + 1)[0]
    found, residual = Runner(lib).norm(x, weight, 1e-6, plus_one)
    wanted = reference.norm(x, weight, 1e-6, plus_one)
    assert close(found, wanted, 2 * wanted)  # rounded before the weight: a step there and a step at the end
    assert torch.equal(residual, x)


@settings(max_examples=60, derandomize=True)
@given(st.integers(1, 5), WIDTHS, st.sampled_from(DTYPES), st.booleans(), st.integers(0, 999))
def test_add_norm_rounds_the_sum_once_and_norms_that(lib, rows, width, dtype, plus_one, seed):
    delta, x = numbers(rows, width, dtype, seed), numbers(rows, width, dtype, seed + 1, 3.0)
    weight = numbers(1, width, dtype, seed + 2)[0]
    found, total = Runner(lib).norm(x, weight, 1e-5, plus_one, delta)
    wanted = reference.add_norm(delta, x, weight, 1e-5, plus_one)
    normal = wanted[1].abs() >= torch.finfo(dtype).tiny
    assert torch.equal(total[normal], wanted[1][normal]), "one addition, one rounding: there is only one right answer"
    assert close(found, wanted[0], 2 * wanted[0])
    assert torch.equal(found, Runner(lib).norm(total, weight, 1e-5, plus_one)[0]), "norm of the rounded sum"


@settings(max_examples=60, derandomize=True)
@given(st.integers(1, 5), WIDTHS, st.sampled_from(DTYPES), st.integers(0, 2), st.sampled_from([0.1, 3.0, 40.0]), st.integers(0, 999))
def test_gated_activations_are_the_references(lib, rows, width, dtype, activation, size, seed):
    x = numbers(rows, 2 * width, dtype, seed, size)
    wanted = reference.gated_act(x, activation)
    # 1 + tanh and 1 + erf cancel for negative gates, in torch too: there the error is one of their product's size.
    product = None if activation == 0 else x[:, :width].double() * x[:, width:].double()
    assert close(Runner(lib).act(x, activation), wanted, product)


@pytest.mark.parametrize("activation", [0, 1, 2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_activations_of_extreme_gates(lib, dtype, activation):
    """Gates far out keep their limits (0, or the gate), infinity is infinity, and NaN stays NaN."""
    gates = torch.tensor([-torch.inf, -6e4, -200.0, -90.0, -0.0, 0.0, 90.0, 200.0, 6e4, torch.inf, torch.nan]).to(dtype)
    found = Runner(lib).act(torch.cat([gates, torch.ones_like(gates)])[None], activation)[0].float()
    assert found[1:4].abs().max() < 1e-30 and found[4:6].abs().max() == 0
    assert torch.equal(found[6:9], gates[6:9].float()) and found[9] == torch.inf and found[10].isnan()
    wanted = reference.gated_act(torch.cat([gates, torch.ones_like(gates)])[None], activation)[0].float()
    assert found[0].isnan() == wanted[0].isnan()  # 0 times infinity


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("width", [16, 24, 100, 257])
def test_a_rows_bits_do_not_depend_on_its_batch_or_the_threads(lib, dtype, width):
    x, delta = numbers(33, 2 * width, dtype, 1), numbers(33, width, dtype, 2)
    weight = numbers(1, width, dtype, 3)[0]

    def everything(runner, rows: slice):
        normed, total = runner.norm(x[rows, :width].contiguous(), weight, 1e-6, False, delta[rows].contiguous())
        return torch.cat(
            [normed, total, runner.norm(x[rows, :width], weight, 1e-6, True)[0], runner.act(x[rows], 0), runner.act(x[rows], 2)], 1
        )

    alone = torch.cat([everything(Runner(lib), slice(i, i + 1)) for i in range(33)])
    for threads in (1, 2, 3):
        for count in (*range(1, 9), 16, 17, 33):
            assert torch.equal(everything(Runner(lib, threads), slice(0, count)), alone[:count]), (threads, count)


def test_a_rows_bits_do_not_depend_on_what_lies_around_it(lib):
    """Elements past a row's end, and where in memory it begins, must not show."""
    width = 37
    memory = torch.full((4, 64), torch.nan)
    weight = numbers(1, width, torch.float32, 3)[0]
    row = numbers(1, width, torch.float32, 4)
    wanted = Runner(lib).norm(row, weight, 1e-6, False)[0]
    for offset in range(1, 5):
        memory[1, offset : offset + width] = row
        shifted = memory.flatten()[64 + offset : 64 + offset + width]
        out = torch.empty(1, width)
        runner = Runner(lib)
        runner._run(lib.op_norm(shifted.data_ptr(), 64, weight.data_ptr(), out.data_ptr(), width, width, 1e-6, False, 0), 1)
        assert torch.equal(out, wanted)
        memory.fill_(torch.inf)


@pytest.mark.parametrize("plus_one", [False, True])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_the_reference_is_the_layer(dtype, plus_one):
    layer = RMSNorm(48, 1e-6, plus_one=plus_one, dtype=dtype)
    layer.weight.data = numbers(1, 48, dtype, 1)[0]
    x, delta = numbers(5, 48, dtype, 2), numbers(5, 48, dtype, 3)
    assert torch.equal(layer(x), reference.norm(x, layer.weight, 1e-6, plus_one))
    for found, wanted in zip(layer(delta, x), reference.add_norm(delta, x, layer.weight, 1e-6, plus_one), strict=True):
        assert torch.equal(found, wanted)


def test_a_type_that_is_none_of_activations_is_refused(lib):
    x = torch.zeros(1, 16)
    with pytest.raises(ValueError, match="not a type of activations: 3"):
        Runner(lib)._run(lib.op_norm(x.data_ptr(), 16, x.data_ptr(), x.data_ptr(), 16, 16, 1e-6, False, 3), 1)
