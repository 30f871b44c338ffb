"""`lockstep run-batch -i IN.jsonl -o OUT.jsonl [MODEL]`: answer a file of requests, in the form of OpenAI's Batch API."""

from __future__ import annotations

from lockstep.cli.flags import parse
from lockstep.config.serve import BatchOptions
from lockstep.utils.interrupt import at_once


def run(argv: list[str]) -> int:
    """Parse, load, and answer every line; the exit code."""
    about = "Answer a file of requests, one a line, in the form of OpenAI's Batch API."
    with at_once():
        found = parse("run-batch", argv, BatchOptions, max_tokens=None, description=about, sampling=False)
        if found.options.headless:
            from lockstep.cli.session import serve_node
        else:
            from lockstep.server.run_batch import run_batch  # FastAPI is imported only now
    if found.options.headless:
        return serve_node(found.config, quiet=found.options.quiet)
    return run_batch(found.config, found.options)
