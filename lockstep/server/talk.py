"""Messages as templates expect them, and the prompt they make."""

from __future__ import annotations

import inspect
import json
from typing import Any

from lockstep.frontend.async_engine import LONG_TEXT
from lockstep.frontend.chat import render
from lockstep.frontend.errors import PromptError
from lockstep.server.admission_cost import written
from lockstep.server.errors import ApiError
from lockstep.server.sampling import refuse
from lockstep.server.schemas.chat import Message, Talk
from lockstep.server.state import ServerState


async def prompt_of(state: ServerState, body: Talk, *, tools: bool = True) -> dict[str, Any]:
    """The prompt of a conversation, as text and token ids. tools: whether the model is told of them. Raises ApiError."""
    refuse(body)
    messages = [plain(i, message) for i, message in enumerate(body.messages)]
    words = template_words(state, body)
    if tools and body.tools:
        words["tools"] = [tool.model_dump(exclude_none=True) for tool in body.tools]
    if body.documents:
        words["documents"] = body.documents
    begin = body.add_generation_prompt is not False
    if body.continue_final_message:
        if body.add_generation_prompt:
            raise ApiError(
                400, "continue_final_message and add_generation_prompt exclude each other: set one.", param="continue_final_message"
            )
        begin, words["continue_final_message"] = False, True

    def make() -> dict[str, Any]:
        return render(state.engine.tokenizer, messages, begin, state.chat_template, words)

    long = written({"messages": messages, **words}) > LONG_TEXT
    try:
        return await state.aside.do(make) if long else make()
    except PromptError as e:
        raise ApiError(400, str(e), param="messages") from None


def template_words(state: ServerState, body: Talk) -> dict[str, Any]:
    """chat_template_kwargs, without any that would be something else than a variable of the template."""
    words = dict(body.chat_template_kwargs or {})
    reserved = {"tokenizer", *inspect.signature(type(state.engine.tokenizer).apply_chat_template).parameters}
    wrong = sorted(reserved & set(words))
    if wrong:
        raise ApiError(400, f"chat_template_kwargs.{wrong[0]} is not a variable of the template.", param="chat_template_kwargs")
    return words


def plain(index: int, message: Message) -> dict[str, Any]:
    """A message as templates read it: content is text, arguments of calls are values. Raises ApiError for what is not text."""
    found: dict[str, Any] = {"role": "system" if message.role == "developer" else message.role, "content": text_of(index, message)}
    for name in ("name", "tool_call_id", "reasoning_content"):
        if getattr(message, name) is not None:
            found[name] = getattr(message, name)
    if message.tool_calls:
        found["tool_calls"] = [
            {
                "id": c.id or "",
                "type": "function",
                "function": {"name": c.function.name, "arguments": arguments(index, c.function.arguments)},
            }
            for c in message.tool_calls
        ]
    return found


def text_of(index: int, message: Message) -> str:
    if message.content is None or isinstance(message.content, str):
        return message.content or ""
    for at, part in enumerate(message.content):
        if part.type not in ("text", "input_text", "output_text") or part.text is None:
            raise ApiError(
                400,
                f"messages[{index}].content[{at}] is of type {part.type[:40]!r}: this model reads text only.",
                param=f"messages.{index}",
            )
    return "\n".join(part.text or "" for part in message.content)


def arguments(index: int, given: str | dict[str, Any]) -> Any:
    if not isinstance(given, str):
        return given
    try:
        return json.loads(given or "{}")
    except ValueError:
        where = f"messages.{index}.tool_calls"
        raise ApiError(400, f"messages[{index}] has a tool call whose arguments are no JSON: {given[:80]!r}.", param=where) from None
