"""What the routes of one API process share."""

from __future__ import annotations

import time
from dataclasses import dataclass, field
from typing import Annotated

from fastapi import Depends, Request

from lockstep.config.serve import ServeOptions, read_chat_template
from lockstep.frontend.async_engine import AsyncEngine
from lockstep.server.response_store import ResponseStore
from lockstep.version import __version__


@dataclass
class ServerState:
    """One per API process, at `app.state.server`."""

    options: ServeOptions
    engine: AsyncEngine
    model_names: list[str]  # the first is what responses say
    created_s: int = field(default_factory=lambda: int(time.time()))  # Unix time
    draining: bool = False  # no new requests are taken
    responses: ResponseStore = field(default_factory=ResponseStore)

    def __post_init__(self) -> None:
        """Raises ConfigError for a chat template that cannot be read."""
        self.chat_template = read_chat_template(self.options)  # None: the model's own

    @property
    def model(self) -> str:
        return self.model_names[0]

    @property
    def fingerprint(self) -> str:
        """What made the answers: the same fingerprint and seed give the same text."""
        return f"lockstep-{__version__}"

    def name_of(self, asked: str | None) -> str:
        """The model's name as the client called it."""
        return asked or self.model


def state_of(request: Request) -> ServerState:
    """The state of the application that answers."""
    found: ServerState = request.app.state.server
    return found


State = Annotated[ServerState, Depends(state_of)]  # what a route that needs it has as a parameter's type
