"""`lockstep plan MODEL --cluster 2x8xH100`: which split, at what speed, memory and cost, and the command that starts it.

Reads a model's config only, starts nothing and loads no torch. Exit codes: 0 (also when a promise cannot be kept: the nearest
plan is printed with what it misses), 2 when a setting is wrong or nothing has the memory.
"""

from __future__ import annotations

import argparse
import json
import math
import re
import shutil
import sys
from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from lockstep.cli.errors import UsageError
from lockstep.cli.parser import Parser
from lockstep.planner.answer import Plan, plan, pricer_of
from lockstep.planner.catalogue import cluster as find_cluster
from lockstep.planner.compare import as_table, compare, to_json
from lockstep.planner.hardware import Cluster
from lockstep.planner.pareto import Asked
from lockstep.planner.plot import as_svg, write_png
from lockstep.planner.quantity import FACTOR, read
from lockstep.planner.report import report
from lockstep.planner.words import wrapped
from lockstep.utils import env

if TYPE_CHECKING:
    from lockstep.simulation.planned import Simulated

USUAL = "1x8xH100"
AXES = ("tp", "pp", "dp", "ep", "cp", "dcp")


def run(argv: list[str]) -> int:
    """Plan and print; the exit code."""
    args = parser().parse_args(argv)
    assumed = args.cluster is None
    args.cluster = USUAL if assumed else args.cluster
    clusters = args.cluster.split(",")
    prices = costs(args.price, len(clusters))
    asked: dict[str, Any] = {
        "input_len": args.input_len,
        "output_len": args.output_len,
        "rate": args.rate,
        "ttft": args.ttft,
        "tpot": args.tpot,
        "margin": args.margin,
        "max_model_len": args.max_model_len,
        "quantization": args.quantization,
        "memory_share": args.gpu_memory_utilization,
        "fixed": axes(args.fix),
        "startable": args.startable,
    }
    try:
        where = [scaled(text, args.inter_scale) for text in clusters]
        if len(clusters) > 1:
            return several(args, clusters, where, prices, asked)
        args.cluster = where[0]
        found = plan(args.model, where[0], price=prices[0], hosts=args.hosts.split(",") if args.hosts else None, **asked)
        if assumed:
            print(f"note: no --cluster was given, so this is for {USUAL}; `--cluster this` is the machine you calibrated.", file=sys.stderr)
        return one(args, found)
    except ValueError as e:
        raise UsageError(spelled(str(e), vars(args))) from None


def one(args: argparse.Namespace, found: Plan) -> int:
    """A whole answer."""
    if args.plot:
        draw(found, args.plot)
    run_through = simulated(found, args) if args.simulate else None
    if args.json:
        print(json.dumps(found.to_json() | ({"simulation": run_through.to_json()} if run_through else {}), indent=2))
        return 0
    width = columns()
    print(report(found, explain=args.explain, draw=not args.no_draw, width=width))
    if run_through:
        print(wrapped(f"\non a virtual clock, the engine's own scheduler deciding\n{run_through.describe()}", width, 14))
    return 0


def several(args: argparse.Namespace, clusters: list[str], where: list[Cluster], prices: list[float | None], asked: dict[str, Any]) -> int:
    """A row for each cluster."""
    for flag, given in (("plot", args.plot), ("hosts", args.hosts), ("simulate", args.simulate), ("explain", args.explain)):
        if given:
            raise UsageError(f"--{flag} is of one plan, and --cluster={args.cluster} names {len(clusters)}: take one of them for it.")
    found = compare(args.model, where, prices, **asked)
    print(json.dumps(to_json(clusters, found), indent=2) if args.json else as_table(clusters, found, columns()))
    return 0


def columns() -> int | None:
    """Characters of a line on the terminal; None where the text goes to a file or another program (which COLUMNS may speak for)."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() or env.columns() else None


def costs(text: str | None, clusters: int) -> list[float | None]:
    """Dollars per device-hour of each cluster: one number for all, or one each. Raises UsageError for what is neither."""
    if text is None:
        return [None] * clusters
    try:
        found = [float(part) for part in text.split(",")]
    except ValueError:
        found = []
    if len(found) not in (1, clusters) or not all(0 <= one < math.inf for one in found):
        raise UsageError(
            f"--price={text!r}: give dollars per device-hour, one number of 0 or more, or one for each of {clusters} clusters."
        )
    return [*found] * (clusters if len(found) == 1 else 1)


def parser() -> Parser:
    """The flags."""
    p = Parser(prog="lockstep plan", description=__doc__.partition("\n")[0])
    p.add_argument("model", metavar="MODEL", help="a name of the catalogue (llama-3.1-70b), a folder, a config.json, or a hub id")
    p.add_argument(
        "--cluster",
        help=f"NODESxDEVICESxDEVICE like 2x8xH100, or a YAML file (default {USUAL}); several, with commas between: a table",
    )
    p.add_argument("--input-len", type=int, default=1024, help="tokens of a prompt (default 1024)")
    p.add_argument("--output-len", type=int, default=256, help="tokens of an answer (default 256)")
    p.add_argument("--rate", type=float, help="requests per second in all; default: as many as the cluster carries")
    p.add_argument("--ttft", type=float, help="longest time to the first token, on average, in seconds")
    p.add_argument("--tpot", type=float, help="longest time per output token, on average, in seconds")
    p.add_argument("--margin", type=float, default=0.0, help="share by which predictions must stay below --ttft and --tpot (default 0)")
    p.add_argument("--price", metavar="DOLLARS", help="dollars per device-hour, for the cost; of several clusters one each, like 2.5,4")
    p.add_argument("--inter-scale", type=float, default=1.0, help="so many times the bandwidth between nodes, like 0.5 (default 1)")
    p.add_argument("--max-model-len", type=int, help="tokens of the longest request that is let in; default: input and output together")
    weights = "weights in 8 bits; none: the model's own type; default: as published, where that has a price (fp8, MXFP4 experts)"
    p.add_argument("--quantization", "-q", default="", choices=("int8", "fp8", "none"), help=weights)
    p.add_argument("--gpu-memory-utilization", type=float, default=0.9, help="share of a device's memory to plan with (default 0.9)")
    p.add_argument("--fix", default="", metavar="AXES", help="sizes that are given, like tp=16,pp=1")
    p.add_argument("--startable", action="store_true", help="only splits that this version of the engine runs (no EP, no CP)")
    p.add_argument("--hosts", default="", metavar="A,B,...", help="names or addresses of the nodes, for the commands")
    p.add_argument("--json", action="store_true", help="print everything as JSON")
    p.add_argument("--explain", action="store_true", help="print every term of both times with its formula and source")
    p.add_argument("--plot", metavar="FILE", help="draw the trade-off: .svg, or .png (pip install 'lockstep[plot]')")
    p.add_argument("--no-draw", action="store_true", help="no drawing in the terminal")
    p.add_argument("--simulate", action="store_true", help="also run the engine's own scheduler on a virtual clock under this load")
    return p


def spelled(message: str, flags: Iterable[str]) -> str:
    """`input_len=0 ...` as `--input-len=0 ...`, wherever it is: what the user typed is what the message names. The model has no flag."""
    names = "|".join(sorted((name for name in flags if name not in ("model", "cluster")), key=len, reverse=True))
    message = f"model {rest}" if (rest := message.removeprefix("model=")) != message else message
    return re.sub(rf"(?<![\w-])({names})=", lambda found: f"--{found[1].replace('_', '-')}=", message)


def axes(text: str) -> dict[str, int]:
    """ "tp=16,pp=1" as a dict. Raises UsageError for what is no axis or no size."""
    found: dict[str, int] = {}
    for part in filter(None, text.split(",")):
        name, _, value = (word.strip().lower() for word in part.partition("="))
        if name not in AXES or not (value.isascii() and value.isdigit()) or int(value) < 1:
            raise UsageError(f"--fix={text!r}: {part!r} is no axis with a size: write them like tp=16,pp=1, of {', '.join(AXES)}.")
        if name in found:
            raise UsageError(f"--fix={text!r} gives {name} twice: give it once.")
        found[name] = int(value)
    return found


def scaled(text: str, factor: float) -> Cluster:
    """The cluster that was named, with `factor` times the bandwidth between nodes. Raises ConfigError for what is none."""
    found = find_cluster(text)
    return found if factor == 1 else found.with_links(inter=found.inter.scaled(read(f"--cluster {text}", "--inter-scale", factor, FACTOR)))


def draw(found: Plan, file: str) -> None:
    """The trade-off as a picture. Raises UsageError for another suffix, a folder that is not there, or a missing matplotlib."""
    title = f"{found.model} on {found.cluster}: {found.work.input_len} + {found.work.output_len} tokens"
    asked = Asked.of(found.work, found.devices)
    try:
        if file.endswith(".svg"):
            Path(file).write_text(as_svg(found.pareto, found.mark, title, asked), encoding="utf-8")
        elif file.endswith(".png"):
            write_png(found.pareto, found.mark, title, file, asked)
        else:
            raise UsageError(f"--plot={file!r}: write a .svg or a .png.")
    except ImportError:
        raise UsageError(
            f"--plot={file!r} needs matplotlib, which is not installed here: pip install 'lockstep[plot]', or write a .svg."
        ) from None
    except OSError as e:
        raise UsageError(f"--plot={file!r} cannot be written ({e.strerror}): name a file in a folder that is there.") from None


def simulated(found: Plan, args: argparse.Namespace) -> Simulated:
    """The plan under its load, step by step."""
    from lockstep.simulation.planned import simulate_plan

    return simulate_plan(found, pricer_of(args.model, args.cluster, args.quantization))
