"""`/v1/responses` in terms of a conversation: its items as messages, an answer as items."""

from __future__ import annotations

import uuid
from typing import Any

from lockstep.server.errors import ApiError
from lockstep.server.schemas.chat import CalledFunction, ChatRequest, Function, Message, Tool, ToolCall, ToolChoice
from lockstep.server.schemas.common import JsonSchema, ResponseFormat, SamplingFields
from lockstep.server.schemas.responses import Item, NamedTool, ResponsesRequest
from lockstep.server.schemas.wire import ChatMessage


def new_id(kind: str) -> str:
    return f"{kind}_{uuid.uuid4().hex}"


def chat_of(body: ResponsesRequest, before: list[Message]) -> ChatRequest:
    """The conversation that is asked for. before: what an earlier response was asked and answered."""
    instructions = [Message(role="system", content=body.instructions)] if body.instructions else []
    fields: dict[str, Any] = {name: getattr(body, name) for name in SamplingFields.model_fields if name not in ("stream_options", "n")}
    if body.text is not None and body.text.format is not None and body.text.format.type != "text":
        fields["response_format"] = format_of(body)
    if body.tools:
        fields["tools"] = [tool_of(i, body) for i in range(len(body.tools))]
    choice = body.tool_choice
    fields["tool_choice"] = ToolChoice.model_validate({"function": {"name": choice.name}}) if isinstance(choice, NamedTool) else choice
    if body.top_logprobs is not None:
        fields |= {"logprobs": True, "top_logprobs": body.top_logprobs}
    return ChatRequest(
        messages=[*instructions, *before, *messages_of(body)],
        max_completion_tokens=body.max_output_tokens,
        parallel_tool_calls=body.parallel_tool_calls,
        chat_template_kwargs=body.chat_template_kwargs,
        **fields,
    )


def format_of(body: ResponsesRequest) -> ResponseFormat:
    assert body.text is not None and body.text.format is not None
    wanted = body.text.format
    schema = JsonSchema.model_validate({"name": wanted.name, "schema": wanted.schema_}) if wanted.type == "json_schema" else None
    return ResponseFormat(type=wanted.type, json_schema=schema)


def tool_of(index: int, body: ResponsesRequest) -> Tool:
    tool = (body.tools or [])[index]
    if tool.type != "function" or tool.name is None:
        raise ApiError(400, f"tools[{index}] is of type {tool.type[:40]!r}: only functions with a name can be called.", param="tools")
    return Tool(function=Function(name=tool.name, description=tool.description, parameters=tool.parameters))


def messages_of(body: ResponsesRequest) -> list[Message]:
    """The input as messages. Raises ApiError for an item that is no text."""
    if isinstance(body.input, str):
        return [Message(role="user", content=body.input)]
    return [message_of(i, item) for i, item in enumerate(body.input)]


def message_of(index: int, item: Item) -> Message:
    kind = item.type or "message"
    if kind == "message" and item.role is not None and item.content is not None:
        return Message(role=item.role, content=item.content)
    if kind == "function_call" and item.name is not None:
        called = ToolCall(id=item.call_id, function=CalledFunction(name=item.name, arguments=item.arguments or ""))
        return Message(role="assistant", content=None, tool_calls=[called])
    if kind == "function_call_output":
        return Message(role="tool", content=item.output or "", tool_call_id=item.call_id)
    raise ApiError(
        400, f"input[{index}] of type {kind[:40]!r} cannot be read: give messages, function calls or their outputs.", param=f"input.{index}"
    )


def output_of(message: ChatMessage, status: str) -> list[dict[str, Any]]:
    """An answer as output items: thoughts, text, calls."""
    items: list[dict[str, Any]] = []
    if isinstance(message.reasoning_content, str) and message.reasoning_content:
        items.append(reasoning_item(message.reasoning_content))
    calls = message.tool_calls if isinstance(message.tool_calls, list) else []
    if message.content or not calls:
        items.append(text_item(new_id("msg"), message.content or "", status))
    for call in calls:
        items.append(call_item(str(call.id), str(call.function.name), call.function.arguments))
    return items


def reasoning_item(text: str) -> dict[str, Any]:
    content = [{"type": "reasoning_text", "text": text}]
    return {"id": new_id("rs"), "type": "reasoning", "summary": [], "content": content, "status": "completed"}


def text_item(name: str, text: str, status: str) -> dict[str, Any]:
    content = [text_part(text)] if status != "in_progress" else []
    return {"id": name, "type": "message", "role": "assistant", "status": status, "content": content}


def text_part(text: str) -> dict[str, Any]:
    return {"type": "output_text", "text": text, "annotations": [], "logprobs": []}


def call_item(call_id: str, name: str, arguments: str, status: str = "completed") -> dict[str, Any]:
    return {"id": new_id("fc"), "type": "function_call", "call_id": call_id, "name": name, "arguments": arguments, "status": status}
