"""What the routes of one API process share."""

from __future__ import annotations

import asyncio
import sys
import time
from collections.abc import Coroutine
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any

from fastapi import Depends, Request

from lockstep.config.serve import ServeOptions, read_chat_template
from lockstep.engine.stats import EngineStats, combined
from lockstep.frontend.async_engine import AsyncEngine
from lockstep.server.admission import Admission, Bounds
from lockstep.server.aside import Aside
from lockstep.server.missing import Missing
from lockstep.server.response_store import ResponseStore
from lockstep.version import __version__

if TYPE_CHECKING:
    from lockstep.server.middleware_gate import Running

SEQUENCES = 256  # that an engine runs at once, where it does not say


@dataclass
class ServerState:
    """One per API process, at `app.state.server`."""

    options: ServeOptions
    engine: AsyncEngine
    model_names: list[str]  # the first is what responses say
    created_s: int = field(default_factory=lambda: int(time.time()))  # Unix time
    draining: bool = False  # no new requests are taken
    responses: ResponseStore = field(default_factory=ResponseStore)
    aside: Aside = field(default_factory=Aside)
    beside: list[Missing] = field(default_factory=list)  # other API processes that do not serve
    running: set[Running] = field(default_factory=set)  # requests that generate; the gate's
    _tasks: set[asyncio.Task[Any]] = field(default_factory=set)

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

    @cached_property
    def admission(self) -> Admission:
        """This process's share of what is let in. Of a connected engine, whose successor may have other bounds."""
        self.engine.on_welcome = self._bound_anew
        return Admission(self._bounds())

    def _bound_anew(self) -> None:
        self.admission.bounds = self._bounds()

    def _bounds(self) -> Bounds:
        options, config = self.options, self.engine.config
        replicas, processes = config.parallel.replicas_served, options.api_server_count
        running = replicas * (config.scheduler.max_num_seqs or SEQUENCES)
        queued, tokens = options.max_num_queued_reqs, options.max_queued_tokens
        most = None if tokens is None else -(-tokens // processes)
        return Bounds(-(-running // processes), -(-queued // processes), most, options.max_concurrency_per_key)

    @property
    def max_model_len(self) -> int:
        """Most tokens of prompt and output."""
        return self.engine.config.model.max_model_len or sys.maxsize

    @cached_property
    def most_characters(self) -> int:
        """No text of more can fit: the context times the longest token."""
        vocabulary: dict[str, int] = getattr(self.engine.tokenizer, "get_vocab", dict)()
        return self.max_model_len * max((len(token) for token in vocabulary), default=sys.maxsize)

    @property
    def stats(self) -> EngineStats | None:
        """The engine's numbers as it last told them; None when no replica is ready. Asks nobody."""
        health = self.engine.health
        known = [one.stats for one in health.replicas if one.stats is not None] if health is not None else []
        return combined(known) if known else None

    def background(self, work: Coroutine[Any, Any, Any]) -> None:
        """Have something done, and do not wait for it."""
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def state_of(request: Request) -> ServerState:
    """The state of the application that answers."""
    found: ServerState = request.app.state.server
    return found


State = Annotated[ServerState, Depends(state_of)]  # what a route that needs it has as a parameter's type
