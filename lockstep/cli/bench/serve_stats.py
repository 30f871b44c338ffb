"""From the records of a load to its figures. Their names are those of the ecosystem's `bench serve`, times are milliseconds."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

from lockstep.cli.bench.serve_client import Record
from lockstep.cli.errors import UsageError

METRICS = {"ttft": "Time to first token", "tpot": "Time per output token", "itl": "Inter-token latency", "e2el": "End-to-end latency"}
PERCENTILES = (90, 99)


def ttft_s(record: Record) -> float:
    return record.times_s[0] - record.sent_s


def e2el_s(record: Record) -> float:
    return record.times_s[-1] - record.sent_s


def tpot_s(record: Record) -> float | None:
    """Mean time per token after the first; None for a single token."""
    return (record.times_s[-1] - record.times_s[0]) / (record.output_tokens - 1) if record.output_tokens > 1 else None


def samples(records: Sequence[Record]) -> dict[str, list[float]]:
    """Every sample of every metric, in milliseconds, of the requests that ended well."""
    found: dict[str, list[float]] = {name: [] for name in METRICS}
    for record in records:
        if record.error_kind:
            continue
        found["ttft"].append(1000 * ttft_s(record))
        found["e2el"].append(1000 * e2el_s(record))
        found["itl"] += [1000 * (b - a) for a, b in zip(record.times_s, record.times_s[1:], strict=False)]
        tpot = tpot_s(record)
        if tpot is not None:
            found["tpot"].append(1000 * tpot)
    return found


def percentile(values: Sequence[float], q: float) -> float:
    """The q-th percentile, 0 to 100, between neighbours linearly. values: sorted, not empty."""
    at = (len(values) - 1) * q / 100
    low = math.floor(at)
    high = min(low + 1, len(values) - 1)
    return values[low] + (values[high] - values[low]) * (at - low)


def figures(records: Sequence[Record], duration_s: float, sla: Mapping[str, float]) -> dict[str, Any]:
    """All figures of a run as one flat object. sla: of `parse_sla`; without one there is no goodput."""
    good = [record for record in records if not record.error_kind]
    tokens_in, tokens_out = sum(r.input_tokens for r in good), sum(r.output_tokens for r in good)
    found: dict[str, Any] = {
        "duration": round(duration_s, 3),
        "completed": len(good),
        "failed": len(records) - len(good),
        "errors": dict(Counter(record.error_kind for record in records if record.error_kind)),
        "total_input_tokens": tokens_in,
        "total_output_tokens": tokens_out,
        "request_throughput": round(len(good) / duration_s, 4),
        "output_throughput": round(tokens_out / duration_s, 3),
        "total_token_throughput": round((tokens_in + tokens_out) / duration_s, 3),
    }
    if sla:
        found["request_goodput"] = round(sum(meets(record, sla) for record in good) / duration_s, 4)
    for name, values in samples(records).items():
        found |= summary(name, sorted(values))
    return found


def summary(name: str, values: Sequence[float]) -> dict[str, float | None]:
    """mean, median and percentiles of a metric; None where there is no sample."""
    named = {"mean": sum(values) / len(values) if values else None, "median": percentile(values, 50) if values else None}
    named |= {f"p{q}": percentile(values, q) if values else None for q in PERCENTILES}
    return {f"{which}_{name}_ms": None if value is None else round(value, 3) for which, value in named.items()}


def parse_sla(pairs: Sequence[str]) -> dict[str, float]:
    """`ttft:200 tpot:50` as milliseconds by metric. Raises UsageError."""
    found = {}
    for pair in pairs:
        name, _, value = pair.partition(":")
        try:
            limit = float(value)
        except ValueError:
            limit = -1.0
        if name not in METRICS or name == "itl" or limit < 0:
            raise UsageError(f"--goodput={pair} is no limit: write ttft, tpot or e2el, and milliseconds, like ttft:200.")
        found[name] = limit
    return found


def meets(record: Record, sla: Mapping[str, float]) -> bool:
    """Whether a request that ended well kept every limit."""
    tpot = tpot_s(record)
    took = {"ttft": ttft_s(record), "tpot": 0.0 if tpot is None else tpot, "e2el": e2el_s(record)}
    return all(1000 * took[name] <= limit for name, limit in sla.items())


def table(found: Mapping[str, Any]) -> str:
    """The figures for people."""
    rows = [
        ("requests that ended well", f"{found['completed']}"),
        ("requests that failed", f"{found['failed']}" + "".join(f", {kind}: {n}" for kind, n in found["errors"].items())),
        ("duration", f"{found['duration']:.2f} s"),
        ("tokens in, out", f"{found['total_input_tokens']}, {found['total_output_tokens']}"),
        ("requests a second", f"{found['request_throughput']:.3f}"),
        ("output tokens a second", f"{found['output_throughput']:.1f}"),
        ("all tokens a second", f"{found['total_token_throughput']:.1f}"),
    ]
    if "request_goodput" in found:
        rows.append(("goodput, requests a second", f"{found['request_goodput']:.3f}"))
    lines = [f"{name:<28}{value}" for name, value in rows]
    lines += ["", f"{'milliseconds':<24}" + "".join(f"{head:>11}" for head in ("mean", "median", "p90", "p99"))]
    for name, words in METRICS.items():
        cells = [found[f"{which}_{name}_ms"] for which in ("mean", "median", "p90", "p99")]
        lines.append(f"{words:<24}" + "".join(f"{'-' if cell is None else f'{cell:.2f}':>11}" for cell in cells))
    return "\n".join(lines)
