"""A paced engine that a prompt can kill, as a fault in a library would: for tests of what outlives it."""

from __future__ import annotations

import os
import signal
from pathlib import Path

from lockstep.config.model_spec import ModelSpec
from lockstep.config.tree import EngineConfig
from lockstep.protocol import EngineOutput
from lockstep.testing.paced import PacedClient, make

POISON = 299  # the token that does it


def make_fragile(config: EngineConfig, spec: ModelSpec, folder: Path, *, replaced: bool = False) -> FragileClient:
    """For `EngineKeeper(client="lockstep.testing.fragile:make_fragile")`."""
    return FragileClient(make(config, spec, folder).config)


class FragileClient(PacedClient):
    """See PacedClient. Its process dies by SIGSEGV in the first step with a prompt that has POISON."""

    def step(self) -> list[EngineOutput]:
        if any(POISON in request.prompt_token_ids for requests in self._due.values() for request in requests.values()):
            os.kill(os.getpid(), signal.SIGSEGV)
        return super().step()
