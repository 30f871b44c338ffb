"""`/docs` and `/redoc`: the routes as a page, made of the same description as `/openapi.json`. No script, and nothing of any other host."""

from __future__ import annotations

import json
from collections.abc import Iterator
from html import escape
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

from lockstep.server.routes.web import HEADERS
from lockstep.version import __version__

METHODS = ("get", "post", "put", "patch", "delete")
LIMITS = {
    **{"minimum": "from", "exclusiveMinimum": "above", "maximum": "to", "exclusiveMaximum": "below"},
    **{"minItems": "at least", "maxItems": "at most", "minLength": "at least", "maxLength": "at most", "maxProperties": "at most"},
    "pattern": "like",
}
INT64 = (float(1 << 63), -float(1 << 63))  # the bounds of all whole numbers: not told each time
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
    components = schema.get("components", {}).get("schemas", {})
    types = "\n".join(_type(name, components[name]) for name in sorted(_named(schema, components)))
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
<p>The same for programs: <a href="openapi.json">openapi.json</a>.</p>
{routes}
<h2>Types</h2>
{types}
</body>
</html>
"""


def _route(method: str, path: str, operation: dict[str, Any]) -> str:
    about = operation.get("description") or operation.get("summary", "")
    query = ", ".join(_parameter(one) for one in operation.get("parameters", ()))
    fields = f"<br><small>parameters: <code>{escape(query)}</code></small>" if query else ""
    kinds = operation.get("requestBody", {}).get("content", {})
    if body := kinds.get("application/json", {}).get("schema"):
        fields += f"<br><small>body: {_kind(body)}</small>"
    return f"<dt><b>{method.upper()}</b> <code>{escape(path)}</code></dt>\n<dd>{escape(about)}{fields}</dd>\n"


def _parameter(one: dict[str, Any]) -> str:
    return str(one["name"]) if one.get("in") == "query" else f"{one['name']} ({one.get('in')})"


def _named(schema: dict[str, Any], components: dict[str, Any]) -> set[str]:
    """The types that bodies of requests are made of."""
    found, paths = set[str](), schema.get("paths", {}).values()
    bodies: list[Any] = [path[method].get("requestBody", {}) for path in paths for method in METHODS if method in path]
    while bodies:
        for name in _references(bodies.pop()):
            if name in components and name not in found:
                found.add(name)
                bodies.append(components[name])
    return found


def _references(value: Any) -> Iterator[str]:
    """The names of all types that a piece of a description names."""
    if isinstance(value, dict):
        if isinstance(value.get("$ref"), str):
            yield value["$ref"].rpartition("/")[2]
        value = list(value.values())
    if isinstance(value, list):
        for one in value:
            yield from _references(one)


def _type(name: str, schema: dict[str, Any]) -> str:
    """A type's fields as a table."""
    needed, rows = set(schema.get("required", ())), []
    for field, about in schema.get("properties", {}).items():
        default = "needed" if field in needed else f"<code>{escape(json.dumps(about.get('default')))}</code>"
        cells = (f"<code>{escape(field)}</code>", _kind(about), default, escape(about.get("description", "")))
        rows.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>\n")
    head = "<tr><th>field</th><th>type</th><th>default</th><th></th></tr>\n"
    table = f"<table>\n{head}{''.join(rows)}</table>" if rows else ""
    return f'<h3 id="{escape(name)}">{escape(name)}</h3>\n<p>{escape(schema.get("description", ""))}</p>\n{table}'


def _kind(about: dict[str, Any]) -> str:
    """What a value may be, in HTML; null, which is the default of every field that may be left out, is not told."""
    if reference := about.get("$ref"):
        name = escape(reference.rpartition("/")[2])
        return f'<a href="#{name}">{name}</a>'
    if several := about.get("anyOf") or about.get("oneOf"):
        return " or ".join(_kind(one) for one in several if one.get("type") != "null")
    if "const" in about or "enum" in about:
        return " or ".join(f"<code>{escape(json.dumps(one))}</code>" for one in about.get("enum", [about.get("const")]))
    items = about.get("items")
    kind = f"list of {_kind(items)}" if about.get("type") == "array" and items else escape(str(about.get("type", "any")))
    limits = ", ".join(f"{words} {_limit(about[name])}" for name, words in LIMITS.items() if name in about and about[name] not in INT64)
    return f"{kind} ({escape(limits)})" if limits else kind


def _limit(value: Any) -> str:
    return f"{value:.15g}" if isinstance(value, float) else str(value)
