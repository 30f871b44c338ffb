"""`/docs` and `/redoc`: the routes as a page, made of the same description as `/openapi.json`. No script, and nothing of any other host."""

from __future__ import annotations

from collections.abc import Iterator
from html import escape
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

from lockstep.server.routes.web import HEADERS
from lockstep.version import __version__

METHODS = ("get", "post", "put", "patch", "delete")
OTHERS = "others"  # the heading of routes without a tag

router = APIRouter(include_in_schema=False)


@router.get("/docs")
@router.get("/redoc")
async def docs(request: Request) -> HTMLResponse:
    return HTMLResponse(page(request.app.openapi()), headers=HEADERS)


def page(schema: dict[str, Any]) -> str:
    """The HTML of an OpenAPI description."""
    sections: dict[str, list[str]] = {}
    for path, operations in schema.get("paths", {}).items():
        for method in METHODS:
            if method in operations:
                tag = next(iter(operations[method].get("tags", ())), OTHERS)
                sections.setdefault(tag, []).append(_route(method, path, operations[method]))
    routes = "\n".join(f"<h2>{escape(tag)}</h2>\n<dl>\n{''.join(rows)}</dl>" for tag, rows in sections.items())
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>lockstep: routes</title>
<link rel="icon" href="web/favicon.svg" type="image/svg+xml">
<link rel="stylesheet" href="web/docs.css">
</head>
<body>
<h1>lockstep {escape(__version__)}</h1>
<p>Every route with all its fields is described in <a href="openapi.json">openapi.json</a>.</p>
{routes}
</body>
</html>
"""


def _route(method: str, path: str, operation: dict[str, Any]) -> str:
    about = operation.get("description") or operation.get("summary", "")
    query = ", ".join(_parameter(one) for one in operation.get("parameters", ()))
    fields = "".join(f"<br><small>{words}: <code>{escape(value)}</code></small>" for words, value in _more(operation, query))
    return f"<dt><b>{method.upper()}</b> <code>{escape(path)}</code></dt>\n<dd>{escape(about)}{fields}</dd>\n"


def _parameter(one: dict[str, Any]) -> str:
    return str(one["name"]) if one.get("in") == "query" else f"{one['name']} ({one.get('in')})"


def _more(operation: dict[str, Any], query: str) -> Iterator[tuple[str, str]]:
    """(what it is, names) of a route's parameters and of its body."""
    if query:
        yield "parameters", query
    kinds = operation.get("requestBody", {}).get("content", {})
    name = kinds.get("application/json", {}).get("schema", {}).get("$ref", "").rpartition("/")[2]
    if name:
        yield "body", name
