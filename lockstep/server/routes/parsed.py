"""Routes with a JSON body: it was parsed before the route was known, and is not parsed again."""

from __future__ import annotations

from collections.abc import Callable, Coroutine
from typing import Any

from fastapi import Request, Response
from fastapi.routing import APIRoute


class ParsedRequest(Request):
    """Behind `middleware_body.Bodies`, which leaves no body unparsed."""

    async def json(self) -> Any:
        return self.scope["state"]["json"]


class ParsedRoute(APIRoute):
    """A route class: `APIRouter(route_class=ParsedRoute)`."""

    def get_route_handler(self) -> Callable[[Request], Coroutine[Any, Any, Response]]:
        handle = super().get_route_handler()

        async def parsed(request: Request) -> Response:
            return await handle(ParsedRequest(request.scope, request.receive))

        return parsed
