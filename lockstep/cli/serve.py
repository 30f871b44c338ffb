"""`lockstep serve [MODEL]`: an OpenAI-compatible server."""

from __future__ import annotations

from lockstep.cli.flags import parse
from lockstep.config.serve import ServeOptions


def run(argv: list[str]) -> int:
    """Parse, then serve until told to stop; the exit code."""
    found = parse("serve", argv, ServeOptions, max_tokens=None, description="An OpenAI-compatible server.", sampling=False)
    if found.options.headless:
        from lockstep.cli.session import serve_node

        return serve_node(found.config, quiet=False)
    from lockstep.server.launch import serve  # FastAPI is imported only now

    return serve(found.config, found.options)
