"""A step while it is being planned, and once it is."""

from __future__ import annotations

from lockstep.engine.request import Request
from lockstep.protocol import NewRequest, StepPlan


class ScheduledStep:
    """A plan, and whom its rows belong to. Slots change hands while a step is in flight; requests do not."""

    __slots__ = ("plan", "rows", "sampled")

    def __init__(self, plan: StepPlan, rows: list[Request], sampled: list[Request]) -> None:
        self.plan = plan
        self.rows = rows  # parallel to plan.slots
        self.sampled = sampled  # the rows that yield a token, in row order


class PlanBuilder:
    """Collects the rows of one step under its token budget."""

    __slots__ = ("budget", "new", "new_blocks", "num_computed", "num_tokens", "rows", "sampled", "samples", "slots")

    def __init__(self, budget: int) -> None:
        self.budget = budget  # tokens left
        self.rows: list[Request] = []
        self.sampled: list[Request] = []
        self.slots: list[int] = []
        self.num_computed: list[int] = []
        self.num_tokens: list[int] = []
        self.samples: list[bool] = []
        self.new: list[NewRequest] = []
        self.new_blocks: list[tuple[int, list[int]]] = []

    def add(self, request: Request, end: int, samples: bool) -> None:
        """Let the step compute the request up to token `end`; if it samples (or pools), a placeholder token is in flight from now on."""
        start = request.num_computed
        self.budget -= end - start
        self.rows.append(request)
        self.slots.append(request.slot)
        self.num_computed.append(start)
        self.num_tokens.append(end - start)
        request.num_computed = end
        if samples:
            request.in_flight += 1
        if samples := samples and request.pooling is None:
            self.sampled.append(request)
        self.samples.append(samples)

    def build(self, step: int, freed: list[int]) -> ScheduledStep:
        """The finished plan."""
        plan = StepPlan(
            step=step,
            slots=self.slots,
            num_computed=self.num_computed,
            num_tokens=self.num_tokens,
            samples=self.samples,
            new=self.new,
            new_blocks=self.new_blocks,
            freed=freed,
        )
        return ScheduledStep(plan, self.rows, self.sampled)
