"""`plan`: the question put together, the search run, and the answer with all that explains it."""

from __future__ import annotations

import math
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

from lockstep.config.errors import ConfigError
from lockstep.planner.asked import check, check_axes, check_hosts
from lockstep.planner.calibration import of_device
from lockstep.planner.catalogue import cluster as find_cluster
from lockstep.planner.choose import choose
from lockstep.planner.command import Command, Limits, commands
from lockstep.planner.crossover import Crossover, tp_or_pp
from lockstep.planner.entry import KERNELS
from lockstep.planner.explain import Runner, runners_up
from lockstep.planner.find import find_model
from lockstep.planner.hardware import Cluster, Device, Link
from lockstep.planner.host import SERVING as HOST_SERVING
from lockstep.planner.host import HostPricer, HostSearch
from lockstep.planner.layer import Setting
from lockstep.planner.layout import Layout
from lockstep.planner.load import Point, Replica, Serving, Workload
from lockstep.planner.memory import BLOCK_TOKENS, RankMemory
from lockstep.planner.model import ModelShape
from lockstep.planner.pareto import Mark
from lockstep.planner.promises import Enough, Promise, enough, judge, misses
from lockstep.planner.ranks import RankGroup
from lockstep.planner.refusal import refusal
from lockstep.planner.search import Candidate, Search, request_blocks
from lockstep.planner.startable import assumed, axes_missing, listed, missing, weight_dtype
from lockstep.planner.step import Pricer
from lockstep.planner.terms import Term, operation_error, total_s
from lockstep.planner.tradeoff import trade_off

LONG_TTFT_S, LONG_TPOT_S = 60.0, 1.0  # promises beyond which the unit is doubted


@dataclass(frozen=True)
class Plan:
    """The answer. Times in seconds, rates in requests per second, memory in bytes of the fullest rank."""

    model: str
    cluster: str
    work: Workload
    layout: Layout
    devices: int
    limits: Limits
    point: Point  # one replica's load
    meets: bool
    misses: list[str]  # in words
    promises: list[Promise]
    ttft_s: float
    tpot_s: float
    ttft_terms: list[Term]
    tpot_terms: list[Term]
    longest_gap_s: float
    utilisation: float
    rate: float  # carried by the whole plan at this point
    tokens_per_device_s: float  # output tokens
    cost_per_million: float | None  # output tokens, dollars
    price_per_hour: float | None  # of one device
    memory: RankMemory
    kv_bytes: int  # of the requests this plan runs at once, at full length
    kv_room: int  # bytes free for the KV cache
    ranks: list[RankGroup]  # what every rank of a deployment holds
    admits: dict[str, float]  # the largest rate within TTFT alone, TPOT alone, both
    runners: list[Runner]
    commands: list[Command]
    calibrated: bool
    basis: str  # what the constants come from
    constants: str  # the same in a few words
    band: dict[str, float]
    pareto: list[Mark]
    crossover: Crossover | None
    considered: int
    seconds: float
    notes: list[str] = field(default_factory=list)
    missing: list[str] = field(default_factory=list)  # what this version of the engine lacks to run it
    startable: bool = True  # the commands start the plan as printed
    links: dict[str, Link] = field(default_factory=dict)  # inside a node, between nodes
    nodes: int = 1  # that the commands are for
    rented: int = 1  # devices of those nodes: machines are rented whole
    enough: Enough | None = None  # nodes that would carry the rate, where this cluster cannot

    @property
    def per_hour(self) -> float | None:
        """Dollars per hour of the devices used; None without a price."""
        return None if self.price_per_hour is None else self.price_per_hour * self.devices

    @property
    def nodes_per_hour(self) -> float | None:
        """Dollars per hour of the whole nodes."""
        return None if self.price_per_hour is None else self.price_per_hour * self.rented

    @property
    def nodes_per_million(self) -> float | None:
        """Dollars per million output tokens when whole nodes are paid for."""
        return None if self.cost_per_million is None else self.cost_per_million * self.rented / self.devices

    @property
    def most(self) -> float:
        """Requests per second that this layout on these devices carries within the promises; as it runs, where it breaks them."""
        return self.admits["both"] or self.rate

    @property
    def mark(self) -> Mark:
        """The plan's own point of the trade-off."""
        return Mark(str(self.layout), self.point.concurrency, 1 / self.tpot_s, self.tokens_per_device_s, self.ttft_s)

    @property
    def operations(self) -> list[Term]:
        """The terms of a token's time that are operations of the device; of a prompt's, where an answer is one token."""
        return [term for term in (self.tpot_terms if self.work.streams else self.ttft_terms) if term.error_s]

    @property
    def by_samples(self) -> float:
        """The share of their time that measured samples priced; 0 where none of them says how far off it is."""
        known = self.operations
        return sum(term.table_s for term in known) / total_s(known) if known else 0.0

    def to_json(self) -> dict[str, Any]:
        """Everything as plain data; TPOT is null where an answer is one token. Each term says by which method it was priced."""
        found = asdict(self) | ({} if self.work.streams else {"tpot_s": None})
        for name in ("ttft_terms", "tpot_terms"):
            found[name] = [asdict(term) | {"method": term.method} for term in getattr(self, name)]
        found["by_samples"] = self.by_samples
        found["layout"]["devices"] = self.devices
        tokens = self.kv_bytes // max(1, self.memory.kv_per_token)
        for group in found["ranks"]:
            group["memory"]["kv"] = tokens * group["memory"]["kv_per_token"]
        found |= {"per_hour": self.per_hour, "nodes_per_hour": self.nodes_per_hour, "nodes_per_million": self.nodes_per_million}
        if self.crossover is not None:
            found["crossover"] |= {"from_requests": self.crossover.from_requests, "words": str(self.crossover)}
        return found


def plan(
    model: str | Path | ModelShape, cluster: str | Path | Cluster, *, input_len: int = 1024, output_len: int = 256,
    rate: float | None = None, ttft: float | None = None, tpot: float | None = None, price: float | None = None, quantization: str = "",
    memory_share: float = 0.9, fixed: dict[str, int] | None = None, startable: bool = False,
    hosts: list[str] | None = None, serving: Serving | None = None, margin: float = 0.0, max_model_len: int | None = None,
) -> Plan:  # fmt: skip
    """The best layout of `model` on `cluster` for requests of `input_len` + `output_len` tokens. Seconds, requests per second.

    fixed: axes that are given, like {"tp": 16}. startable: only what this version of the engine runs (no EP, no CP).
    price: dollars per device-hour. margin: the share by which predictions must stay below `ttft` and `tpot`. max_model_len: tokens
    of the longest request that is let in; default input_len + output_len. quantization: "int8" or "fp8" weights, "none" for the
    model's own type, empty for what is published.
    Promises that cannot be kept give the nearest plan, with `meets` False. Raises ConfigError for a setting that cannot be, and
    where no layout has the memory for one request: its message says how much is missing and what would fit.
    """
    start = time.perf_counter()
    shape, name = (model, model.name) if isinstance(model, ModelShape) else find_model(str(model))
    where = cluster if isinstance(cluster, Cluster) else find_cluster(str(cluster))
    work = check(Workload(input_len, output_len, rate, ttft, tpot, margin, max_model_len), shape, memory_share, quantization, price)
    names = check_hosts(hosts or [f"node{i}" for i in range(where.nodes)], where)
    given = check_axes(fixed)
    search = search_of(pricer_of(shape, where, quantization), work, serving, memory_share)
    if startable and (lacking := [*missing(search.pricer.setting, Layout()), *axes_missing(given)]):
        words = f"no layout of {shape.name} on {where} is startable: the engine does not run {listed(lacking)} yet"
        raise ConfigError(f"{words}; leave --startable out to see the plan.")
    wanted = (dict.fromkeys(("ep", "cp", "dcp"), 1) if startable else {}) | given
    everything = search.all(lambda layout: all(getattr(layout, axis) == size for axis, size in wanted.items() if axis != "dp"))
    if "dp" in wanted:
        everything = [c.pinned(wanted["dp"] // c.layout.dp) for c in everything if _has_room(c, wanted["dp"])]
    if not any(c.fits for c in everything):
        raise ConfigError(refusal(search, everything, wanted))
    chosen = choose(search, everything)
    found = answer(search, chosen.best, chosen.best.needed(rate) or chosen.best.at_most, chosen.ordered, chosen.everything, price)
    per_node = where.devices_per_node * (found.layout.devices // found.devices)  # ranks: of a calibrated machine, several on one device
    lines = commands(name, found.layout, found.limits, names, per_node, quantization=quantization, share=memory_share)
    nodes, servers = len({line.node for line in lines}), sum("--headless" not in line.line for line in lines)
    several = f"the commands start {servers} servers that know nothing of each other: put a load balancer in front of them"
    short = rate is not None and found.rate < rate * (1 - 1e-9) and search.grows and "dp" not in wanted
    return replace(
        found, commands=lines, notes=[*found.notes, *([several] if servers > 1 else [])],
        nodes=nodes, rented=nodes * where.devices_per_node,
        enough=enough(search, everything) if short else None, seconds=time.perf_counter() - start,
    )  # fmt: skip


def _has_room(c: Candidate, replicas: int) -> bool:
    """Whether just so many replicas are a number of this deployment that the cluster has room for."""
    return replicas in range(c.layout.dp, c.layout.dp * c.at_most + 1, c.layout.dp)


def pricer_of(model: str | Path | ModelShape, cluster: str | Path | Cluster, quantization: str = "") -> Pricer:
    """The prices that a plan of these is made with: this machine's own steps, where it is calibrated and the engine runs the model."""
    shape = model if isinstance(model, ModelShape) else find_model(str(model))[0]
    where = cluster if isinstance(cluster, Cluster) else find_cluster(str(cluster))
    stored = weight_dtype(shape, quantization)
    setting, found = Setting(shape, where, weight_dtype=stored), of_device(where.device)
    own = found is not None and where.devices == 1 and shape.spec is not None and stored in ("", "int8") and shape.dtype == found.dtype
    return HostPricer(setting, found) if own and found else Pricer(setting)


def search_of(pricer: Pricer, work: Workload, serving: Serving | None = None, memory_share: float = 0.9) -> Search:
    """The search with these prices."""
    own = isinstance(pricer, HostPricer)
    return (HostSearch if own else Search)(pricer, work, serving or (HOST_SERVING if own else Serving()), memory_share)


def answer(search: Search, best: Candidate, count: int, ordered: list[Candidate], everything: list[Candidate], price: float | None) -> Plan:
    """The plan of `count` deployments of a candidate, with what explains it; commands are not in it yet."""
    setting, work = search.pricer.setting, search.work
    layout, replica = best.placed(count), search.replica(best.layout, best.chunk)
    point = search.loaded(best, count)
    ttft_terms, tpot_terms = replica.ttft_terms(point.concurrency), replica.tpot_terms(point.concurrency)
    rate = min(point.rate * layout.dp, work.rate or math.inf)
    tokens = rate * work.output_len / (best.devices * count)
    paid = price if price is not None else setting.device.price_per_hour
    admits = _admits(search, best, replica, layout.dp)
    largest = best.best.concurrency if best.best and work.rate is not None else 0
    seqs = max(largest, point.concurrency)
    room, memory = search.fullest(best.layout, best.chunk, -(-seqs // layout.pp))
    alone = [search.replica(c.layout, c.chunk).at(1) for c in everything if c.fits] if work.misses(point) else []
    broken = misses(work, point, rate, alone)
    lacking = missing(setting, layout)
    band, own = search.band(layout, best.chunk), isinstance(search, HostSearch)
    calibrated = setting.device.calibrated and search.serving.calibrated and (own or setting.device.engine is None)
    operations = operation_error(tpot_terms if work.streams else ttft_terms)
    return Plan(
        model=setting.shape.name, cluster=str(setting.cluster), work=work, layout=layout, devices=best.devices * count,
        limits=Limits(seqs, max(seqs, best.chunk + -(-seqs // layout.pp)), work.longest),
        point=point, meets=not broken, misses=broken, promises=judge(work, point, admits["both"], band),
        ttft_s=total_s(ttft_terms), tpot_s=total_s(tpot_terms),
        ttft_terms=ttft_terms, tpot_terms=tpot_terms, longest_gap_s=replica.longest_gap_s(point.concurrency),
        utilisation=replica.utilisation(point.concurrency), rate=rate, tokens_per_device_s=tokens,
        cost_per_million=None if paid is None else paid / 3600 / tokens * 1e6, price_per_hour=paid,
        memory=memory, kv_bytes=seqs * request_blocks(work.tokens, layout) * BLOCK_TOKENS * memory.kv_per_token, kv_room=room,
        ranks=search.ranks(best.layout, best.chunk, -(-seqs // layout.pp)),
        admits=admits, runners=runners_up(search, best, count, ordered, everything), commands=[],
        calibrated=calibrated, basis=_basis(setting.device, calibrated=calibrated),
        constants=_constants(setting.device, calibrated=calibrated),
        band={"tpot": band.tpot, "ttft": band.ttft, "operation": operations},
        pareto=trade_off(search, everything) if work.streams else [],
        crossover=tp_or_pp(search.pricer, work.decode_context) if work.streams else None,
        considered=len(everything), seconds=0.0, notes=_notes(setting, work, layout, lacking) + search.notes(layout, best.chunk),
        missing=lacking, startable=not lacking, links={"inside a node": setting.cluster.intra, "between nodes": setting.cluster.inter},
    )  # fmt: skip


def _admits(search: Search, c: Candidate, replica: Replica, replicas: int) -> dict[str, float]:
    """The largest rate of this layout within each promise alone and within all; 0 where a single request breaks it."""
    work, found = search.work, {}
    for name, asked in (("ttft", replace(work, tpot_s=None)), ("tpot", replace(work, ttft_s=None)), ("both", work)):
        most = search.exact(replica, c.fits, lambda p, asked=asked: not asked.misses(p))  # type: ignore[misc]
        found[name] = replica.at(most).rate * replicas if most else 0.0
    return found


def _constants(device: Device, *, calibrated: bool) -> str:
    """`_basis` in a few words."""
    if calibrated:
        return "calibrated"
    if device.calibrated:
        return "kernels measured" + " in part" * bool(device.borrowed)
    return f"the {device.like}'s" if device.borrowed else "not calibrated"


def _basis(device: Device, *, calibrated: bool) -> str:
    """What the constants come from, and what would make them better."""
    if calibrated:
        return "calibrated"
    if device.name.upper() == "CPU":
        return "not calibrated: run `lockstep calibrate` on the machines"
    if device.engine is not None:
        return "not calibrated for this model, type or number of machines: priced by the entry's six numbers"
    own = ", ".join(words for words in KERNELS.values() if words not in device.borrowed) if device.borrowed else "kernels"
    measured_on = device.name if device.borrowed or not device.like else device.like  # another's, where only its price is another
    there = f"{own} as measured on {measured_on}s" if device.calibrated and own else "no kernel was measured on this device"
    lent = f"{', '.join(device.borrowed)}: constants of the {device.like}, scaled by the data sheet" if device.borrowed else ""
    fit = "a server's overheads are assumed, until you fit them to serving runs of yours (docs/planner.md#serving)"
    return "; ".join(part for part in (there, lent, fit) if part)


def _notes(setting: Setting, work: Workload, layout: Layout, lacking: list[str]) -> list[str]:
    """What a reader should know about these numbers."""
    found = [note for note in (assumed(setting.shape, setting.weight_dtype),) if note]
    if lacking:
        other = missing(setting, Layout()) != lacking and not missing(setting, Layout())
        words = "; --startable leaves such layouts out" if other else ""
        found.append(f"this version of the engine does not run {listed(lacking)} yet: planned and priced, not startable{words}")
    if setting.weight_dtype == "fp8" and not setting.shape.quantized:
        found.append(f"the printed command starts {setting.shape.dtype} weights: the engine has no flag for fp8 ones yet")
    for name, asked, most in (("--ttft", work.ttft_s, LONG_TTFT_S), ("--tpot", work.tpot_s, LONG_TPOT_S)):
        if asked is not None and asked > most:
            found.append(f"{name} {asked:g} is in seconds: {asked / 1e3:g} would be {asked:g} ms")
    if work.max_model_len is None:
        words = f"the command lets in requests of up to {work.longest} tokens; --max-model-len lets in longer ones"
        found.append(f"lengths are taken as fixed: {words}")
    if not work.streams:
        found.append("answers of one token have no time between tokens: TPOT takes no part" if work.tpot_s else "")
    return [note for note in found if note]
