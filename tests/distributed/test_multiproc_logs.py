"""What ranks say on the driver's standard error: their log lines from the configured level on, under their numbers."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest

from lockstep.config.tree import RuntimeConfig
from lockstep.executor.factory import make_executor
from lockstep.testing.executors import FAKE_WORKER, SPEC, fake_config, wait_for

LEVELS = ("debug", "info", "warning", "error")


def said_at(level: str, capsys: pytest.CaptureFixture[str]) -> list[str]:
    """The lines that two ranks get through, each logging once at every level and printing once."""
    runtime = RuntimeConfig(device="cpu", log_level=level)  # type: ignore[arg-type]
    executor = make_executor(dataclasses.replace(fake_config(2), runtime=runtime), SPEC, Path("."), worker_cls=FAKE_WORKER)
    found = ""

    def everything_arrived() -> bool:
        nonlocal found
        found += capsys.readouterr().err
        return found.count("the end") == 2  # an error is always shown, and a rank's lines come in order

    try:
        executor.collective_rpc("say", ("something printed",))
        for each in LEVELS:
            executor.collective_rpc("log", (each, f"this is {each}"))
        executor.collective_rpc("log", ("error", "the end"))
        assert wait_for(everything_arrived, 20), found
    finally:
        executor.shutdown()
    return [line for line in found.splitlines() if "the end" not in line]


@pytest.mark.parametrize("level", LEVELS)
def test_ranks_show_log_lines_from_the_level_on(level: str, capsys: pytest.CaptureFixture[str]) -> None:
    lines = said_at(level, capsys)
    for rank in (0, 1):
        mine = [line for line in lines if line.startswith(f"[rank {rank}] ")]
        shown = [each for each in LEVELS if any(f"this is {each}" in line for line in mine)]
        assert shown == list(LEVELS[LEVELS.index(level) :])
        assert any("something printed" in line for line in mine) == (level != "error"), "at error, errors and nothing else"
        assert all(line.split()[2] in ("DEBUG", "INFO", "WARNING", "ERROR") for line in mine if "this is" in line)
    assert len(lines) == 2 * (len(LEVELS) - LEVELS.index(level) + (level != "error"))
