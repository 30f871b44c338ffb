"""The playground: a page at `/` and the files it is made of. They are for everybody; the calls that the page makes need the key.

The page is all there is: no other host is asked for anything, no script stands in the HTML, and text never becomes HTML. The
policy below has browsers enforce that, whatever a model writes.
"""

from __future__ import annotations

import hashlib
from functools import cache
from pathlib import Path
from typing import NamedTuple

from fastapi import APIRouter, Request, Response
from starlette.exceptions import HTTPException

FOLDER = Path(__file__).parents[1] / "web"
TYPES = {
    ".html": "text/html; charset=utf-8",
    ".css": "text/css; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; base-uri 'none'; "
    "form-action 'none'; frame-ancestors 'none'; require-trusted-types-for 'script'; trusted-types 'none'"
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cache-Control": "no-cache",  # kept, but asked for again: a newer server has a newer page
}
METHODS = ["GET", "HEAD"]

router = APIRouter(include_in_schema=False)


class Asset(NamedTuple):
    """One file, as it is sent."""

    content: bytes
    media_type: str
    etag: str


@cache
def assets() -> dict[str, Asset]:
    """The files by name. A name that is not here is not served, whatever it spells."""
    found = {}
    for path in sorted(FOLDER.iterdir()):
        if path.suffix in TYPES:
            content = path.read_bytes()
            found[path.name] = Asset(content, TYPES[path.suffix], f'"{hashlib.sha256(content).hexdigest()[:20]}"')
    return found


def is_shell(path: str) -> bool:
    """Whether a path of this server (without its root path) is the page or a part of it, which needs no key."""
    return path in ("/", "/favicon.ico") or path.startswith("/web/")


@router.api_route("/", methods=METHODS)
async def page(request: Request) -> Response:
    return _send(request, "index.html")


@router.api_route("/favicon.ico", methods=METHODS)
async def icon(request: Request) -> Response:
    return _send(request, "favicon.svg")


@router.api_route("/web/{name}", methods=METHODS)
async def part(request: Request, name: str) -> Response:
    return _send(request, name)


def _send(request: Request, name: str) -> Response:
    asset = assets().get(name)
    if asset is None:
        raise HTTPException(404, f"the page has no file {name!r}.")
    headers = {**HEADERS, "ETag": asset.etag}
    if asset.etag in request.headers.get("If-None-Match", ""):
        return Response(status_code=304, headers=headers)
    return Response(asset.content, headers=headers, media_type=asset.media_type)
