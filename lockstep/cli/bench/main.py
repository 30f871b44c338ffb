"""`lockstep bench latency|throughput|serve|collectives ...`: how fast the engine is here, as a figure others can make again.

  latency      one batch at a time: time to first token, time per token
  throughput   many requests at once: tokens per second; --compare transformers runs the peer in turn
  serve        load on any OpenAI-compatible server: what its users would feel
  collectives  ranks that talk: time per call by operation, size and communicator

latency and throughput take the engine's flags (`lockstep bench throughput --help`); --json prints one JSON line per result.
"""

from __future__ import annotations

import shlex
import sys
from dataclasses import replace
from pathlib import Path

from lockstep.cli.errors import UsageError
from lockstep.config.build import nearest
from lockstep.config.model_spec import ModelSpec
from lockstep.config.tree import EngineConfig
from lockstep.utils.interrupt import at_once

VERBS = ("latency", "throughput", "serve", "collectives")


def run(argv: list[str]) -> int:
    """Run one benchmark. Raises UsageError for a name that is none."""
    if not argv or argv[0] in ("-h", "--help"):
        print(__doc__, file=sys.stdout if argv else sys.stderr)
        return 0 if argv else 2
    if argv[0] not in VERBS:
        raise UsageError(f"{argv[0]!r} is not a benchmark: there are {', '.join(VERBS)}.{nearest(argv[0], VERBS)}")
    return {"latency": _latency, "throughput": _throughput, "serve": _serve, "collectives": _collectives}[argv[0]](argv[1:])


def _serve(argv: list[str]) -> int:
    with at_once():
        from lockstep.cli.bench.serve import run as measure

    return measure(argv)


def _collectives(argv: list[str]) -> int:
    with at_once():
        from lockstep.cli.bench.collectives import run as measure

    return measure(argv)


def _latency(argv: list[str]) -> int:
    with at_once():
        from lockstep.cli.bench.latency import LatencyArgs, latency
        from lockstep.cli.bench.result import Reporter
        from lockstep.cli.bench.workload import check_length
        from lockstep.cli.flags import parse

    parsed = parse("bench latency", argv, LatencyArgs, max_tokens=None, sampling=False, description="Time one batch.")
    parsed.options.check()
    config, spec, _ = _ready(parsed.config)
    check_length(parsed.options.input_len, parsed.options.output_len, config.model.max_model_len or spec.max_position_embeddings)
    report = Reporter(config, _name(config), _command("latency", argv), parsed.options.json)
    latency(config, spec.vocab_size, parsed.options, report)
    report.membw("end")
    return 0


def _throughput(argv: list[str]) -> int:
    with at_once():
        from lockstep.cli.bench.result import Reporter
        from lockstep.cli.bench.throughput import ThroughputArgs, throughput
        from lockstep.cli.flags import parse

    parsed = parse("bench throughput", argv, ThroughputArgs, max_tokens=None, sampling=False, description="Run many requests at once.")
    config, spec, folder = _ready(parsed.config)
    work = parsed.options.workload(spec.vocab_size, config.model.max_model_len or spec.max_position_embeddings)
    report = Reporter(config, _name(config), _command("throughput", argv), parsed.options.json)
    throughput(config, folder, work, spec.vocab_size, parsed.options, report)
    report.membw("end")
    return 0


def _ready(config: EngineConfig) -> tuple[EngineConfig, ModelSpec, Path]:
    """The checked configuration; the prefix cache is off, or repetitions would measure it."""
    from lockstep.config.validate import resolve

    return resolve(replace(config, cache=replace(config.cache, enable_prefix_caching=False)))


def _name(config: EngineConfig) -> str:
    """The model as results name it: never a path of somebody's machine."""
    return Path(config.model.model).name or "demo"


def _command(verb: str, argv: list[str]) -> str:
    """The command line, with folders shortened to their names."""
    words = [Path(word).name if Path(word).is_dir() else word for word in argv]
    return shlex.join(["lockstep", "bench", verb, *words])
