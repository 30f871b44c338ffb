"""Which machines to take: the same question asked of several clusters, a row each."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lockstep.config.errors import ConfigError
from lockstep.planner.answer import Plan, plan
from lockstep.planner.catalogue import cluster
from lockstep.planner.hardware import Cluster
from lockstep.planner.model import ModelShape
from lockstep.planner.teach.table import table
from lockstep.planner.words import dollars, ms, rate_of, wrapped

HEAD = ("cluster", "plan", "devices", "TTFT", "TPOT", "error of them", "constants", "carries", "$/h", "$/million", "keeps promises")


def compare(
    model: str | ModelShape, clusters: Sequence[str | Cluster], prices: list[float | None], **asked: Any
) -> list[Plan | ConfigError]:
    """A plan for each cluster, at dollars per device-hour of `prices`; where the model does not fit, the error that says so.

    asked: as `plan` takes it. Raises ConfigError for a cluster that is none, and where no cluster has a plan.
    """
    found: list[Plan | ConfigError] = []
    for where, price in zip([cluster(each) if isinstance(each, str) else each for each in clusters], prices, strict=True):
        try:
            found.append(plan(model, where, price=price, **asked))
        except ConfigError as e:
            found.append(e)
    if all(isinstance(one, ConfigError) for one in found):
        raise next(one for one in found if isinstance(one, ConfigError))
    return found


def as_table(clusters: list[str], found: list[Plan | ConfigError], width: int | None = None) -> str:
    """The rows, and below them why a cluster has none. Rates are the most that each plan's devices carry within the promises."""
    rows = [_row(where, one) for where, one in zip(clusters, found, strict=True) if isinstance(one, Plan)]
    failed = [f"{where}: {one}" for where, one in zip(clusters, found, strict=True) if isinstance(one, ConfigError)]
    last = "TTFT and TPOT are means; `lockstep plan` with one of the clusters has all of its answer"
    body = table(HEAD, rows)
    if width is not None and max(map(len, body.split("\n"))) > width:  # a block for each cluster instead of a row
        body = "\n\n".join("\n".join(f"{name:<15} {value}" for name, value in zip(HEAD, row, strict=True)) for row in rows)
    return "\n".join([body, "", *(wrapped(line, width, 2) for line in [*failed, last])])


def _row(where: str, one: Plan) -> tuple[str, ...]:
    return (
        *(where, str(one.layout), str(one.devices), ms(one.ttft_s), ms(one.tpot_s) if one.work.streams else "-"),
        f"{one.band['ttft']:.0%}, {one.band['tpot']:.0%}",
        one.constants,
        f"{rate_of(one.most)}/s",
        _paid(one, one.per_hour, one.nodes_per_hour),
        _paid(one, one.cost_per_million, one.nodes_per_million),
        "yes" if one.meets else "no" + (f"; {one.enough.nodes} nodes would" if one.enough else ""),
    )


def _paid(one: Plan, devices: float | None, nodes: float | None) -> str:
    """Dollars for the devices, and for the nodes they are in where that is more."""
    if devices is None or nodes is None:
        return "no price"
    return dollars(devices) if one.rented == one.devices else f"{dollars(devices)}, {dollars(nodes)} of whole nodes"


def to_json(clusters: list[str], found: list[Plan | ConfigError]) -> list[dict[str, Any]]:
    """Everything as plain data, in the order asked; `error` where there is no plan."""
    return [
        one.to_json() if isinstance(one, Plan) else {"cluster": where, "error": str(one)}
        for where, one in zip(clusters, found, strict=True)
    ]
