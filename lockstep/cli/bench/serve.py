"""`lockstep bench serve`: load on any OpenAI-compatible server, and what its users would feel.

    lockstep bench serve --base-url http://127.0.0.1:8000 --num-prompts 200 --request-rate 10
    lockstep bench serve --num-prompts 200 --max-concurrency 16 --ignore-eos --goodput ttft:200 tpot:50 --plot load.svg

With --request-rate requests arrive by themselves, as users do; with --max-concurrency so many are under way, and the next
starts when one ends. Flags that mean what they mean in the ecosystem's `bench serve` have their names there.
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import json
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from lockstep.cli.bench.serve_client import Client, LoadError, Record
from lockstep.cli.bench.serve_load import Ask, arrivals, random_load, read_load
from lockstep.cli.bench.serve_plot import plot
from lockstep.cli.bench.serve_stats import figures, parse_sla, percentile, table
from lockstep.cli.client import KEY_HELP, key_for
from lockstep.cli.errors import UsageError
from lockstep.cli.tls import client_context
from lockstep.config.tree import opt

PATHS = {"completions": "/v1/completions", "chat": "/v1/chat/completions"}
TICK_S = 0.02  # how often the client looks whether it is late itself
BUSY = 0.9  # of a core: above, the client may be what was measured


@dataclass(frozen=True)
class ServeArgs:
    """What to send, and where."""

    base_url: str = opt("http://127.0.0.1:8000", "Address of the server, without /v1.")
    model: str | None = opt(None, "Name of the model in requests; default: the server's first.")
    api_key: str | None = opt(None, KEY_HELP)
    ca_cert: str | None = opt(None, "File of certificates (PEM) to trust for https, instead of the system's.")
    insecure: bool = opt(False, "Take any certificate.")
    endpoint: str = opt("completions", "completions or chat (also as paths: /v1/completions, /v1/chat/completions).")
    num_prompts: int = opt(1000, "Requests that count.")
    num_warmups: int = opt(0, "Requests before them that do not.")
    request_rate: float = opt(math.inf, "Requests a second; inf sends all at once, or as --max-concurrency lets them.")
    burstiness: float = opt(1.0, "1: arrivals are Poisson; below: in bursts; above: more even.")
    max_concurrency: int | None = opt(None, "Most requests under way at once.")
    random_input_len: int = opt(1024, "Tokens of a random prompt.")
    random_output_len: int = opt(128, "Most tokens of an output.")
    random_range_ratio: float = opt(0.0, "Lengths vary by this share to both sides, uniformly: from 0 to below 1.")
    num_prefixes: int = opt(0, "Shared beginnings among the random prompts; 0: none is shared.")
    prefix_len: int = opt(0, "Tokens of a shared beginning, before those of --random-input-len.")
    vocab_size: int = opt(4096, "Random prompts are made of token ids below this, which the model must have.")
    dataset_path: str | None = opt(None, "File of JSON lines with `prompt` (or `messages`) and maybe `output_tokens`, instead of random.")
    ignore_eos: bool = opt(False, "Ask for outputs of full length (a field of lockstep and vLLM).")
    temperature: float = opt(0.0, "Temperature of every request.")
    extra_body: str = opt("{}", "More fields for every request, as a JSON object.")
    request_timeout: float = opt(600.0, "Seconds that one request may take.")
    seed: int = opt(0, "Seed of prompts, lengths and arrivals.")
    goodput: list[str] = field(default_factory=list, metadata={"help": "Limits in ms that a good request keeps, like ttft:200 tpot:50."})
    json: bool = opt(False, "Print the figures as one JSON line on standard output.")
    save_result: str | None = opt(None, "File for the figures and the times of every request, as JSON.")
    plot: str | None = opt(None, "File for a picture of the run, as SVG.")

    def check(self) -> None:
        """Raises UsageError for what cannot be."""
        self._counts()
        rules = [
            ("request_rate", self.request_rate > 0, "above 0, or inf"),
            ("burstiness", 0 < self.burstiness < math.inf, "above 0"),
            ("random_range_ratio", 0 <= self.random_range_ratio < 1, "from 0 to below 1"),
            ("request_timeout", self.request_timeout > 0, "above 0"),
            ("prefix_len", (self.prefix_len > 0) == (self.num_prefixes > 0), "above 0 with --num-prefixes, and only then"),
            ("endpoint", self.kind in PATHS, " or ".join(PATHS)),
        ]
        for name, holds, rule in rules:
            if not holds:
                raise UsageError(f"--{name.replace('_', '-')}={getattr(self, name)} is invalid: it must be {rule}.")
        self.fields()
        parse_sla(self.goodput)

    def _counts(self) -> None:
        least = {"num_prompts": 1, "random_input_len": 1, "random_output_len": 1, "max_concurrency": 1, "vocab_size": 2}
        for name, low in {**least, "num_warmups": 0, "num_prefixes": 0, "prefix_len": 0}.items():
            value = getattr(self, name)
            if value is not None and value < low:
                raise UsageError(f"--{name.replace('_', '-')}={value} is invalid: it must be at least {low}.")

    @property
    def kind(self) -> str:
        """completions or chat."""
        return next((name for name, path in PATHS.items() if self.endpoint == path), self.endpoint)

    def fields(self) -> dict[str, Any]:
        """The fields that all requests share. Raises UsageError when --extra-body is no JSON object."""
        try:
            extra = json.loads(self.extra_body)
        except ValueError:
            extra = None
        if not isinstance(extra, dict):
            raise UsageError(f'--extra-body={self.extra_body} is no JSON object: write one, like {{"top_k": 20}}.')
        shared: dict[str, Any] = {"temperature": self.temperature, "stream": True, "stream_options": {"include_usage": True}}
        return shared | ({"ignore_eos": True} if self.ignore_eos else {}) | extra

    def load(self) -> list[Ask]:
        """Warm-ups first, then what counts."""
        chat, count = self.kind == "chat", self.num_warmups + self.num_prompts
        if self.dataset_path is not None:
            return read_load(Path(self.dataset_path), count, self.random_output_len, chat)
        mean = (self.random_input_len, self.random_output_len, self.random_range_ratio)
        return random_load(count, *mean, self.num_prefixes, self.prefix_len, self.vocab_size, chat, self.seed)


@dataclass
class Outcome:
    """What a run brought. lag_ms: by how much the client itself was late, every 20 ms; cpu: cores that it used."""

    records: list[Record]
    duration_s: float
    model: str
    lag_ms: list[float]
    cpu: float


async def drive(args: ServeArgs) -> Outcome:
    """Send the load. Raises LoadError when the server cannot be asked for its model, or refuses every warm-up."""
    key = key_for(args.base_url, args.api_key or None)
    tls = client_context(args.ca_cert, args.insecure)
    client = Client(args.base_url, {"Authorization": f"Bearer {key}"} if key else {}, args.request_timeout, tls)
    try:
        model = args.model or await _first_model(client)
        shared = {"model": model, **args.fields()}
        bodies = [{**shared, **ask.body(args.kind == "chat")} for ask in args.load()]
        warm = [Record() for _ in range(args.num_warmups)]
        for record, body in zip(warm, bodies, strict=False):
            await client.stream(PATHS[args.kind], body, record)
        if warm and all(record.error_kind for record in warm):
            raise LoadError(warm[0].error_kind, f"no warm-up came through: {warm[0].error}")
        due = arrivals(args.num_prompts, args.request_rate, args.burstiness, args.seed)
        return await _measure(client, args, model, bodies[args.num_warmups :], due)
    finally:
        client.close()


async def _first_model(client: Client) -> str:
    try:
        return str((await client.get("/v1/models"))["data"][0]["id"])
    except (KeyError, IndexError, TypeError):
        raise LoadError("protocol", "the server's /v1/models names no model: give --model.") from None


async def _measure(client: Client, args: ServeArgs, model: str, bodies: Sequence[dict[str, Any]], due: Sequence[float]) -> Outcome:
    """Send everything when it is due; the collector is off meanwhile, because its pauses would be taken for the server's."""
    records = [Record() for _ in bodies]
    gate = asyncio.Semaphore(args.max_concurrency or len(bodies))
    lag_ms: list[float] = []
    watch = asyncio.create_task(_watch(lag_ms))

    async def one(record: Record, body: dict[str, Any]) -> None:
        try:
            await client.stream(PATHS[args.kind], body, record)
        finally:
            gate.release()

    gc.collect()
    gc.disable()
    start, cpu = time.perf_counter(), time.process_time()
    try:
        async with asyncio.TaskGroup() as group:
            for record, body, at in zip(records, bodies, due, strict=True):
                record.due_s = start + at
                while (wait_s := record.due_s - time.perf_counter()) > 0:  # uvloop's timers are of a millisecond, and may be early
                    await asyncio.sleep(wait_s)
                await gate.acquire()
                group.create_task(one(record, body))
    finally:
        gc.enable()
        watch.cancel()
    took_s = max(record.ended_s for record in records) - start
    return Outcome(records, took_s, model, lag_ms, (time.process_time() - cpu) / took_s)


async def _watch(lag_ms: list[float]) -> None:
    while True:
        before = time.perf_counter()
        await asyncio.sleep(TICK_S)
        lag_ms.append(1000 * max(0.0, time.perf_counter() - before - TICK_S))


def report(args: ServeArgs, outcome: Outcome) -> dict[str, Any]:
    """All figures, with what they were measured with."""
    found = figures(outcome.records, outcome.duration_s, parse_sla(args.goodput))
    setting = {name: value for name, value in dataclasses.asdict(args).items() if name not in ("api_key", "json", "save_result", "plot")}
    setting |= {"model": outcome.model, "request_rate": "inf" if math.isinf(args.request_rate) else args.request_rate}
    lag = percentile(sorted(outcome.lag_ms), 99) if outcome.lag_ms else 0.0
    return {**setting, **found, "client_lag_p99_ms": round(lag, 3), "client_cores": round(outcome.cpu, 3)}


def run(argv: list[str]) -> int:
    """Parse the flags, send the load, tell. Exit code 0; 1 when the server could not be measured: not one request ended well."""
    import tyro

    from lockstep.cli.errors import show_error
    from lockstep.cli.flags import options_form

    form = options_form(ServeArgs)
    found: Any = tyro.cli(form, prog="lockstep bench serve", args=repeated(argv), description=__doc__)
    args = ServeArgs(**{f.name: getattr(found, f.name) for f in dataclasses.fields(ServeArgs)})
    args.check()
    try:
        outcome = run_loop(args)
    except LoadError as e:
        show_error(str(e))
        return 1
    except ValueError as e:
        raise UsageError(str(e)) from None
    result = report(args, outcome)
    print(json.dumps(result) if args.json else table(result), flush=True)
    _notes(result, outcome.records)
    _files(args, result, outcome.records)
    return 0 if result["completed"] else 1


def run_loop(args: ServeArgs) -> Outcome:
    """`drive` on uvloop, where there is one."""
    try:
        import uvloop
    except ImportError:  # Windows
        return asyncio.run(drive(args))
    return uvloop.run(drive(args))


def repeated(argv: Sequence[str]) -> list[str]:
    """`--goodput ttft:200 tpot:50` as the flag given twice."""
    words: list[str] = []
    inside = False
    for word in argv:
        if inside and ":" in word and not word.startswith("-") and words[-1] != "--goodput":
            words.append("--goodput")
        inside = word == "--goodput" or (inside and not word.startswith("-"))
        words.append(word)
    return words


def _notes(result: dict[str, Any], records: Sequence[Record]) -> None:
    """What a reader of the figures should know, on standard error."""
    if result["client_cores"] > BUSY:
        print(f"note: this client used {result['client_cores']:.2f} cores: it may be what was measured.", file=sys.stderr)
    first = next((record for record in records if record.error_kind), None)
    if first is not None:
        print(f"note: the first failure ({first.error_kind}): {first.error}", file=sys.stderr)


def _files(args: ServeArgs, result: dict[str, Any], records: Sequence[Record]) -> None:
    """Write --save-result and --plot. Raises UsageError where a file cannot be written."""
    start = min(record.sent_s for record in records)
    rows = [
        {
            **{"sent_s": round(r.sent_s - start, 6), "ended_s": round(r.ended_s - start, 6), "error": r.error_kind},
            **{"input_tokens": r.input_tokens, "output_tokens": r.output_tokens},
            "times_s": [round(at - start, 6) for at in r.times_s],
        }
        for r in records
    ]
    title = f"{result['model']} at {args.base_url}: {result['completed']} requests, {result['output_throughput']:.0f} tokens/s"
    try:
        if args.save_result is not None:
            Path(args.save_result).write_text(json.dumps({**result, "requests": rows}) + "\n")
        if args.plot is not None:
            Path(args.plot).write_text(plot(records, title))
    except OSError as e:
        raise UsageError(f"{e.filename} cannot be written: {e.strerror}.") from None
