"""Numbers with units as people write them in a cluster's file: 64GiB, 2TB/s, 400e12, 4us. Those that cannot be are refused."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any, NamedTuple

from lockstep.config.errors import ConfigError

_PREFIXES = {"": 1.0, "K": 1e3, "M": 1e6, "G": 1e9, "T": 1e12, "P": 1e15}
_RATE = re.compile(r"([0-9.]+(?:e[+-]?\d+)?)\s*([KMGTP]?)(i?)(?:B|FLOPS?)?(?:/s)?", re.IGNORECASE)
_TIME = re.compile(r"([0-9.]+(?:e[+-]?\d+)?)\s*(us|ms|s)?")
MOST_SHOWN = 10**20
_SECONDS = {"us": 1e-6, "ms": 1e-3, "s": 1.0, None: 1.0}


class Rule(NamedTuple):
    """What a number may be, and in which unit it is."""

    least: float
    most: float
    unit: str


FLOPS = Rule(1e9, math.inf, "FLOP/s, as in 400e12 or 400T")
MEMORY_BANDWIDTH = Rule(1e9, math.inf, "bytes/s, as in 2e12 or 2TB/s")
CAPACITY = Rule(1 << 20, math.inf, "bytes, as in 64GiB")
LINK_BANDWIDTH = Rule(1e7, math.inf, "bytes/s of one direction, as in 25e9 or 25GB/s")
LATENCY = Rule(0.0, 1.0, "seconds, as in 4e-6 or 4us")
BYTES = Rule(0.0, math.inf, "bytes")
PRICE = Rule(0.0, math.inf, "dollars per hour")
COUNT = Rule(1, math.inf, "a whole number")
FACTOR = Rule(1e-3, 1e3, "a factor, as in 0.5")
SHARE = Rule(0.0, 1.0, "a share, as in 0.2")


def read(where: str, key: str, value: Any, rule: Rule) -> float:
    """The number that `value` is. K, M, G, T are decimal and Ki, Mi, Gi, Ti binary, as on data sheets. Raises ConfigError."""
    number = _seconds(value) if rule is LATENCY else _number(value)
    if number is None or not math.isfinite(number) or not number > 0:
        raise ConfigError(f"{where}: {key} is {shown(value)}: it must be a number above 0 ({rule.unit}).")
    if rule is COUNT and number != int(number):
        raise ConfigError(f"{where}: {key} is {shown(value)}: it must be {rule.unit}.")
    if not rule.least <= number <= rule.most:
        bound = f"at least {rule.least:g}" if number < rule.least else f"at most {rule.most:g}"
        raise ConfigError(f"{where}: {key} is {shown(value)}: it must be {bound}; its unit is {rule.unit}.")
    return number


def shown(value: Any) -> str:
    """A value for a message: of a whole number with more digits than anybody wants to read, its power of ten."""
    if not isinstance(value, int) or abs(value) < MOST_SHOWN:
        return repr(value)
    return f"{'-' * (value < 0)}1e+{math.floor(math.log10(abs(value)))}"


def mapping(where: str, key: str, value: Any, example: str) -> Mapping[str, Any]:
    """A mapping. Raises ConfigError, with an example, for anything else."""
    if not isinstance(value, Mapping):
        raise ConfigError(f"{where}: {key} is {value!r}: write it like {{{example}}}.")
    return value


def _number(value: Any) -> float | None:
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError:  # a whole number that no float can hold
            return math.inf
    found = _RATE.fullmatch(value.strip()) if isinstance(value, str) else None
    if not found or (found[3] and not found[2]):
        return None
    number, prefix = _float(found[1]), found[2].upper()
    scale = 1024.0 ** list(_PREFIXES).index(prefix) if found[3] else _PREFIXES[prefix]
    return None if number is None else number * scale


def _seconds(value: Any) -> float | None:
    if isinstance(value, str):
        found = _TIME.fullmatch(value.strip())
        number = _float(found[1]) if found else None
        return None if found is None or number is None else number * _SECONDS[found[2]]
    return _number(value)


def _float(text: str) -> float | None:
    try:
        return float(text)
    except ValueError:  # 1.2.3
        return None
