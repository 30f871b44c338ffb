"""What the model wrote, read as an answer: thoughts, content and calls of tools."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from msgspec import UNSET

from lockstep.frontend.reasoning import REASONING, Thinking
from lockstep.frontend.tools import PARSERS, Named, Parsed, Required, ToolParser, family_parser, list_schema
from lockstep.server.errors import ApiError
from lockstep.server.schemas.chat import ChatRequest, ToolChoice
from lockstep.server.schemas.wire import CalledFunction, Delta, ToolCall
from lockstep.server.state import ServerState

DENSE = {"disable_any_whitespace": True}  # of forced calls: programs read them, and small models would fill them with spaces


@dataclass
class Plan:
    """How the answers to one request are read, and what they are made to be."""

    make_parser: Callable[[], ToolParser] | None = None
    thinks: bool | None = None  # None: thoughts are not told apart; else `Thinking.inside`
    constraint: dict[str, Any] | None = None  # fields of StructuredOutputs
    named: bool = False  # tool_choice named the function
    several: bool = True  # calls in one answer
    shows_tools: bool = False  # to the template

    @property
    def special_tokens(self) -> bool:
        """Whether the text must have its special tokens."""
        return self.make_parser is not None and self.make_parser().special_tokens


def plan_of(state: ServerState, body: ChatRequest) -> Plan:
    """Raises ApiError for tools and a choice that do not go together."""
    parser, options = state.options.reasoning_parser, state.options
    formed = body.structured_outputs is not None or (body.response_format is not None and body.response_format.type != "text")
    plan = Plan(thinks=REASONING[parser] if parser and not formed else None, several=body.parallel_tool_calls is not False)
    choice = body.tool_choice or ("auto" if body.tools else "none")
    if choice == "none":
        return plan
    if not body.tools:
        raise ApiError(400, "tool_choice needs tools: give the functions that may be called.", param="tool_choice")
    functions = {tool.function.name: tool.function.model_dump(exclude_none=True) for tool in body.tools}
    names, plan.shows_tools = frozenset(functions), True
    if isinstance(choice, ToolChoice):
        wanted = choice.function.name
        if wanted not in functions:
            raise ApiError(400, f"tool_choice names {wanted[:80]!r}, which is not in tools.", param="tool_choice")
        plan.named, plan.make_parser = True, lambda: Named(wanted)
        plan.constraint = {"json": functions[wanted].get("parameters") or {"type": "object", "properties": {}}, **DENSE}
    elif choice == "required":
        plan.make_parser = lambda: Required(names)
        try:
            plan.constraint = {"json": list_schema(list(functions.values()), several=plan.several), **DENSE}
        except ValueError as e:
            raise ApiError(400, str(e), param="tools") from None
    elif not options.enable_auto_tool_choice:
        raise ApiError(
            400, 'tool_choice "auto" is off in this server: it was started with --no-enable-auto-tool-choice.', param="tool_choice"
        )
    else:
        make = PARSERS[options.tool_call_parser or family_parser(state.engine.spec.architecture)]
        plan.make_parser = lambda: make(names)
    return plan


class Reader:
    """One answer as it grows."""

    def __init__(self, plan: Plan) -> None:
        self._several, self._named = plan.several, plan.named
        self._parser = plan.make_parser() if plan.make_parser else None
        self._thinking = None if plan.thinks is None or plan.constraint else Thinking(inside=plan.thinks)
        self.called = 0  # calls so far

    def read(self, text: str, *, last: bool) -> Delta:
        """What more text brought; last: it was all."""
        reasoning, content = "", text
        if self._thinking is not None:
            reasoning, content = self._thinking.feed(text)
            if last:
                rest = self._thinking.finish()
                reasoning, content = reasoning + rest.reasoning, content + rest.content
        if self._parser is None:
            return Delta(content=content or UNSET, reasoning_content=reasoning or UNSET)
        parsed = self._parser.feed(content)
        ends = self._parser.finish() if last else Parsed()
        calls = [*self._calls(parsed), *self._calls(ends)]
        return Delta(content=(parsed.content + ends.content) or UNSET, reasoning_content=reasoning or UNSET, tool_calls=calls or UNSET)

    def _calls(self, parsed: Parsed) -> list[ToolCall]:
        found = []
        for call in parsed.calls:
            if call.index > 0 and not self._several:
                continue
            if call.name is None:
                found.append(ToolCall(index=call.index, function=CalledFunction(call.arguments)))
            else:
                self.called += 1
                name = f"call_{uuid.uuid4().hex[:24]}"
                found.append(ToolCall(index=call.index, id=name, type="function", function=CalledFunction(call.arguments, call.name)))
        return found

    def finish_reason(self, reason: str | None) -> str | None:
        """Why it ended, as the API says it: an answer that calls was ended by its calls, but not where they were imposed."""
        return "tool_calls" if reason == "stop" and self.called and not self._named else reason


def merged(calls: list[ToolCall]) -> list[ToolCall]:
    """Calls of a whole answer, from what was new of each."""
    found: dict[int, ToolCall] = {}
    for call in calls:
        assert isinstance(call.index, int)
        if call.index in found:
            found[call.index].function.arguments += call.function.arguments
        else:
            found[call.index] = ToolCall(id=call.id, type=call.type, function=call.function)
    return list(found.values())
