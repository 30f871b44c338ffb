"""What an incident file says of a failure."""

from __future__ import annotations

from typing import Any

import msgspec

from lockstep.executor.contract import ExecutorError
from lockstep.utils import procs, stacks


def facts(error: ExecutorError) -> dict[str, Any]:
    """What an incident file says of an error."""
    killed = error.exitcode is not None and error.exitcode < 0
    return {
        "message": str(error).partition("\n")[0],
        "culprit_rank": error.rank,
        "phase": error.phase,
        "kind": error.kind,
        "signal": procs.exit_cause(error.exitcode).rpartition(" ")[2] if killed else "SIGSTOP" if error.kind == "stopped" else None,
        "exit_cause": procs.exit_cause(error.exitcode) if error.exitcode is not None else None,
        "oom_kill": error.out_of_memory,
        "error_type": error.error_type,
        "stacks": stacks.in_lines(error.log_tail, error.rank),
        "log_tail": error.log_tail,
        "ranks": [msgspec.to_builtins(rank) for rank in error.ranks],
    }
