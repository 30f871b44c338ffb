"""The bodies of `/tokenize` and `/detokenize`."""

from __future__ import annotations

from typing import Annotated

from lockstep.server.schemas.chat import MAX_MESSAGES, Message, Talk
from lockstep.server.schemas.common import Body, Few, Ids, Name


class TokenizeRequest(Talk):
    """Of a prompt, or of a conversation."""

    model: Name | None = None
    prompt: str | None = None
    messages: Annotated[list[Message], Few(MAX_MESSAGES)] = []
    return_token_strs: bool | None = None


class DetokenizeRequest(Body):
    model: Name | None = None
    tokens: Ids
