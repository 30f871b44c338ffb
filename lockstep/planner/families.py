"""Operations whose constants can be fitted: what a measurement looks like, which constants it moves, how it is predicted.

    device = fit_family(gemm("bfloat16"), device, samples)

gives the device with the constants under which `samples` are predicted with the least mean error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any, NamedTuple

from lockstep.planner import collectives, ops
from lockstep.planner.fit import Errors, errors, halves, mape, minimise
from lockstep.planner.hardware import DTYPE_BYTES, STEP_SHARE, DecodeFit, Device, Link, MoeFit, PrefillFit, Roofline, Tried
from lockstep.planner.tables import Table


@dataclass(frozen=True)
class Sample:
    """One measurement. `size` orders samples (every other one is held out); `args` are those of the family's price."""

    size: float
    args: tuple[Any, ...]
    seconds: float


@dataclass(frozen=True)
class Family:
    """`predict` gives the seconds of a sample's args; `put` a device with other constants; `starts` where the search begins.

    order: of the arguments in a table, the outermost first. What a sample has to share to say anything (head sizes, groups) comes
    first, what steps are sized by comes last. sizes: of those before, the ones that also say how much there is to do.
    """

    name: str
    starts: tuple[tuple[float, ...], ...]
    put: Callable[[Device, Sequence[float]], Device]
    predict: Callable[[Device, Sample], float]
    order: tuple[int, ...] = (0,)
    arguments: int = 1
    sizes: tuple[int, ...] = ()


def fit_family(family: Family, device: Device, samples: Sequence[Sample], rounds: int = 400) -> Device:
    """The device with the family's constants fitted to `samples`; the best of the family's starts. It has no tables: those were
    corrections to the constants before."""
    if not samples:
        raise ValueError(f"{family.name}: no samples to fit to: give at least one measurement.")

    device = replace(device, tables={})

    def loss(constants: Sequence[float]) -> float:
        tried = family.put(device, constants)
        return mape(lambda s: family.predict(tried, s), samples, lambda s: s.seconds)

    found = [minimise(loss, start, rounds) for start in family.starts]
    return family.put(device, min(found, key=loss))


def table_of(family: Family, device: Device, rows: Iterable[Sequence[float]]) -> Table:
    """How far the formula of `device`, which has no tables, is off at each row of arguments and seconds."""
    return Table(rows, lambda args: family.predict(device, Sample(0.0, tuple(args), 0.0)), family.order, family.sizes)


def with_table(family: Family, device: Device, samples: Iterable[Sample]) -> Device:
    """The device that is also right at each sample, and between them."""
    table = table_of(family, replace(device, tables={}), [(*sample.args, sample.seconds) for sample in samples])
    return replace(device, tables={**device.tables, family.name: table})


def family_errors(family: Family, device: Device, samples: Iterable[Sample]) -> Errors:
    """How well the device's present prices predict `samples`."""
    samples = list(samples)
    return errors([family.predict(device, s) for s in samples], [s.seconds for s in samples])


class HeldOut(NamedTuple):
    """Errors on one half of the samples: `formula` fitted to the other half, and `table`, which also interpolates it."""

    formula: Errors
    table: Errors


def held_out(family: Family, device: Device, samples: Sequence[Sample], *, swap: bool = False, fit: bool = True) -> HeldOut:
    """Both methods on every second size, by constants and samples of the others; `swap`: on the others, by those.

    fit: False where the device's constants are already those of the half that tells.
    """
    fitted, held = halves(samples, lambda sample: sample.size)
    fitted, held = (held, fitted) if swap else (fitted, held)
    bare = replace(device, tables={}, tried={})
    if fit:
        bare = fit_family(family, bare, fitted)
    return HeldOut(family_errors(family, bare, held), family_errors(family, with_table(family, bare, fitted), held))


def both_ways(family: Family, device: Device, samples: Sequence[Sample]) -> Tried:
    """The mean errors of both methods over both halves. Samples that are no better than the formula are not to be kept."""
    found = [held_out(family, device, samples, swap=swap, fit=swap) for swap in (False, True)]
    formula, table = (sum(e.n * e.mape for e in half) / len(samples) for half in zip(*found, strict=True))
    return Tried(round(formula, 4), round(table, 4) if table < formula else None)


def gemm(dtype: str) -> Family:
    """args: m, n, k."""

    def put(device: Device, c: Sequence[float]) -> Device:
        return replace(device, gemm={**device.gemm, dtype: Roofline(*c)})

    def predict(device: Device, sample: Sample) -> float:
        m, n, k = sample.args
        return ops.gemm_s(device, m, n, k, dtype)

    return Family(f"gemm {dtype}", ((4e-6, 0.8, 0.86, 0.1),), put, predict, (1, 2, 0), 3)


def prefill() -> Family:
    """args: batch, tokens, heads, KV heads, head_dim."""

    def put(device: Device, c: Sequence[float]) -> Device:
        return replace(device, prefill=PrefillFit(c[0], c[1], c[2], c[3], c[4]))

    def predict(device: Device, sample: Sample) -> float:
        return ops.prefill_attention_s(device, *sample.args)

    return Family("prefill attention", ((12e-6, 0.7, 0.5, 0.5, 0.5),), put, predict, (4, 2, 3, 0, 1), 5, (0,))


def decode() -> Family:
    """args: batch, context, heads, KV heads, head_dim."""

    def put(device: Device, c: Sequence[float]) -> Device:
        return replace(device, decode=DecodeFit(*c))

    def predict(device: Device, sample: Sample) -> float:
        return ops.decode_attention_s(device, *sample.args)

    return Family("decode attention", ((12e-6, 0.9, 2e-8),), put, predict, (4, 2, 3, 1, 0), 5, (1,))


def moe(routing: str, shape: str = "") -> Family:
    """args: tokens, hidden, inter, experts, topk, tp, ep. `shape`: constants of one layer shape alone (`ops.moe_shape`)."""
    start: tuple[float, ...] = (30e-6, 0.65, 0.88, 0.25, 0.55)
    if routing == "skewed":
        start = (*start, 0.4)

    def put(device: Device, c: Sequence[float]) -> Device:
        return replace(device, moe={**device.moe, f"{routing} {shape}".strip(): MoeFit(*c)})

    def predict(device: Device, sample: Sample) -> float:
        tokens, hidden, inter, experts, topk, tp, ep = sample.args
        return ops.moe_s(device, tokens, hidden, inter, experts, topk, tp, ep, routing=routing)

    return Family(f"MoE {routing} {shape}".strip(), (start,), put, predict, (4, 6, 5, 0), 7)


def collective(op: str, ranks: int, launch_s: float = 8e-6, bandwidth: float = 2e11) -> Family:
    """args: bytes. `op` is a key of `Device.collectives`, `ranks` the group that was measured (for DeepEP: the nodes)."""

    def put(device: Device, c: Sequence[float]) -> Device:
        fits = {**device.collectives, op: {**device.collectives.get(op, {}), ranks: Link(*c)}}
        return replace(device, collectives=fits)

    def predict(device: Device, sample: Sample) -> float:
        return collectives.measured_s(device, op, ranks, *sample.args)

    starts = tuple((launch_s, launch_s / 8, bandwidth, knee) for knee in (3e4, 3e5, 3e6))  # where protocols change is not convex
    return Family(f"{op} n={ranks}", starts, put, predict)


def between() -> Family:
    """args: bytes of one message to a device of another node."""

    def put(device: Device, c: Sequence[float]) -> Device:
        return replace(device, scale_out=Link(c[0] * (1 - STEP_SHARE), c[0] * STEP_SHARE, c[1]))

    def predict(device: Device, sample: Sample) -> float:
        return collectives.between_s(device, device.scale_out, *sample.args)

    return Family(collectives.BETWEEN, ((2e-5, 4e10),), put, predict)


def ring() -> Family:
    """args: ranks, bytes of an all-reduce over the bare link, for rank counts that have no constants of their own."""

    def put(device: Device, c: Sequence[float]) -> Device:
        return replace(device, scale_up=Link(*c))

    def predict(device: Device, sample: Sample) -> float:
        ranks, size = sample.args
        return collectives.ring_s(device.scale_up, ranks, size, rounds=2)

    return Family("ring", ((5e-6, 1e-7, 3e11),), put, predict, (0, 1), 2)


def named(name: str) -> Family:
    """The family that a table is kept under. Raises ValueError for a name that is none."""
    kind, _, rest = name.partition(" ")
    if kind == "gemm" and rest in DTYPE_BYTES:
        return gemm(rest)
    if kind == "MoE" and " " in rest:
        return moe(*rest.split(" ", 1))
    fixed = {found.name: found for found in (prefill(), decode(), between())}
    if name in fixed:
        return fixed[name]
    if rest.startswith("n=") and rest[2:].isdigit():
        return collective(kind, int(rest[2:]))
    raise ValueError(f"{name!r} is no family: write gemm DTYPE, MoE ROUTING SHAPE, OPERATION n=RANKS, or one of {', '.join(fixed)}.")
