"""`lockstep bench latency`: one batch at a time: time to the first token, time per token after it, and in all."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

from lockstep.cli.bench import workload
from lockstep.cli.bench.profile import PROFILE_HELP, check_folder, record
from lockstep.cli.bench.result import Reporter
from lockstep.cli.bench.throughput import run_ours
from lockstep.cli.errors import UsageError
from lockstep.cli.session import settings
from lockstep.config.tree import EngineConfig, opt
from lockstep.llm import LLM


@dataclass(frozen=True)
class LatencyArgs:
    """What to run."""

    batch_size: int = opt(1, "Requests in the batch.")
    input_len: int = opt(128, "Tokens of every prompt.")
    output_len: int = opt(128, "Tokens of every output.")
    repetitions: int = opt(5, "Counted runs; the median is the figure.")
    profile: str | None = opt(None, PROFILE_HELP)
    json: bool = opt(False, "Print one JSON line per result on standard output.")

    def check(self) -> None:
        """Raises UsageError when a count or a length is too small."""
        for name, least in (("batch_size", 1), ("input_len", 1), ("output_len", 2), ("repetitions", 1)):
            if getattr(self, name) < least:
                raise UsageError(f"--{name.replace('_', '-')}={getattr(self, name)} is invalid: it must be at least {least}.")


def latency(config: EngineConfig, vocab_size: int, args: LatencyArgs, report: Reporter) -> None:
    """Measure prefill alone (one output token) and the whole; the difference is decode."""
    args.check()
    check_folder(args.profile)
    start = time.perf_counter()
    with LLM(**settings(config)) as llm:
        report.emit("lockstep", "startup", [time.perf_counter() - start], "s")
        seconds = _timer(llm, vocab_size, args)
        seconds(0, 2)
        runs = [(seconds(2 * i + 1, 1), seconds(2 * i + 2, args.output_len)) for i in range(args.repetitions)]  # a machine's speed changes
        record(llm, args.profile, report, lambda: seconds(2 * args.repetitions + 1, args.output_len))
    emit(runs, args, report)


def emit(runs: list[tuple[float, float]], args: LatencyArgs, report: Reporter) -> None:
    """The figures of `runs`: seconds of a batch to its first token, and to its end."""
    per_token = [(whole - first) / (args.output_len - 1) * 1000 for first, whole in runs]
    size = {"batch_size": args.batch_size, "input_len": args.input_len, "output_len": args.output_len}
    report.emit("lockstep", "time_to_first_token", [first * 1000 for first, _ in runs], "ms", **size)
    if min(per_token) > 0:
        report.emit("lockstep", "time_per_output_token", per_token, "ms", **size)
        report.emit("lockstep", "decode_tokens_per_s", [args.batch_size * 1000 / t for t in per_token], "tok/s", **size)
    else:
        report.note(f"decode of {args.output_len - 1} tokens took less than two runs differ by: --output-len must be larger to measure it")
    report.emit("lockstep", "end_to_end", [whole for _, whole in runs], "s", **size)


def _timer(llm: LLM, vocab_size: int, args: LatencyArgs) -> Callable[[int, int], float]:
    """A function (seed, output tokens) -> seconds for one batch with prompts of their own."""

    def seconds(seed: int, output_len: int) -> float:
        return run_ours(llm, workload.fixed(vocab_size, args.batch_size, args.input_len, output_len, seed))[0]

    return seconds
