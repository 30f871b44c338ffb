"""The planner: which split of a model over which devices, at what speed, memory and cost, before anything is started.

    from lockstep.planner import plan

Pure arithmetic on a model's numbers (`model`), a cluster's (`hardware`) and formulas for each operation (`ops`, `collectives`).
`docs/planner.md` names the formula and the source of every number. No torch, no device, no download of weights.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from lockstep.planner.answer import Plan, plan

__all__ = ["Plan", "plan"]


def __getattr__(name: str) -> Any:
    """Load the search on first use: the simulators that teach are in this package too, and need none of it."""
    if name in __all__:
        from lockstep.planner import answer

        return getattr(answer, name)
    raise AttributeError(f"module 'lockstep.planner' has no attribute {name!r}")
