"""`lockstep top [URL]`: the ranks of a running server, live. Who is slow stands out.

Reads `/v1/cluster` and draws; loads neither torch nor the server. Exit codes: 0, 1 when the server cannot be read.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from typing import Any

from lockstep.cli.client import KEY_HELP, URL, Server, Unreadable, key_for
from lockstep.cli.errors import UsageError, show_error
from lockstep.cli.parser import Parser
from lockstep.cli.tls import add_tls_flags, client_context
from lockstep.utils import env


def run(argv: list[str]) -> int:
    """Draw until interrupted, or once with --once."""
    parser = Parser(prog="lockstep top", description=__doc__.partition("\n")[0])
    parser.add_argument("url", nargs="?", default=URL, metavar="URL", help=f"of the server (default {URL})")
    parser.add_argument("--api-key", metavar="KEY", help=KEY_HELP)
    add_tls_flags(parser)
    parser.add_argument("--interval", type=float, default=1.0, help="seconds between two looks (default 1)")
    parser.add_argument("--once", action="store_true", help="look once, print, and end")
    parser.add_argument("--json", action="store_true", help="print each look as a line of JSON instead of a table")
    parser.add_argument("--no-color", action="store_true", help="plain text (also: the variable NO_COLOR)")
    args = parser.parse_args(argv)
    if args.interval <= 0:
        raise UsageError(f"--interval={args.interval:g} must be more than 0: give seconds.")
    key = key_for(args.url, args.api_key)
    server = Server(args.url, key, client_context(args.ca_cert, args.insecure))
    try:
        if args.json or args.once:
            while True:
                _print(read(server), args)
                if args.once:
                    return 0
                time.sleep(args.interval)
        return _live(server, args)
    except Unreadable as e:
        show_error(str(e))
        return 1


def read(server: Server) -> dict[str, Any]:
    """The server's `/v1/cluster`. Raises Unreadable."""
    found = server.read("/v1/cluster")
    if not isinstance(found, dict) or "replicas" not in found or "totals" not in found:
        raise Unreadable(f"{server.base} answered JSON without replicas for /v1/cluster: is it a lockstep server?")
    return found


def _print(found: dict[str, Any], args: argparse.Namespace) -> None:
    if args.json:
        print(json.dumps(found), flush=True)
        return
    from rich.console import Console

    from lockstep.cli.top_table import picture

    width = None if sys.stdout.isatty() else 140
    Console(no_color=args.no_color or env.no_color(), width=width, highlight=False).print(picture(found))


def _live(server: Server, args: argparse.Namespace) -> int:
    """Redraw until Ctrl-C. A server that goes away for a while is waited for, and that is shown."""
    from rich.console import Console
    from rich.live import Live

    from lockstep.cli.top_table import picture

    found = read(server)
    console = Console(no_color=args.no_color or env.no_color(), highlight=False)
    problem = ""
    with Live(picture(found), console=console, auto_refresh=False, screen=console.is_terminal) as live:
        while True:
            live.update(picture(found, problem), refresh=True)
            time.sleep(args.interval)
            try:
                found, problem = read(server), ""
            except Unreadable as e:
                problem = str(e)
