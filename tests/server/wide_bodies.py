"""Every list and every mapping of every request model, filled with what is wrong, and what checking that costs. A program of its own:
the errors that a validator keeps are in no Python object that could be counted.
"""

from __future__ import annotations

import json
import resource
import types
from collections.abc import Callable, Iterator
from typing import Annotated, Any, Union, get_args, get_origin

from fastapi import FastAPI
from pydantic import BaseModel, ValidationError

from lockstep.server.app import ROUTERS
from lockstep.server.schemas.common import Body

COUNT = 300_000
WRONG = (None, 1, "x", [None])
Wrap = Callable[[Any], Any]


def models() -> Iterator[type[BaseModel]]:
    """What the JSON of a whole request is read with."""
    found = [Body]
    while found:
        found += (one := found.pop()).__subclasses__()
        if one.__name__.endswith("Request"):
            yield one


def places(kind: Any, wrap: Wrap, name: str) -> Iterator[tuple[str, bool, Wrap]]:
    """(name, whether it is a list, how a value is put there) of each list and mapping within a type."""
    origin, inner = get_origin(kind), get_args(kind)
    if origin is Annotated:
        yield from places(inner[0], wrap, name)
    elif origin in (Union, types.UnionType):
        for one in inner:
            yield from places(one, wrap, name)
    elif origin is list:
        yield name, True, wrap
        yield from places(inner[0], lambda v: wrap([v]), f"{name}[]")
    elif origin is dict:
        yield name, False, wrap
    elif isinstance(kind, type) and issubclass(kind, BaseModel):
        for field, about in kind.model_fields.items():
            key = about.alias or field
            yield from places(about.annotation, lambda v, key=key: wrap({key: v}), f"{name}.{key}")  # type: ignore[misc]


def errors_of(model: type[BaseModel], body: Any) -> int:
    """How many errors it has, each of them told as FastAPI has them told."""
    try:
        model.model_validate(body)
    except ValidationError as e:
        return len(e.errors(include_url=False)) if e.error_count() < COUNT // 100 else e.error_count()
    return 0


def peak_mb() -> float:
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


def main() -> None:
    app = FastAPI()
    for router in ROUTERS:
        app.include_router(router)
    assert app.openapi()["paths"], "no routes, no models"
    lists, mappings = [[one] * COUNT for one in WRONG], [dict.fromkeys(map(str, range(COUNT)))]
    before_mb, asked, most = peak_mb(), set(), (0, "")
    for model in models():
        for name, is_list, wrap in places(model, lambda v: v, model.__name__):
            asked.add(name)
            for wide in lists if is_list else mappings:
                most = max(most, (errors_of(model, wrap(wide)), name))
    print(json.dumps({"places": sorted(asked), "most_errors": most[0], "where": most[1], "grown_mb": peak_mb() - before_mb}))


if __name__ == "__main__":
    main()
