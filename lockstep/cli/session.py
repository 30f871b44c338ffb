"""What the verbs that run a model share: starting it with a word of what is going on, and its memory as a table."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from lockstep.config import launcher
from lockstep.config.build import GROUPS
from lockstep.config.errors import ConfigError
from lockstep.config.source import DEMO_NAME
from lockstep.config.tree import EngineConfig
from lockstep.config.validate import check, resolve
from lockstep.observability import logging
from lockstep.utils.interrupt import at_once
from lockstep.utils.sizes import size

if TYPE_CHECKING:
    from lockstep.executor.contract import RankMemory
    from lockstep.llm import LLM


HEADLESS = "Take no requests: run this host's ranks (--node-rank 1 and up) or replicas (-dpr) for the leader on another host."


def serve_node(config: EngineConfig, *, quiet: bool) -> int:
    """Run the ranks or the replicas of this host for a leader on another, until it ends; the exit code."""
    logging.configure(config.runtime.log_level)
    config, spec, folder = resolve(config, headless=True)
    parallel = config.parallel
    if parallel.nodes_per_replica == 1:
        with at_once():
            from lockstep.cluster.keeper import keep_replicas

        first, last = parallel.data_parallel_start_rank or 0, (parallel.data_parallel_start_rank or 0) + parallel.local_replicas - 1
        at = f"{parallel.data_parallel_address}:{parallel.data_parallel_rpc_port}"
        which = f"replica {first}" if first == last else f"replicas {first} to {last}"
        note(f"keeping {which} of {parallel.data_parallel_size} for the leader at {at} ...", quiet)
        code = keep_replicas(config, spec, folder)
        note(f"{which}: the leader has ended", quiet)
        return code
    note(
        f"node {parallel.node_rank} of {parallel.nnodes}: looking for the leader at {parallel.master_addr}:{parallel.report_port} ...",
        quiet,
    )
    with at_once():
        from lockstep.executor import factory

    factory.serve_node(config, spec, folder)
    note(f"node {parallel.node_rank} of {parallel.nnodes}: the leader has ended", quiet)
    return 0


@contextmanager
def running(config: EngineConfig, *, quiet: bool, table: bool = True) -> Iterator[tuple[LLM, float]]:
    """The model, loaded, and the seconds that took; stopped afterwards. Notes go to standard error unless `quiet`."""
    logging.configure(config.runtime.log_level)
    check(config)  # before a word is said: an impossible setting is answered by its error alone
    parallel = config.parallel
    quiet = hushed(config, quiet)
    name, hosts = config.model.model or DEMO_NAME, parallel.nnodes
    ranks = parallel.world_size * (parallel.data_parallel_size if parallel.data_parallel_rank is None else 1)
    note(f"loading {name} on {ranks} rank{'s' if ranks > 1 else ''}{f' of {hosts} hosts' if hosts > 1 else ''} ...", quiet)
    start_s = time.monotonic()
    with at_once():
        from lockstep.llm import LLM

    with LLM(**settings(config)) as llm:
        ready_s = time.monotonic() - start_s
        note(f"ready in {ready_s:.1f} s ({llm.config.runtime.device}, {llm.config.model.dtype})", quiet)
        if table:
            note(memory_table(llm.memory()), quiet)
        yield llm, ready_s


def hushed(config: EngineConfig, quiet: bool) -> bool:
    """Whether to say nothing here. Of a launcher's processes, which all compute the same, only the first one's results are shown.

    Raises ConfigError for replicas: who gives each its requests is a program, not a command.
    """
    parallel = config.parallel
    if not launcher.is_external(parallel):
        return quiet
    if parallel.data_parallel_size > 1:
        raise ConfigError(
            f"data_parallel_size={parallel.data_parallel_size} with distributed_executor_backend='external_launcher': every replica would "
            "answer all requests of this command; use LLM in a program of your own, like examples/torchrun_dp.py."
        )
    if launcher.place(parallel).rank == 0:
        return quiet
    sys.stdout = open(os.devnull, "w", encoding="utf-8")  # noqa: SIM115 - until the process ends
    return True


def settings(config: EngineConfig) -> dict[str, Any]:
    """The tree as `LLM` keywords."""
    return {f.name: getattr(getattr(config, group), f.name) for group, cls in GROUPS.items() for f in fields(cls)}


def note(text: str, quiet: bool = False) -> None:
    """A line for the person, on standard error: standard output is for results only."""
    if not quiet:
        print(text, file=sys.stderr, flush=True)


def memory_table(ranks: list[RankMemory], exact: bool = False) -> str:
    """What each rank holds, one row per rank; `exact`: to the byte, but for the peak, which differs each time."""
    replicas = any(r.replica for r in ranks)
    head = ("rank", "weight bytes", "KV cache bytes", "peak memory") if exact else ("rank", "weights", "KV cache", "peak")
    show = "{:,}".format if exact else size
    rows = [("replica", *head) if replicas else head]
    for r in ranks:
        row = (str(r.rank), show(r.weight_bytes), show(r.kv_bytes), size(r.peak_bytes))
        rows.append((str(r.replica), *row) if replicas else row)
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return "\n".join("  " + "  ".join(cell.rjust(w) for cell, w in zip(row, widths, strict=True)) for row in rows)
