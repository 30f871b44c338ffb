"""The planner: which split of a model over which devices, at what speed, memory and cost, before anything is started.

    from lockstep.planner import plan

Pure arithmetic on a model's numbers (`model`), a cluster's (`hardware`) and formulas for each operation (`ops`, `collectives`).
`docs/planner.md` names the formula and the source of every number. No torch, no device, no download of weights.
"""

from lockstep.planner.answer import Plan, plan

__all__ = ["Plan", "plan"]
