"""What is answered, as msgspec structs: a streamed chunk is encoded in a microsecond. UNSET fields are left out."""

from __future__ import annotations

from typing import Any, Literal

import msgspec
from msgspec import UNSET, UnsetType

Maybe = UnsetType


class CachedTokens(msgspec.Struct, frozen=True):
    cached_tokens: int = 0


class Usage(msgspec.Struct):
    prompt_tokens: int = 0
    completion_tokens: int = 0
    total_tokens: int = 0
    prompt_tokens_details: CachedTokens = CachedTokens()


class CompletionLogprobs(msgspec.Struct):
    """The older form: parallel lists. text_offset: in characters of the choice's text."""

    text_offset: list[int]
    token_logprobs: list[float | None]
    tokens: list[str]
    top_logprobs: list[dict[str, float] | None]


class CompletionChoice(msgspec.Struct, kw_only=True):
    index: int
    text: str
    logprobs: CompletionLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    prompt_logprobs: Any = UNSET
    prompt_token_ids: list[int] | Maybe = UNSET
    token_ids: list[int] | Maybe = UNSET


class Completion(msgspec.Struct, kw_only=True):
    """Whole, or a chunk."""

    id: str
    object: Literal["text_completion"] = "text_completion"
    created: int
    model: str
    choices: list[CompletionChoice]
    usage: Usage | Maybe | None = UNSET
    system_fingerprint: str | None = None


class TokenBytes(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]


class TokenLogprob(msgspec.Struct):
    token: str
    logprob: float
    bytes: list[int]
    top_logprobs: list[TokenBytes]


class ChatLogprobs(msgspec.Struct):
    content: list[TokenLogprob]
    refusal: None = None


class CalledFunction(msgspec.Struct):
    arguments: str
    name: str | Maybe = UNSET


class ToolCall(msgspec.Struct, kw_only=True):
    """Whole, or what is new of it (then `index` says of which)."""

    index: int | Maybe = UNSET
    id: str | Maybe = UNSET
    type: str | Maybe = UNSET
    function: CalledFunction


class Delta(msgspec.Struct, kw_only=True):
    role: str | Maybe = UNSET
    content: str | Maybe | None = UNSET
    reasoning_content: str | Maybe = UNSET
    tool_calls: list[ToolCall] | Maybe = UNSET


class ChunkChoice(msgspec.Struct, kw_only=True):
    index: int
    delta: Delta
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | Maybe | None = UNSET
    token_ids: list[int] | Maybe = UNSET


class ChatChunk(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["chat.completion.chunk"] = "chat.completion.chunk"
    created: int
    model: str
    choices: list[ChunkChoice]
    usage: Usage | Maybe | None = UNSET
    system_fingerprint: str | None = None
    prompt_token_ids: list[int] | Maybe = UNSET


class ChatMessage(msgspec.Struct, kw_only=True):
    role: str = "assistant"
    content: str | None
    refusal: None = None
    reasoning_content: str | Maybe | None = UNSET
    tool_calls: list[ToolCall] | Maybe = UNSET


class ChatChoice(msgspec.Struct, kw_only=True):
    index: int
    message: ChatMessage
    logprobs: ChatLogprobs | None = None
    finish_reason: str | None = None
    stop_reason: int | str | None = None
    token_ids: list[int] | Maybe = UNSET


class Chat(msgspec.Struct, kw_only=True):
    id: str
    object: Literal["chat.completion"] = "chat.completion"
    created: int
    model: str
    choices: list[ChatChoice]
    usage: Usage
    system_fingerprint: str | None = None
    prompt_logprobs: Any = UNSET
    prompt_token_ids: list[int] | Maybe = UNSET


encode = msgspec.json.Encoder().encode
