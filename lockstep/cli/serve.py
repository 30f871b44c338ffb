"""`lockstep serve [MODEL]`: an OpenAI-compatible server."""

from __future__ import annotations

import os
import sys

from lockstep.cli.flags import parse
from lockstep.config.endpoint import check_headless
from lockstep.config.serve import ServeOptions
from lockstep.utils.interrupt import at_once


def run(argv: list[str]) -> int:
    """Parse, then serve until told to stop; the exit code."""
    with at_once():
        found = parse("serve", argv, ServeOptions, max_tokens=None, description="An OpenAI-compatible server.", sampling=False)
        if found.options.headless:
            from lockstep.cli.session import serve_node
        else:
            from lockstep.server.launch import serve  # FastAPI is imported only now
    if found.options.headless:
        check_headless(found.options)
        return serve_node(found.config, quiet=False)
    code = serve(found.config, found.options)
    if code > 128:  # told twice: taking an interpreter down in good order takes seconds
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    return code
