"""What `lockstep top` draws: a head with the server's numbers, and a row for each rank."""

from __future__ import annotations

from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

SILENT_S = 5.0  # a rank without a sign of life for so long is shown in red
BAR = 12


def picture(found: dict[str, Any], problem: str = "") -> RenderableType:
    """All of it, from the JSON of `/v1/cluster`. problem: why these numbers are old, if they are."""
    parts: list[RenderableType] = [_head(found), _latencies(found["totals"]), Text()]
    parts.append(_ranks(found["replicas"]))
    slow = [f"rank {rank['rank']} of replica {one['replica']}" for one in found["replicas"] for rank in one["ranks"] if rank["slow"]]
    if slow:
        parts.append(Text(f"slow: {', '.join(slow)} (the others wait for it)", "bold red"))
    if problem:
        parts.append(Text(problem, "bold red"))
    return Group(*parts)


def _head(found: dict[str, Any]) -> Text:
    totals, shape = found["totals"], found["parallel"]
    text = Text()
    text.append(f"{found['model']}  ", "bold")
    text.append(f"DP {shape['dp']} x PP {shape['pp']} x TP {shape['tp']}   up {_duration(found['uptime_s'])}   ")
    text.append(f"{totals['running']} running  ", "green" if totals["running"] else "dim")
    text.append(f"{totals['waiting']} waiting  ", "yellow" if totals["waiting"] else "dim")
    text.append(f"{totals['requests']} done   ")
    text.append(f"{totals['tokens_per_s']:g} tokens/s", "bold")
    text.append(f" (prompts {totals['prompt_tokens_per_s']:g}/s)   ")
    text.append(f"restarts {totals['restarts']}", "red" if totals["restarts"] else "")
    return text


def _latencies(totals: dict[str, Any]) -> Text:
    text = Text()
    for name, key in (("TTFT", "ttft_ms"), ("ITL", "itl_ms")):
        ms = totals[key]
        values = " / ".join(f"{ms[p]:.1f}" for p in ("p50", "p90", "p99")) if ms else "-"
        text.append(f"{name} p50/p90/p99 {values} ms   ")
    text.append(f"KV cache {_bar(totals['kv_usage'])} {100 * totals['kv_usage']:.0f} %   ")
    text.append(f"prefix hits {100 * totals['prefix_hit_rate']:.0f} %")
    return text


def _ranks(replicas: list[dict[str, Any]]) -> Table:
    table = Table(box=None, pad_edge=False, header_style="bold", padding=(0, 2, 0, 0))
    for name in ("replica", "state", "DP", "PP", "TP", "rank"):
        table.add_column(name, justify="left" if name == "state" else "right")
    for name in ("step ms", "predicted", "wait ms", "stage wait", "bubble", "memory", "tokens/s", "KV", "beat", "restarts"):
        table.add_column(name, justify="right")
    table.add_column("doing")
    for one in replicas:
        own = (_number(one["predicted_step_ms"]), f"{one['tokens_per_s']:g}", f"{100 * one['kv_usage']:.0f} %", str(one["restarts"]))
        if not one["ranks"]:
            state = Text(one["state"], "green" if one["state"] == "ready" else "bold red")
            table.add_row(str(one["replica"]), state, str(one["replica"]), *[""] * 10, own[2], "", own[3], "")
        for i, rank in enumerate(one["ranks"]):
            _row(table, one, rank, own if i == 0 else ("", "", "", ""), first=i == 0)
    return table


def _row(table: Table, one: dict[str, Any], rank: dict[str, Any], own: tuple[str, str, str, str], first: bool) -> None:
    predicted, tokens, usage, restarts = own
    beat = rank["heartbeat_age_s"]
    silent = beat is not None and beat > SILENT_S
    table.add_row(
        str(one["replica"]) if first else "",
        Text(one["state"], "green") if first else "",
        str(rank["dp"]),
        str(rank["pp"]),
        str(rank["tp"]),
        str(rank["rank"]),
        _number(rank["step_ms"]),
        predicted,
        _number(rank["wait_ms"]),
        _number(rank["stage_wait_ms"]),
        f"{100 * rank['bubble']:.0f} %",
        _memory(rank["memory_bytes"]),
        tokens,
        usage,
        Text("-" if beat is None else f"{beat:.1f} s", "bold red" if silent else ""),
        restarts,
        Text(rank["phase"] + (" SLOW" if rank["slow"] else "")),
        style="bold red" if rank["slow"] else "",
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}"


def _memory(count: int) -> str:
    return f"{count / 2**30:.1f} GiB" if count >= 2**30 else f"{count / 2**20:.0f} MiB" if count else "-"


def _bar(share: float) -> str:
    filled = min(BAR, round(BAR * share))
    return "█" * filled + "░" * (BAR - filled)


def _duration(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours}:{rest // 60:02}:{rest % 60:02}"
