"""What was asked of a plan, every rule checked before anything is searched."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from lockstep.config.errors import ConfigError
from lockstep.planner.hardware import Cluster
from lockstep.planner.load import Workload
from lockstep.planner.model import ModelShape
from lockstep.planner.quantity import shown
from lockstep.planner.refusal import AXES
from lockstep.planner.startable import NONE

MOST = 1 << 30  # ranks of an axis: more than there are devices


def check(work: Workload, shape: ModelShape, memory_share: float, quantization: str, price: float | None = None) -> Workload:
    """The workload, if nothing is wrong with it. Raises ConfigError."""
    _tokens("input_len", work.input_len)
    _tokens("output_len", work.output_len)
    for name, number in (("rate", work.rate), ("ttft", work.ttft_s), ("tpot", work.tpot_s)):
        if number is not None and not (_number(number) and number > 0):
            unit = "requests per second" if name == "rate" else "seconds"
            raise ConfigError(f"{name}={_brief(number)} must be more than 0 and finite: give {unit}.")
    if price is not None and not (_number(price) and price >= 0):
        raise ConfigError(f"price={_brief(price)} must be 0 or more and finite: give dollars per device-hour.")
    if not (_number(work.margin) and 0 <= work.margin < 1):
        raise ConfigError(f"margin={_brief(work.margin)} must be at least 0 and below 1: give a share, like 0.2.")
    _lengths(work, shape)
    if not (_number(memory_share) and 0 < memory_share <= 1):
        raise ConfigError(f"gpu_memory_utilization={_brief(memory_share)} must be greater than 0 and at most 1: give a share, like 0.9.")
    if quantization not in ("", NONE, "int8", "fp8"):
        raise ConfigError(f"quantization={quantization!r} is not one of int8, fp8, {NONE}: name one of them, or none at all.")
    return work


def _lengths(work: Workload, shape: ModelShape) -> None:
    positions = shape.max_position_embeddings
    if work.max_model_len is not None:
        _tokens("max_model_len", work.max_model_len)
    if work.longest < work.tokens:
        raise ConfigError(
            f"max_model_len={shown(work.max_model_len)} is less than input_len={shown(work.input_len)} and "
            f"output_len={shown(work.output_len)} together: give at least {shown(work.tokens)}."
        )
    if work.tokens > positions:
        raise ConfigError(
            f"input_len={shown(work.input_len)} and output_len={shown(work.output_len)} make {shown(work.tokens)} tokens, more than the "
            f"{positions} positions of {shape.name}: use less."
        )
    if work.longest > positions:
        raise ConfigError(f"max_model_len={shown(work.longest)} is more than the {positions} positions of {shape.name}: use less.")


def check_hosts(hosts: Sequence[str], cluster: Cluster) -> list[str]:
    """The names, one for each node. Raises ConfigError."""
    found = [name.strip() for name in hosts]
    if len(found) != cluster.nodes or len(set(found)) != len(found) or not all(found):
        raise ConfigError(
            f"hosts={','.join(found)} names {len(set(filter(None, found)))} different hosts, and {cluster} has {cluster.nodes} nodes: "
            "name each of them, once."
        )
    return found


def check_axes(fixed: Mapping[str, Any] | None) -> dict[str, int]:
    """The axes that are given. Raises ConfigError."""
    found = dict(fixed or {})
    for name, value in found.items():
        if name not in AXES or not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= MOST:
            raise ConfigError(f"fixed: {name!r}: {shown(value)} is no axis with a size from 1 to {MOST}: give sizes of {', '.join(AXES)}.")
    return found


def _tokens(name: str, value: Any) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < 1:
        raise ConfigError(f"{name}={shown(value)} must be at least 1 and whole: give a number of tokens.")


def _number(value: Any) -> bool:
    """Whether it is a finite number that a float can hold; True and False are none."""
    try:
        return isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
    except OverflowError:
        return False


def _brief(value: Any) -> str:
    """As `shown`, of numbers that need not be whole."""
    return f"{value:g}" if isinstance(value, float) else shown(value)
