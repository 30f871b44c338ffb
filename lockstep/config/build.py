"""The configuration tree by flat names: the way `LLM(...)` keywords and the command line's flags reach their field."""

from __future__ import annotations

import dataclasses
import difflib
import os
from functools import cache
from typing import Any, get_type_hints

from lockstep.config.tree import EngineConfig
from lockstep.utils.sizes import parse_size

GROUPS: dict[str, type[Any]] = dict(get_type_hints(EngineConfig))


@cache
def group_of() -> dict[str, str]:
    """Field name -> the group of the tree that holds it. Names are unique over the tree (asserted)."""
    where: dict[str, str] = {}
    for group, cls in GROUPS.items():
        for f in dataclasses.fields(cls):
            assert f.name not in where, f"config field {f.name} exists in {where[f.name]} and in {group}"
            where[f.name] = group
    return where


def nearest(word: str, choices: Any) -> str:
    """`; did you mean 'x'?` for the most similar of the choices, empty when none is near."""
    found = difflib.get_close_matches(word.lower(), [str(c) for c in choices], n=1, cutoff=0.5)
    return f" Did you mean {found[0]!r}?" if found else ""


def is_size(name: str) -> bool:
    """Whether a setting is an amount of memory, which may be written with a unit."""
    return name.endswith("_bytes")


def _plain(name: str, value: Any) -> Any:
    """Paths and torch types as the text that a command line would have; amounts of memory as bytes; None where the default has a name."""
    if name == "distributed_executor_backend" and value == "auto":
        return None
    if is_size(name) and isinstance(value, str):
        count = parse_size(value)
        return value if count is None else count  # checked later
    if isinstance(value, os.PathLike):
        return os.fspath(value)
    return str(value).removeprefix("torch.") if type(value).__module__ == "torch" and type(value).__name__ == "dtype" else value


def build_config(**settings: Any) -> EngineConfig:
    """The tree with the named fields set: `build_config(model="m", tensor_parallel_size=2)`.

    Values are checked later, by `validate.resolve`. Raises TypeError for a name that no group has, with the nearest one.
    """
    where = group_of()
    chosen: dict[str, dict[str, Any]] = {group: {} for group in GROUPS}
    for name, value in settings.items():
        if name not in where:
            raise TypeError(f"{name!r} is not a setting of this engine.{nearest(name, where)}")
        chosen[where[name]][name] = _plain(name, value)
    return EngineConfig(**{group: cls(**chosen[group]) for group, cls in GROUPS.items()})
