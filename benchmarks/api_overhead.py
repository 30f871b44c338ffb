#!/usr/bin/env python3
"""Whether one API process keeps up: many streams over a fake engine that gives each of them 20 tokens a second, on one core.

    python benchmarks/api_overhead.py --streams 1000 --seconds 20 --out benchmarks/results/api_overhead.jsonl

Everything above the engine is real: HTTP, JSON, detokenizing, the socket to the engine's process, which is a fake one. The API
process has one core for itself; the fake engine and this load generator share the others. A token is due at a time that both
ends know; its lag is how much later the client has it. A process that keeps up has a lag that does not grow, below the 50 ms
between tokens. With --phases 1 all streams have their tokens at once, as in one engine's batch: that is the hardest.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import os
import shlex
import socket
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import psutil

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from lockstep.cli.bench import machine  # noqa: E402
from lockstep.cli.bench.serve_client import Client, Record  # noqa: E402
from lockstep.cli.bench.serve_stats import percentile  # noqa: E402
from lockstep.testing.paced import PERIOD_S, PHASES, phase_s  # noqa: E402

SERVER = """
import sys
from lockstep.config.build import build_config
from lockstep.config.serve import ServeOptions
from lockstep.server.launch import serve
sys.exit(serve(build_config(cpu_binding=False), ServeOptions(port=int(sys.argv[1])), client="lockstep.testing.paced:make"))
"""
START_S = 60.0
PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}


def lags_s(record: Record, prompt_tokens: int) -> list[float]:
    """For each token, seconds from when it was due. The first one's due time is the last before it came."""
    if not record.times_s:
        return []
    phase = phase_s(prompt_tokens)
    first = record.times_s[0] - (record.times_s[0] - phase) % PERIOD_S
    return [at - (first + i * PERIOD_S) for i, at in enumerate(record.times_s)]


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def pin(process: psutil.Process, cores: set[int]) -> None:
    """All threads of a process."""
    for thread in process.threads():
        os.sched_setaffinity(thread.id, cores)


def cpu_s(process: psutil.Process) -> float:
    times = process.cpu_times()
    return float(times.user + times.system)


async def load(url: str, args: argparse.Namespace, api: psutil.Process) -> dict[str, Any]:
    """All streams, begun over `--ramp` seconds; what the API process used is taken between the ramp and the first end."""
    client = Client(url, {}, args.seconds + args.ramp + 60)
    tokens = round((args.seconds + args.ramp) / PERIOD_S)
    records = [Record() for _ in range(args.streams)]
    lengths = [PHASES + (i % args.phases) * PHASES // args.phases for i in range(args.streams)]
    stream = {"max_tokens": tokens, "stream": True, "stream_options": {"include_usage": True}, "temperature": 0, "ignore_eos": True}

    async def one(i: int) -> None:
        await asyncio.sleep(args.ramp * i / args.streams)
        await client.stream(PATHS["completions"], {"prompt": [500 + i % 3000] * lengths[i], **stream}, records[i])

    tasks = [asyncio.create_task(one(i)) for i in range(args.streams)]
    await asyncio.sleep(args.ramp + 1)
    begin, used = time.perf_counter(), cpu_s(api)
    await asyncio.sleep(max(1.0, args.seconds - 2))
    end, used = time.perf_counter(), cpu_s(api) - used
    own = time.process_time()
    await asyncio.gather(*tasks)
    client.close()
    late = [(at, lag) for r, n in zip(records, lengths, strict=True) for at, lag in zip(r.times_s, lags_s(r, n), strict=True)]
    steady = sorted(1000 * lag for at, lag in late if begin <= at < end)
    last = sorted(1000 * lag for at, lag in late if end - 1 <= at < end)
    if not steady:
        raise SystemExit(f"no token came: {next((r.error for r in records if r.error), 'the streams ended early')}")
    ttft = sorted(1000 * (r.times_s[0] - r.sent_s) for r in records if r.times_s)
    return {
        "tokens_per_s": round(len(steady) / (end - begin), 1),
        "due_tokens_per_s": round(args.streams / PERIOD_S, 1),
        "lag_ms": {"p50": round(percentile(steady, 50), 2), "p99": round(percentile(steady, 99), 2), "max": round(steady[-1], 2)},
        "lag_last_second_ms": {"p50": round(percentile(last, 50), 2), "p99": round(percentile(last, 99), 2)} if last else None,
        "ttft_ms": {"p50": round(percentile(ttft, 50), 2), "p99": round(percentile(ttft, 99), 2)},
        "api_cores": round(used / (end - begin), 3),
        "api_cpu_s": round(used, 3),
        "api_us_per_token": round(1e6 * used / len(steady), 2),
        "client_cpu_s_after": round(time.process_time() - own, 3),
        "failed": sum(bool(r.error_kind) for r in records),
    }


def measure(args: argparse.Namespace) -> dict[str, Any]:
    """Start the server, measure it, end it."""
    port, cores = free_port(), sorted(os.sched_getaffinity(0))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))}
    with tempfile.TemporaryFile("w+") as log:
        server = subprocess.Popen([sys.executable, "-c", SERVER, str(port)], env=environment, stdout=log, stderr=log)
        try:
            deadline = time.monotonic() + START_S
            while True:
                log.seek(0)
                said = log.read()
                if "lockstep serves" in said:
                    break
                if server.poll() is not None or time.monotonic() > deadline:
                    raise SystemExit(f"the server did not start:\n{said}")
                time.sleep(0.1)
            api = psutil.Process(server.pid)
            rest = set(cores[1:]) or set(cores)
            pin(api, {cores[0]})
            for child in api.children(recursive=True):
                pin(child, rest)
            pin(psutil.Process(), rest)
            return asyncio.run(load(f"http://127.0.0.1:{port}", args, api)) | {"api_rss_mib": round(api.memory_info().rss / 2**20, 1)}
        finally:
            pin(psutil.Process(), set(cores))
            server.terminate()
            try:
                server.wait(20)
            except subprocess.TimeoutExpired:
                server.kill()
                server.wait()


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--streams", type=int, default=1000, help="streams at once")
    parser.add_argument("--seconds", type=float, default=20.0, help="how long all of them run")
    parser.add_argument("--ramp", type=float, default=5.0, help="seconds over which they begin")
    parser.add_argument("--phases", type=int, default=1, help=f"groups of streams with tokens at times of their own, 1 to {PHASES}")
    parser.add_argument("--repetitions", type=int, default=1)
    parser.add_argument("--out", type=Path, help="file to append the JSON lines to")
    args = parser.parse_args()
    for _ in range(args.repetitions):
        watch = machine.Noise()
        line = {"metric": "api_overhead", "streams": args.streams, "phases": args.phases, "seconds": args.seconds, **measure(args)}
        line |= {"other_cores": watch.other_cores(), "command": shlex.join(["python", "benchmarks/api_overhead.py", *sys.argv[1:]])}
        line["machine"] = machine.describe()
        print(json.dumps(line), flush=True)
        if args.out is not None:
            with args.out.open("a") as file:
                file.write(json.dumps(line) + "\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
