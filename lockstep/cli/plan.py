"""`lockstep plan MODEL --cluster 2x8xH100`: which split, at what speed, memory and cost, and the command that starts it.

Reads a model's config only, starts nothing and loads no torch. Exit codes: 0 (also when a promise cannot be kept: the nearest
plan is printed with what it misses), 2 when a setting is wrong or nothing has the memory.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterable
from pathlib import Path

from lockstep.cli.errors import UsageError
from lockstep.planner.answer import Plan, plan, pricer_of
from lockstep.planner.catalogue import cluster as find_cluster
from lockstep.planner.hardware import Cluster
from lockstep.planner.pareto import as_svg, write_png
from lockstep.planner.quantity import FACTOR, read
from lockstep.planner.report import report

AXES = ("tp", "pp", "dp", "ep", "cp", "dcp")


def run(argv: list[str]) -> int:
    """Plan and print; the exit code."""
    args = parser().parse_args(argv)
    try:
        args.cluster = scaled(args.cluster, args.inter_scale)
        found = plan(
            args.model,
            args.cluster,
            input_len=args.input_len,
            output_len=args.output_len,
            rate=args.rate,
            ttft=args.ttft,
            tpot=args.tpot,
            price=args.price,
            quantization=args.quantization,
            memory_share=args.gpu_memory_utilization,
            fixed=axes(args.fix),
            startable=args.startable,
            hosts=args.hosts.split(",") if args.hosts else None,
        )
    except ValueError as e:
        raise UsageError(spelled(str(e), vars(args))) from None
    if args.plot:
        draw(found, args.plot)
    print(json.dumps(found.to_json(), indent=2) if args.json else report(found, explain=args.explain, draw=not args.no_draw))
    if args.simulate and not args.json:
        print(f"\non a virtual clock, the engine's own scheduler deciding\n{simulated(found, args)}")
    return 0


def parser() -> argparse.ArgumentParser:
    """The flags."""
    p = argparse.ArgumentParser(prog="lockstep plan", description=__doc__.partition("\n")[0])
    p.add_argument("model", metavar="MODEL", help="a name of the catalogue (llama-3.1-70b), a folder, a config.json, or a hub id")
    p.add_argument("--cluster", default="1x8xH100", help="NODESxDEVICESxDEVICE like 2x8xH100, or a YAML file (default 1x8xH100)")
    p.add_argument("--input-len", type=int, default=1024, help="tokens of a prompt (default 1024)")
    p.add_argument("--output-len", type=int, default=256, help="tokens of an answer (default 256)")
    p.add_argument("--rate", type=float, help="requests per second in all; default: as many as the cluster carries")
    p.add_argument("--ttft", type=float, help="longest time to the first token, in seconds")
    p.add_argument("--tpot", type=float, help="longest time per output token, in seconds")
    p.add_argument("--price", type=float, help="dollars per device-hour; default: the catalogue's")
    p.add_argument("--inter-scale", type=float, default=1.0, help="so many times the bandwidth between nodes, like 0.5 (default 1)")
    weights = "weights in 8 bits; none: the model's own type; default: as published, where that has a price (fp8, MXFP4 experts)"
    p.add_argument("--quantization", "-q", default="", choices=("int8", "fp8", "none"), help=weights)
    p.add_argument("--gpu-memory-utilization", type=float, default=0.9, help="share of a device's memory to plan with (default 0.9)")
    p.add_argument("--fix", default="", metavar="AXES", help="sizes that are given, like tp=16,pp=1")
    p.add_argument("--startable", action="store_true", help="only splits that this version of the engine runs (no EP, no CP)")
    p.add_argument("--hosts", default="", metavar="A,B,...", help="names or addresses of the nodes, for the commands")
    p.add_argument("--json", action="store_true", help="print everything as JSON")
    p.add_argument("--explain", action="store_true", help="print every term of both times with its formula and source")
    p.add_argument("--plot", metavar="FILE", help="draw the trade-off: .svg, or .png where matplotlib is installed")
    p.add_argument("--no-draw", action="store_true", help="no drawing in the terminal")
    p.add_argument("--simulate", action="store_true", help="also run the engine's own scheduler on a virtual clock under this load")
    return p


def spelled(message: str, flags: Iterable[str]) -> str:
    """`input_len=0 ...` as `--input-len=0 ...`: what the user typed is what the message names."""
    name, equals, _ = message.partition("=")
    return "--" + name.replace("_", "-") + message[len(name) :] if equals and name in flags and name != "model" else message


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
    try:
        if file.endswith(".svg"):
            Path(file).write_text(as_svg(found.pareto, found.mark, title), encoding="utf-8")
        elif file.endswith(".png"):
            write_png(found.pareto, found.mark, title, file)
        else:
            raise UsageError(f"--plot={file!r}: write a .svg or a .png.")
    except ImportError:
        raise UsageError(
            f"--plot={file!r} needs matplotlib, which is not installed here: pip install matplotlib, or write a .svg."
        ) from None
    except OSError as e:
        raise UsageError(f"--plot={file!r} cannot be written ({e.strerror}): name a file in a folder that is there.") from None


def simulated(found: Plan, args: argparse.Namespace) -> str:
    """The plan under its load, step by step."""
    from lockstep.simulation.planned import simulate_plan

    return simulate_plan(found, pricer_of(args.model, args.cluster, args.quantization)).describe()
