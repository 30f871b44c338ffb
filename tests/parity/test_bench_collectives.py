"""`lockstep bench collectives`: a JSON line per result with the promised keys, of every communicator; notes elsewhere."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from lockstep.kernels.library import library

KEYS = {"op", "bytes", "dtype", "communicator", "world_size", "median_us", "p99_us", "busbw_GBps"}


def bench(*argv: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "lockstep", "bench", "collectives", "--budget-seconds", "1", *argv]
    return subprocess.run(command, capture_output=True, text=True, timeout=170, check=False, env={**os.environ, **environment})


@pytest.mark.skipif(library() is None, reason="needs the kernels")
@pytest.mark.parametrize("chosen", ["", "gloo", "hierarchical"])
def test_lines_have_the_promised_keys_and_name_the_communicator_that_was_timed(chosen: str) -> None:
    done = bench("--world-size", "3", "--sizes", "256,8192", "--json", LOCKSTEP_COMMUNICATOR=chosen)
    assert done.returncode == 0, done.stderr
    lines = [json.loads(line) for line in done.stdout.splitlines()]
    assert all(line.keys() >= KEYS and line["world_size"] == 3 and 0 < line["median_us"] <= line["p99_us"] for line in lines)
    found = {(line["op"], line["bytes"], line["dtype"], line["communicator"]) for line in lines}
    wanted = {
        (op, size, dtype, communicator)
        for op in ("all_reduce", "all_gather", "reduce_scatter", "gather", "broadcast", "all_to_all", "send_recv")
        for size in (256, 8192)
        for dtype in ("bfloat16", "float32")
        for communicator in ("shm", "hierarchical", "gloo")
    }
    assert found == wanted | {("barrier", 0, "bfloat16", communicator) for communicator in ("shm", "hierarchical", "gloo")}


def test_what_cannot_be_had_is_left_out_and_said_beside_the_results() -> None:
    done = bench("--ops", "all_reduce", "--sizes", "256", "--json", LOCKSTEP_KERNELS="torch")
    assert done.returncode == 0, done.stderr
    assert {json.loads(line)["communicator"] for line in done.stdout.splitlines()} == {"gloo"}
    assert "shm is left out: " in done.stderr and "no kernel library" in done.stderr


def test_the_table_has_a_row_for_each_result() -> None:
    done = bench("--ops", "broadcast", "--sizes", "256,4096", "--dtypes", "float32")
    assert done.returncode == 0, done.stderr
    assert "broadcast float32, 2 ranks" in done.stdout and len([line for line in done.stdout.splitlines() if " gloo " in line]) == 2


@pytest.mark.parametrize(
    ("flag", "value"),
    [("--world-size", "1"), ("--sizes", "0"), ("--ops", "allreduce"), ("--communicators", "nccl"), ("--budget-seconds", "0")],
)
def test_wrong_values_are_refused_by_name(flag: str, value: str) -> None:
    done = bench(flag, value)
    assert done.returncode == 2 and f"{flag}={value}" in done.stderr and "Traceback" not in done.stderr
