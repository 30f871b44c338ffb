#!/usr/bin/env python3
"""`lockstep serve` beside vLLM's server: the same model, load and machine, rounds in turn, one server awake at a time.

    python benchmarks/serve_peers.py --model models/llama-0.5b --vllm-python peers/vllm/bin/python \\
        --rounds 5 --out benchmarks/results/serve_peers_llama-0.5b.jsonl

A JSON line per engine and round: TTFT and ITL, tokens a second, memory; one per engine with the seconds from its start to its
first token; then the ratios of medians. The load is that of `lockstep bench serve`: a closed loop, streamed completions of
token ids, greedy, end of sequence ignored, prefix caching off. How to install vLLM: benchmarks/peers/README.md.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import signal
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks" / "peers")]

import engines as kinds  # noqa: E402
from children import Child, ChildError, turn  # noqa: E402

from lockstep.cli.bench import machine  # noqa: E402
from lockstep.cli.bench.serve import ServeArgs, report, run_loop  # noqa: E402
from lockstep.cli.bench.serve_client import Client, LoadError, Record  # noqa: E402

NAME = "bench"  # of the model, in requests
FIGURES = ("median_ttft_ms", "p99_ttft_ms", "median_itl_ms", "p99_itl_ms", "median_tpot_ms", "output_throughput", "request_throughput")
LOWER_IS_BETTER = ("ttft", "itl", "tpot", "startup", "pss")


class Server(Child):
    """A server under test. `url` answers once `first_token` has returned."""

    def __init__(self, label: str, command: list[str], environ: dict[str, str], log: Path, port: int, timeout_s: float) -> None:
        super().__init__(label, command, environ, log, timeout_s)
        self.url = f"http://127.0.0.1:{port}"

    def first_token(self) -> float:
        """Seconds from the start of the program to the first token of a request that is tried all the time."""
        return asyncio.run(self._first_token()) - self.started

    async def _first_token(self) -> float:
        client = Client(self.url, {}, self.timeout_s)
        body = {"model": NAME, "prompt": list(range(101, 117)), "max_tokens": 1, "temperature": 0, "stream": True}
        deadline = time.monotonic() + self.timeout_s
        while True:
            record = Record()
            await client.stream("/v1/completions", body, record)
            if record.times_s:
                client.close()
                return record.times_s[0]
            if not self.tree() or self._process.poll() is not None:
                raise self._error("ended")
            if time.monotonic() > deadline:
                raise self._error(f"gave no token within {self.timeout_s:g} s ({record.error})")
            await asyncio.sleep(0.05)

    def close(self) -> None:
        """Ask it to end, as its users would; what is left of its tree after that is killed."""
        self.resume()
        with suppress(ProcessLookupError):
            self._process.send_signal(signal.SIGINT)
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(20)
        super().close()


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def command(engine: str, args: argparse.Namespace, port: int) -> list[str]:
    """The program to start; both have the same model, type, lengths, batch bounds and KV memory."""
    tp, dp = str(args.tp), str(args.dp)
    alike = ["--served-model-name", NAME, "--host", "127.0.0.1", "--port", str(port), "--dtype", args.dtype]
    alike += ["--max-model-len", str(args.max_model_len), "--max-num-seqs", "64", "--max-num-batched-tokens", "4096"]
    alike += ["--no-enable-prefix-caching", "-tp", tp, "-dp", dp]
    if engine == "vllm":
        program = [args.vllm_python, "-m", "vllm.entrypoints.openai.api_server", "--model", args.model, "--disable-uvicorn-access-log"]
        return [*program, *alike, *shlex.split(args.vllm_args)]
    kv = str((args.kv_gib << 30) // args.tp)
    return [sys.executable, "-m", "lockstep", "serve", args.model, *alike, "--kv-cache-memory-bytes", kv, *shlex.split(args.lockstep_args)]


def environment(engine: str, args: argparse.Namespace) -> dict[str, str]:
    environ = {**os.environ, "HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false"}
    if engine != "vllm":
        return environ | {"PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))}
    environ.pop("PYTHONPATH", None)  # another Python: our import path is not for it
    cores = tuple(sorted(os.sched_getaffinity(0)))
    ranks = args.tp * args.dp
    binding = kinds.thread_binding(ranks, max(1, len(cores) // ranks), cores)
    kv = str(max(1, args.kv_gib // args.tp))
    return environ | kinds.vllm_environment(args.vllm_python, args.tcmalloc, binding) | {"VLLM_CPU_KVCACHE_SPACE": kv}


def one_round(server: Server, args: argparse.Namespace, number: int) -> dict[str, Any]:
    """The load once, on a server that is awake alone. Raises LoadError or SystemExit when requests failed."""
    load = ServeArgs(
        base_url=server.url,
        model=NAME,
        num_prompts=args.num_prompts,
        num_warmups=2,
        max_concurrency=args.concurrency,
        random_input_len=args.input_len,
        random_output_len=args.output_len,
        random_range_ratio=args.range_ratio,
        vocab_size=args.vocab_size,
        ignore_eos=True,
        seed=1000 + number,
    )
    with turn(server):
        watch, before, start = machine.Noise(), server.cpu_s(), time.perf_counter()
        outcome = run_loop(load)
        found = report(load, outcome)
        if found["failed"]:
            first = next(record for record in outcome.records if record.error_kind)
            raise SystemExit(f"{server.label}: {found['failed']} of {args.num_prompts} requests failed: {first.error}")
        took_s = time.perf_counter() - start
        line = {name: found[name] for name in FIGURES}
        line |= {"pss_mib": round(server.pss_mib(), 1), "server_cores": round((server.cpu_s() - before) / took_s, 2)}
        return {
            **line,
            "client_cores": found["client_cores"],
            "output_tokens": found["total_output_tokens"],
            "other_cores": watch.other_cores(),
        }


class Results:
    """Prints every line, keeps it, and appends it to the file."""

    def __init__(self, out: Path | None) -> None:
        self.out, self.machine = out, machine.describe()
        self.lines: list[dict[str, Any]] = []
        self.command = shlex.join(["python", "benchmarks/serve_peers.py", *(Path(w).name if Path(w).exists() else w for w in sys.argv[1:])])

    def emit(self, **line: Any) -> None:
        self.lines.append(line)
        text = json.dumps({**line, "command": self.command, "machine": self.machine})
        print(text, flush=True)
        if self.out is not None:
            with self.out.open("a") as file:
                file.write(text + "\n")

    def median(self, engine: str, name: str) -> float | None:
        found = [line[name] for line in self.lines if line["engine"] == engine and line.get(name) is not None]
        return statistics.median(found) if found else None


def compare(args: argparse.Namespace, logs: Path) -> None:
    """Start each engine alone, then rounds in turn, forwards and backwards; then the ratios."""
    results = Results(args.out)
    with ExitStack() as stack:
        servers = []
        for engine in args.engines:
            port = free_port()
            log = logs / f"{engine}.log"
            server = Server(engine, command(engine, args, port), environment(engine, args), log, port, args.timeout)
            stack.callback(server.close)
            results.emit(engine=engine, metric="startup", model=Path(args.model).name, tp=args.tp, startup_s=round(server.first_token(), 3))
            server.pause()
            servers.append(server)
        for number in range(args.rounds):
            for server in servers if number % 2 == 0 else servers[::-1]:
                setting = {"model": Path(args.model).name, "tp": args.tp, "dp": args.dp, "concurrency": args.concurrency}
                found = one_round(server, args, number)
                results.emit(engine=server.label, metric="serve", round=number, **setting, **found)
    ours, others = args.engines[0], args.engines[1:]
    for other in others:
        ratios = {}
        for name in ("startup_s", *FIGURES, "pss_mib"):
            a, b = results.median(ours, name), results.median(other, name)
            if a and b:
                ratios[name] = round(b / a if any(word in name for word in LOWER_IS_BETTER) else a / b, 3)
        results.emit(engine=f"{ours}/{other}", metric="times_better", **ratios)


def arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default="models/llama-0.5b", help="folder of the checkpoint (scripts/make_bench_model.py)")
    parser.add_argument("--engines", default="lockstep,vllm", help="of lockstep and vllm, ours first")
    parser.add_argument("--vllm-python", default="peers/vllm/bin/python")
    parser.add_argument("--vllm-args", default="", help="more flags for vLLM's server")
    parser.add_argument("--lockstep-args", default="", help="more flags for ours")
    parser.add_argument("--tcmalloc", default="", help="libtcmalloc_minimal.so.4, where the system has none")
    parser.add_argument("--tp", type=int, default=2)
    parser.add_argument("--dp", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--kv-gib", type=int, default=2, help="of all ranks together")
    parser.add_argument("--max-model-len", type=int, default=2048)
    parser.add_argument("--concurrency", type=int, default=16)
    parser.add_argument("--num-prompts", type=int, default=64)
    parser.add_argument("--input-len", type=int, default=256)
    parser.add_argument("--output-len", type=int, default=128)
    parser.add_argument("--range-ratio", type=float, default=0.5)
    parser.add_argument("--vocab-size", type=int, default=4096)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--timeout", type=float, default=600.0, help="seconds that a server may take to start")
    parser.add_argument("--out", type=Path, help="file to append the JSON lines to")
    args = parser.parse_args()
    args.engines = args.engines.split(",")
    if set(args.engines) - {"lockstep", "vllm"}:
        parser.error(f"--engines={','.join(args.engines)}: there are lockstep and vllm.")
    return args


def main() -> int:
    args = arguments()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # servers are closed on the way out
    with tempfile.TemporaryDirectory() as logs:
        try:
            compare(args, Path(logs))
        except (ChildError, LoadError) as e:
            print(e, file=sys.stderr)
            return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
