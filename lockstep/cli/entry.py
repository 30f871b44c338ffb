"""Where the `lockstep` command begins: Ctrl-C is seen to before anything else is imported."""

from __future__ import annotations

from lockstep.utils.ctrl_c import end_at_once


def main() -> int:
    """Run the command line; the exit code."""
    end_at_once()
    from lockstep.cli.main import main as run

    return run()
