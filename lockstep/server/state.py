"""What the routes of one API process share."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request

from lockstep.config.serve import ServeOptions
from lockstep.frontend.async_engine import AsyncEngine


@dataclass
class ServerState:
    """One per API process, at `app.state.server`."""

    options: ServeOptions
    engine: AsyncEngine
    model_names: list[str]  # the first is what responses say
    created_s: int = field(default_factory=lambda: int(time.time()))  # Unix time
    draining: bool = False  # no new requests are taken

    @property
    def model(self) -> str:
        return self.model_names[0]


def state_of(request: Request) -> ServerState:
    """The state of the application that answers."""
    found: ServerState = request.app.state.server
    return found


State = Annotated[ServerState, Depends(state_of)]  # what a route that needs it has as a parameter's type
