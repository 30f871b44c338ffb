"""What an all-reduce costs, and why tensor parallelism belongs inside a node.

1. The algorithms are message schedules (`schedules.py`) that are run on numbers: every rank ends with the sum.
2. A step of a schedule costs the latency of the link it uses and, of the rank that moves the most over it, bytes over bandwidth.
   Added up over the steps this is exactly the closed formula of each algorithm (`links.py`), a straight line in the bytes.
3. Below the size where a line's latency equals its bytes' time, only latency counts: a decode step is there, a prefill is not.
4. A model's step with TP over all nodes, and with TP inside each and pipeline stages across, is priced with these lines
   (`placement.py`).

The links used unless told otherwise are those of an H100 node: point-to-point messages measured at 7.7 us + S / 358 GB/s inside a node and
19.5 us + S / 36 GB/s between two (microsoft/vidur, profiling/network, fitted), of which a step of a running ring takes 0.84 us
inside (NCCL 2.29 all-reduce of aiconfigurator-core 0.12.0, fitted); what is left is the launch, which both pay alike.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from fractions import Fraction

from lockstep.config.errors import ConfigError
from lockstep.config.tree import opt
from lockstep.planner.teach import links, placement, schedules
from lockstep.planner.teach.checks import numbers, whole, within
from lockstep.planner.teach.links import Line, Wire
from lockstep.planner.teach.schedules import Schedule
from lockstep.planner.teach.svg import Axis, Canvas, Series, chart
from lockstep.planner.teach.table import bytes_text, percent, table, time_text


@dataclass(frozen=True)
class Options:
    """Which ranks, links and model. The links are those of an H100 node and of InfiniBand between two, as measured."""

    nodes: int = opt(2, "Machines.")
    per_node: int = opt(8, "Ranks of each machine.")
    sizes: str = opt("16384,262144,1048576,16777216,268435456", "Bytes to reduce, separated by commas.")
    tokens: str = opt("1,8,32,128,512,2048", "Tokens in a step of the model, separated by commas.")
    launch_us: str = opt("6.86", "Latency paid once for a collective, in microseconds.")
    inside_step_us: str = opt("0.84", "Latency of a step inside a node.")
    inside_gb_s: str = opt("358", "Bandwidth inside a node, 10^9 bytes a second, in one direction, of each rank.")
    between_step_us: str = opt("12.64", "Latency of a step between nodes.")
    between_gb_s: str = opt("36", "Bandwidth between nodes, of each rank.")
    hidden: int = opt(8192, "The model's width (default: Llama 70B).")
    layers: int = opt(80, "The model's layers; two all-reduces in each.")
    weight_gb: float = opt(141.1, "The model's weights, 10^9 bytes, in 16 bits.")
    memory_gb_s: float = opt(3350.0, "Memory bandwidth of each rank, 10^9 bytes a second.")
    tflops: float = opt(989.0, "Peak of each rank, 10^12 operations a second.")

    def wires(self) -> tuple[Wire, Wire]:
        """The link inside a node and the one between, exactly. Raises ConfigError."""
        launch = numbers("launch_us", self.launch_us, zero=True)[0] / 10**6
        inside, between = (
            Wire(launch, numbers(f"{name}_step_us", step, zero=True)[0] / 10**6, numbers(f"{name}_gb_s", speed)[0] * 10**9)
            for name, step, speed in (
                ("inside", self.inside_step_us, self.inside_gb_s),
                ("between", self.between_step_us, self.between_gb_s),
            )
        )
        if between.step_s < inside.step_s or between.bandwidth > inside.bandwidth:
            raise ConfigError(
                f"between_step_us={self.between_step_us} and between_gb_s={self.between_gb_s} make the link between nodes faster than "
                "the one inside: it must be equal or slower, so name the faster one inside."
            )
        return inside, between

    def model(self) -> placement.Model:
        """The model's step. Raises ConfigError."""
        for name in ("hidden", "layers", "weight_gb", "memory_gb_s", "tflops"):
            within(name, getattr(self, name), 1e-3, 1e9)
        return placement.Model(self.hidden, self.layers, self.weight_gb * 1e9, self.memory_gb_s * 1e9, self.tflops * 1e12)


@dataclass(frozen=True)
class Played:
    """One algorithm: its schedule played at 1 MiB against its formula."""

    name: str
    steps: int
    most_sent: Fraction  # of a rank, as a multiple of the buffer
    simulated_s: Fraction
    line: Line
    correct: bool


@dataclass(frozen=True)
class Result:
    """Every algorithm over all ranks, the line of the best ones by size, and the model's step."""

    options: Options
    played: tuple[Played, ...]
    inside: dict[str, Line]
    over_all: dict[str, Line]
    sizes: tuple[int, ...]
    placed: placement.Placement


PLAYED_BYTES = 1 << 20


def seconds(schedule: Schedule, size_bytes: int, per_node: int, inside: Wire, between: Wire) -> Fraction:
    """The time of a schedule, message by message: each step lasts until the rank with the most to move over a link has moved it.

    A rank sends and receives at once, inside its node and out of it at once; several messages over one link share it.
    """
    total, launch = Fraction(0), Fraction(0)
    for messages in schedule.by_step():
        load: defaultdict[tuple[int, bool, bool], Fraction] = defaultdict(Fraction)
        for message in messages:
            out, size = message.source // per_node != message.target // per_node, schedule.size(message, size_bytes)
            load[message.source, out, True] += size
            load[message.target, out, False] += size
        wires = {out: between if out else inside for _, out, _ in load}
        launch = max([launch, *(wire.launch_s for wire in wires.values())])
        total += max(wires[out].step_s + size / wires[out].bandwidth for (_, out, _), size in load.items())
    return launch + total


def sums(schedule: Schedule) -> bool:
    """Whether every rank ends with every chunk's sum: each rank's contribution is another power of four, so none hides another."""
    start = [[4**rank * (chunk + 1) for chunk in range(schedule.chunks)] for rank in range(schedule.ranks)]
    whole_sum = [sum(column) for column in zip(*start, strict=True)]
    return all(buffer == whole_sum for buffer in schedules.run(schedule, start))


def play(name: str, line: Line, nodes: int, per_node: int, inside: Wire, between: Wire) -> Played:
    """Run one algorithm on numbers and on the clock."""
    schedule = schedules.make(name, nodes, per_node)
    took = seconds(schedule, PLAYED_BYTES, per_node, inside, between)
    most = max(schedule.sent(PLAYED_BYTES)) / PLAYED_BYTES
    return Played(name, schedule.steps, most, took, line, sums(schedule))


def simulate(options: Options) -> Result:
    """Play every algorithm over all ranks, and price the model's step. Raises ConfigError for impossible settings."""
    nodes, per_node = options.nodes, options.per_node
    within("nodes", nodes, 1, 64)
    within("per_node", per_node, 1, 64)
    within("ranks (nodes x per_node)", nodes * per_node, 2, 128)
    inside, between = options.wires()
    over_all = links.lines(nodes, per_node, inside, between)
    played = tuple(play(name, line, nodes, per_node, inside, between) for name, line in over_all.items())
    in_node = links.lines(1, per_node, inside, between) if per_node > 1 else {}
    placed = placement.place(options.model(), nodes, per_node, inside, between, whole("tokens", options.tokens))
    return Result(options, played, in_node, over_all, whole("sizes", options.sizes), placed)


def report(result: Result) -> str:
    """The tables, in the order of the module's docstring."""
    o = result.options
    rows = [(p.name, p.steps, f"{p.most_sent} S", "yes" if p.correct else "NO", time_text(p.simulated_s), _same(p)) for p in result.played]
    parts = [
        f"all-reduce over {o.nodes * o.per_node} ranks, {o.per_node} on each node, message by message, S = {bytes_text(PLAYED_BYTES)}",
        "",
        table(("", "steps", "most sent by a rank", "sums right", "time", "equals its formula"), rows),
        "",
        _sizes(f"time by size, over all {o.nodes * o.per_node} ranks", result.over_all, result.sizes),
    ]
    if result.inside and o.nodes > 1:
        parts += ["", _sizes(f"time by size, the {o.per_node} ranks of one node", result.inside, result.sizes)]
    if result.inside:
        parts += ["", _bound(result)]
    return "\n".join([*parts, "", placement.report(result.placed)])


def _same(played: Played) -> str:
    return "exactly" if played.line.seconds(PLAYED_BYTES) == played.simulated_s else "NO"


def _sizes(title: str, lines: dict[str, Line], sizes: tuple[int, ...]) -> str:
    rows = []
    for size in sizes:
        times = {name: line.seconds(size) for name, line in lines.items()}
        rows.append((bytes_text(size), *map(time_text, times.values()), min(times, key=times.__getitem__)))
    return title + "\n" + table(("S", *lines, "best"), rows)


def _bound(result: Result) -> str:
    """Where a step's all-reduce stops being latency: the ring of one node."""
    o, ring = result.options, result.inside["ring"]
    rows = []
    for tokens in result.placed.tokens:
        size = 2 * o.hidden * tokens
        share = ring.fixed_s / ring.seconds(size)
        rows.append(
            (tokens, bytes_text(size), time_text(ring.seconds(size)), percent(share), "latency" if share > Fraction(1, 2) else "bandwidth")
        )
    at = ring.balance_bytes
    return (
        f"one all-reduce of a step in one node (ring, width {o.hidden}, 16 bits): latency and bytes cost the same at "
        f"{bytes_text(float(at))} = {float(at / (2 * o.hidden)):.1f} tokens\n"
        + table(("tokens", "S", "time", "of it latency", "bound by"), rows)
    )


def picture(result: Result) -> str:
    """Time by size of every algorithm over all ranks, and of the best one inside a node."""
    o = result.options
    canvas = Canvas(760, 420, f"All-reduce over {o.nodes * o.per_node} ranks, {o.per_node} on each of {o.nodes} nodes")
    sizes = [1 << exponent for exponent in range(10, 31)]
    series = [Series(name, [(size, float(line.seconds(size)) * 1e6) for size in sizes]) for name, line in result.over_all.items()]
    if result.inside and o.nodes > 1:
        best = [(size, float(min(line.seconds(size) for line in result.inside.values())) * 1e6) for size in sizes]
        series.append(Series(f"best in one node ({o.per_node})", best, dashed=True))
    across = Axis("bytes", 1 << 10, 1 << 30, [(1 << e, bytes_text(1 << e)) for e in range(10, 31, 5)], log=True)
    up = Axis("us", 1, 1e6, [(10**e, f"{10**e:,}") for e in range(7)], log=True)
    chart(canvas, 90, 70, 480, 280, "Time", across, up, series)
    return canvas.svg()
