"""`lockstep complete [--url URL] [-q PROMPT]`: complete prompts by a running server, in the terminal or one per line through a pipe.

Loads neither torch nor the model. Exit codes: 0, 1 when a prompt was not completed, 2 for an input that is no UTF-8, 130 when Ctrl-C
ended an answer that no person had asked for at a prompt.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from lockstep.cli.client import KEY_HELP, URL, Server, Unreadable, key_for
from lockstep.cli.dialogue import is_person, read_lines, text_of, write_pieces
from lockstep.cli.errors import UsageError, show_error
from lockstep.cli.parser import Parser
from lockstep.cli.session import note
from lockstep.cli.tls import add_tls_flags, client_context

STOPPED = 130  # by Ctrl-C
HINT = "Each line is completed as it is. Ctrl-C stops an answer, Ctrl-D ends."


def run(argv: list[str]) -> int:
    """Complete the prompt of -q, or lines until the input ends."""
    parser = Parser(prog="lockstep complete", description="Complete prompts by a running server.")
    parser.add_argument("--url", default=URL, help=f"of the server (default {URL})")
    parser.add_argument("--model-name", metavar="NAME", help="of the model (default: the server's first)")
    parser.add_argument("--api-key", metavar="KEY", help=KEY_HELP)
    add_tls_flags(parser)
    parser.add_argument("--max-tokens", type=int, metavar="N", help="most tokens of a completion (default: the server's, 16 of lockstep)")
    parser.add_argument("-q", "--quick", metavar="PROMPT", help="complete this, and end")
    args = parser.parse_args(argv)
    if args.max_tokens is not None and args.max_tokens < 1:
        raise UsageError(f"--max-tokens={args.max_tokens} is impossible: it must be at least 1.")
    key = key_for(args.url, args.api_key)
    server = Server(args.url, key, client_context(args.ca_cert, args.insecure))
    try:
        body = {"model": args.model_name or _first_model(server)} | ({} if args.max_tokens is None else {"max_tokens": args.max_tokens})
    except Unreadable as e:
        show_error(str(e))
        return 1
    person = args.quick is None and is_person()
    if person:
        note(HINT)
    prompts = read_lines() if args.quick is None else iter([text_of(args.quick, "the prompt of --quick")])
    code = 0
    for prompt in prompts:
        if prompt.strip() or args.quick is not None:
            outcome = complete(server, {**body, "prompt": prompt})
            if outcome == STOPPED and not person:
                return STOPPED
            code = 1 if outcome == 1 else code
    return code


def complete(server: Server, body: dict[str, Any]) -> int:
    """Stream one completion to standard output: 0; 1, with a line that says why, where it does not come to its end; STOPPED."""
    try:
        return STOPPED if write_pieces(_texts(server, body)).stopped else 0
    except Unreadable as e:
        show_error(str(e))
        return 1


def _texts(server: Server, body: dict[str, Any]) -> Iterator[str]:
    for event in server.stream("/v1/completions", body):
        for choice in event.get("choices", ()):
            yield choice.get("text") or ""


def _first_model(server: Server) -> str:
    found = server.read("/v1/models")
    try:
        return str(found["data"][0]["id"])
    except (KeyError, IndexError, TypeError):
        raise Unreadable(f"{server.base} names no model in /v1/models: give --model-name.") from None
