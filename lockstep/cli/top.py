"""`lockstep top [URL]`: the ranks of a running server, live. Who is slow stands out.

Reads `/v1/cluster` and draws; loads neither torch nor the server. Exit codes: 0, 1 when the server cannot be read.
"""

from __future__ import annotations

import argparse
import json
import ssl
import sys
import time
from http.client import HTTPException
from typing import Any
from urllib.error import HTTPError
from urllib.parse import urlsplit
from urllib.request import HTTPSHandler, ProxyHandler, Request, build_opener

from lockstep.cli.errors import UsageError, show_error
from lockstep.cli.tls import certificate_problem, client_context
from lockstep.utils import env

URL = "http://127.0.0.1:8000"
MOST_BYTES = 16 << 20


class Unreadable(Exception):
    """The server did not give its numbers; the message says why, and what to do."""


def run(argv: list[str]) -> int:
    """Draw until interrupted, or once with --once."""
    parser = argparse.ArgumentParser(prog="lockstep top", description=__doc__.partition("\n")[0])
    parser.add_argument("url", nargs="?", default=URL, metavar="URL", help=f"of the server (default {URL})")
    parser.add_argument("--api-key", default="", help="the server's key, if it has one")
    parser.add_argument("--ca-cert", metavar="FILE", help="certificates (PEM) to trust for https, instead of the system's")
    parser.add_argument("--insecure", action="store_true", help="take any certificate")
    parser.add_argument("--interval", type=float, default=1.0, help="seconds between two looks (default 1)")
    parser.add_argument("--once", action="store_true", help="look once, print, and end")
    parser.add_argument("--json", action="store_true", help="print each look as a line of JSON instead of a table")
    parser.add_argument("--no-color", action="store_true", help="plain text (also: the variable NO_COLOR)")
    args = parser.parse_args(argv)
    if args.interval <= 0:
        raise UsageError(f"--interval={args.interval:g} must be more than 0: give seconds.")
    base, tls = address(args.url), client_context(args.ca_cert, args.insecure)
    try:
        if args.json or args.once:
            while True:
                _print(read(base, args.api_key, tls=tls), args)
                if args.once:
                    return 0
                time.sleep(args.interval)
        return _live(base, args, tls)
    except Unreadable as e:
        show_error(str(e))
        return 1


def address(url: str) -> str:
    """The server's address, without a path that belongs to its API. Raises UsageError for what is none."""
    url = url if "://" in url else f"http://{url}"
    parts = urlsplit(url)
    if parts.scheme not in ("http", "https") or not parts.netloc:
        raise UsageError(f"URL={url!r} is no address of a server: give one like {URL}.")
    return url.rstrip("/").removesuffix("/v1")


def read(base: str, api_key: str, timeout_s: float = 10.0, tls: ssl.SSLContext | None = None) -> dict[str, Any]:
    """The server's `/v1/cluster`. Raises Unreadable."""
    headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}
    opener = build_opener(ProxyHandler({}), HTTPSHandler(context=tls))
    try:
        with opener.open(Request(f"{base}/v1/cluster", headers=headers), timeout=timeout_s) as answer:
            found = json.loads(answer.read(MOST_BYTES))
    except HTTPError as e:
        if e.code in (401, 403):
            raise Unreadable(f"{base} wants a key (HTTP {e.code}): give it with --api-key.") from None
        raise Unreadable(f"{base} answered HTTP {e.code} for /v1/cluster: is it a lockstep server of this version?") from None
    except (OSError, HTTPException) as e:
        reason = getattr(e, "reason", None) or e
        if problem := certificate_problem(reason):
            raise Unreadable(f"{base}: {problem}") from None
        raise Unreadable(f"{base} cannot be reached ({reason}): is `lockstep serve` running there?") from None
    except ValueError:
        raise Unreadable(f"{base} answered something else than JSON for /v1/cluster: is it a lockstep server?") from None
    if not isinstance(found, dict) or "replicas" not in found or "totals" not in found:
        raise Unreadable(f"{base} answered JSON without replicas for /v1/cluster: is it a lockstep server?")
    return found


def _print(found: dict[str, Any], args: argparse.Namespace) -> None:
    if args.json:
        print(json.dumps(found), flush=True)
        return
    from rich.console import Console

    from lockstep.cli.top_table import picture

    width = None if sys.stdout.isatty() else 140
    Console(no_color=args.no_color or env.no_color(), width=width, highlight=False).print(picture(found))


def _live(base: str, args: argparse.Namespace, tls: ssl.SSLContext) -> int:
    """Redraw until Ctrl-C. A server that goes away for a while is waited for, and that is shown."""
    from rich.console import Console
    from rich.live import Live

    from lockstep.cli.top_table import picture

    found = read(base, args.api_key, tls=tls)
    console = Console(no_color=args.no_color or env.no_color(), highlight=False)
    problem = ""
    with Live(picture(found), console=console, auto_refresh=False, screen=console.is_terminal) as live:
        while True:
            live.update(picture(found, problem), refresh=True)
            time.sleep(args.interval)
            try:
                found, problem = read(base, args.api_key, tls=tls), ""
            except Unreadable as e:
                problem = str(e)
