"""`/v1/models`: the one model there is, by all its names."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from lockstep.server.errors import ApiError
from lockstep.server.state import ServerState, State

router = APIRouter(prefix="/v1", tags=["models"])


def card(state: ServerState, name: str) -> dict[str, Any]:
    return {
        "id": name,
        "object": "model",
        "created": state.created_s,
        "owned_by": "lockstep",
        "root": state.engine.config.model.model or name,
        "parent": None,
        "max_model_len": state.engine.config.model.max_model_len,
    }


@router.get("/models")
async def models(state: State) -> dict[str, Any]:
    return {"object": "list", "data": [card(state, name) for name in state.model_names]}


@router.get("/models/{name:path}")
async def model(name: str, state: State) -> dict[str, Any]:
    check_model(state, name)
    return card(state, name)


def check_model(state: ServerState, name: str | None) -> None:
    """Raises ApiError 404 for a model that is not served; without a name it is the one that is."""
    if name and name not in state.model_names:
        raise ApiError(
            404, f"model {name!r} does not exist: there is {', '.join(state.model_names)}.", param="model", code="model_not_found"
        )
