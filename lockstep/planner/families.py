"""Operations whose constants can be fitted: what a measurement looks like, which constants it moves, how it is predicted.

    device = fit_family(gemm("bfloat16"), device, samples)

gives the device with the constants under which `samples` are predicted with the least mean error.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

from lockstep.planner import collectives, ops
from lockstep.planner.entry import STEP_SHARE
from lockstep.planner.fit import Errors, errors, mape, minimise
from lockstep.planner.hardware import DecodeFit, Device, Link, MoeFit, PrefillFit, Roofline
from lockstep.planner.tables import Table


@dataclass(frozen=True)
class Sample:
    """One measurement. `size` orders samples (every other one is held out); `args` are those of the family's price."""

    size: float
    args: tuple[Any, ...]
    seconds: float


@dataclass(frozen=True)
class Family:
    """`predict` gives the seconds of a sample's args; `put` a device with other constants; `starts` where the search begins."""

    name: str
    starts: tuple[tuple[float, ...], ...]
    put: Callable[[Device, Sequence[float]], Device]
    predict: Callable[[Device, Sample], float]


def fit_family(family: Family, device: Device, samples: Sequence[Sample], rounds: int = 400) -> Device:
    """The device with the family's constants fitted to `samples`; the best of the family's starts."""
    if not samples:
        raise ValueError(f"{family.name}: no samples to fit to: give at least one measurement.")

    def loss(constants: Sequence[float]) -> float:
        tried = family.put(device, constants)
        return mape(lambda s: family.predict(tried, s), samples, lambda s: s.seconds)

    found = [minimise(loss, start, rounds) for start in family.starts]
    return family.put(device, min(found, key=loss))


def with_table(family: Family, device: Device, samples: Iterable[Sample]) -> Device:
    """The device that also remembers how far its formula was off at each sample, and is right there."""
    bare = replace(device, tables={name: table for name, table in device.tables.items() if name != family.name})
    table = Table((s.args, s.seconds, family.predict(bare, s)) for s in samples)
    return replace(bare, tables={**bare.tables, family.name: table})


def family_errors(family: Family, device: Device, samples: Iterable[Sample]) -> Errors:
    """How well the device's present constants predict `samples`."""
    samples = list(samples)
    return errors([family.predict(device, s) for s in samples], [s.seconds for s in samples])


def gemm(dtype: str) -> Family:
    """args: m, n, k."""

    def put(device: Device, c: Sequence[float]) -> Device:
        return replace(device, gemm={**device.gemm, dtype: Roofline(*c)})

    return Family(f"gemm {dtype}", ((4e-6, 0.8, 0.86, 0.1),), put, lambda d, s: ops.gemm_s(d, *s.args, dtype))


def prefill() -> Family:
    """args: batch, tokens, heads, KV heads, head_dim."""

    def put(device: Device, c: Sequence[float]) -> Device:
        return replace(device, prefill=PrefillFit(*c))

    return Family("prefill attention", ((12e-6, 0.7, 0.5, 0.5, 0.5),), put, lambda d, s: ops.prefill_attention_s(d, *s.args))


def decode() -> Family:
    """args: batch, context, heads, KV heads, head_dim."""

    def put(device: Device, c: Sequence[float]) -> Device:
        return replace(device, decode=DecodeFit(*c))

    return Family("decode attention", ((12e-6, 0.9, 2e-8),), put, lambda d, s: ops.decode_attention_s(d, *s.args))


def moe(routing: str) -> Family:
    """args: tokens, hidden, inter, experts, topk, tp, ep."""
    start: tuple[float, ...] = (30e-6, 0.65, 0.88, 0.25, 0.55)
    if routing == "skewed":
        start = (*start, 0.4)

    def put(device: Device, c: Sequence[float]) -> Device:
        return replace(device, moe={**device.moe, routing: MoeFit(*c)})

    return Family(f"MoE {routing}", (start,), put, lambda d, s: ops.moe_s(d, *s.args, routing=routing))


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
        return device.scale_out.seconds(*sample.args, *sample.args)

    return Family("p2p between nodes", ((2e-5, 4e10),), put, predict)


def ring() -> Family:
    """args: ranks, bytes of an all-reduce over the bare link, for rank counts that have no constants of their own."""

    def put(device: Device, c: Sequence[float]) -> Device:
        return replace(device, scale_up=Link(*c))

    return Family("ring", ((5e-6, 1e-7, 3e11),), put, lambda d, s: collectives.ring_s(d.scale_up, *s.args, rounds=2))
