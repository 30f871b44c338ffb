"""The body of `/v1/chat/completions`."""

from __future__ import annotations

from typing import Annotated, Any, Literal

from pydantic import Field, model_validator

from lockstep.server.schemas.common import MAX_LOGPROBS, Body, Few, Name, SamplingFields

MAX_MESSAGES = 4096
MAX_TOOLS = 128
FunctionName = Annotated[str, Field(pattern=r"^[a-zA-Z0-9_.-]{1,64}$")]


Role = Literal["system", "developer", "user", "assistant", "tool", "function"]


class Part(Body):
    """A piece of a message's content. Only text is understood."""

    type: str
    text: str | None = None


class CalledFunction(Body):
    name: str
    arguments: str | dict[str, Any] = ""


class ToolCall(Body):
    id: str | None = None
    type: Literal["function"] | None = None
    function: CalledFunction


class Message(Body):
    role: Role
    content: str | Annotated[list[Part], Few(MAX_MESSAGES)] | None = None
    name: str | None = None
    reasoning_content: str | None = None
    tool_calls: Annotated[list[ToolCall], Few(MAX_TOOLS)] | None = None
    tool_call_id: str | None = None

    @model_validator(mode="after")
    def _says_something(self) -> Message:
        if self.content is None and not (self.role == "assistant" and (self.tool_calls or self.reasoning_content)):
            rest = "content, or tool_calls" if self.role == "assistant" else "content"
            raise ValueError(f"a message of role {self.role!r} needs {rest}.")
        return self


class Function(Body):
    name: FunctionName
    description: str | None = None
    parameters: dict[str, Any] | None = None
    strict: bool | None = None


class Tool(Body):
    type: Literal["function"] = "function"
    function: Function


class ChosenFunction(Body):
    name: str


class ToolChoice(Body):
    type: Literal["function"] = "function"
    function: ChosenFunction


class Talk(Body):
    """A conversation, and how it becomes a prompt."""

    messages: Annotated[list[Message], Few(MAX_MESSAGES, least=1)]
    tools: Annotated[list[Tool], Few(MAX_TOOLS)] | None = None
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template_kwargs: dict[str, Any] | None = None
    documents: Annotated[list[dict[str, Any]], Few(1024)] | None = None
    add_special_tokens: bool | None = None  # the template writes them already


class ChatRequest(Talk, SamplingFields):
    max_tokens: int | None = Field(None, ge=1, lt=1 << 31)
    max_completion_tokens: int | None = Field(None, ge=1, lt=1 << 31)
    logprobs: bool | None = None
    top_logprobs: int | None = Field(None, ge=0, le=MAX_LOGPROBS)
    tool_choice: Literal["none", "auto", "required"] | ToolChoice | None = None
    parallel_tool_calls: bool | None = None
    reasoning_effort: Name | None = None
    include_reasoning: bool | None = None
