"""`--profile FOLDER`: where the time of a benchmark's workload goes, as a picture and as a table."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from lockstep.cli.bench.result import Reporter
from lockstep.cli.errors import UsageError
from lockstep.llm import LLM
from lockstep.observability.pipeline_chart import Schedule

PROFILE_HELP = "Run the workload once more, recorded, and write a Chrome trace of engine and ranks into this folder."


def check_folder(folder: str | None) -> None:
    """Make the folder of --profile. Raises UsageError when that cannot be: now, not after the measurements."""
    if folder is not None:
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise UsageError(f"--profile={folder} cannot be a folder: {error}.") from None


def record(llm: LLM, folder: str | None, report: Reporter, run: Callable[[], object]) -> None:
    """Call `run` and write and sum up where its time went; nothing without a folder.

    Recording costs a little, so this run is none of those that are counted.
    """
    if folder is None:
        return
    llm.start_profile()
    run()
    profile = llm.stop_profile()
    path = profile.write(folder, {"command": report.command, **report.base})
    parallel = llm.config.parallel
    if parallel.pipeline_parallel_size > 1:
        prefix = "replica 0 " if parallel.data_parallel_size > 1 else ""
        schedule = Schedule.of(profile, parallel.pipeline_parallel_size, parallel.stage_size, prefix)
        report.note(f"\n{schedule.summary(in_flight=parallel.pipeline_parallel_size)}")
    report.note(f"\n{profile.summary()}\n\ntrace: {path} (ui.perfetto.dev or chrome://tracing open it)")
