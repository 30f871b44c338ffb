"""The body of `/v1/responses`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field

from lockstep.server.schemas.chat import MAX_MESSAGES, MAX_TOOLS, FunctionName, Part, Role
from lockstep.server.schemas.common import MAX_LOGPROBS, Body, Few, JsonSchema, Name, SamplingFields


class Item(Body):
    """A message, a call of a function, or what came of it."""

    type: Name | None = None
    role: Role | None = None
    content: str | Annotated[list[Part], Few(MAX_MESSAGES)] | None = None
    call_id: str | None = None
    name: str | None = None
    arguments: str | None = None
    output: str | Annotated[list[Part], Few(MAX_MESSAGES)] | None = None


class TextFormat(JsonSchema):
    type: Literal["text", "json_object", "json_schema"] = "text"


class TextOptions(Body):
    format: TextFormat | None = None


class FunctionTool(Body):
    type: Name
    name: FunctionName | None = None
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class NamedTool(Body):
    type: Literal["function"] = "function"
    name: str


class ResponsesRequest(SamplingFields):
    input: str | Annotated[list[Item], Few(MAX_MESSAGES, least=1)]
    instructions: str | None = None
    max_output_tokens: int | None = Field(None, ge=1, lt=1 << 31)
    text: TextOptions | None = None
    tools: Annotated[list[FunctionTool], Few(MAX_TOOLS)] | None = None
    tool_choice: Literal["none", "auto", "required"] | NamedTool | None = None
    parallel_tool_calls: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    store: bool | None = None  # here the default is not to
    background: bool | None = None
    previous_response_id: Name | None = None
    metadata: Annotated[dict[str, str], Few(16)] | None = None
    chat_template_kwargs: dict[str, Any] | None = None
