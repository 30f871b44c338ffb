"""A response of `/v1/responses` as the events that its clients expect: items and parts are opened, grow, and are closed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from lockstep.server.response_items import call_item, new_id, text_item, text_part
from lockstep.server.schemas.wire import Delta, ToolCall
from lockstep.server.sse import named_event


class ResponseEvents:
    """Makes the events of one response, in order, and gathers its output items."""

    def __init__(self) -> None:
        self.output: list[dict[str, Any]] = []  # items that are closed
        self._count = 0
        self._item: dict[str, Any] | None = None  # the open one
        self._text = ""  # of the open one

    def event(self, kind: str, **fields: Any) -> bytes:
        """The next event."""
        made = named_event(kind, {"type": kind, "sequence_number": self._count, **fields})
        self._count += 1
        return made

    def take(self, delta: Delta) -> Iterator[bytes]:
        """What is new, as events."""
        if isinstance(delta.reasoning_content, str):
            yield from self._grow("reasoning", delta.reasoning_content)
        if isinstance(delta.content, str):
            yield from self._grow("message", delta.content)
        for call in delta.tool_calls if isinstance(delta.tool_calls, list) else ():
            yield from self._call(call)

    def finish(self, status: str) -> Iterator[bytes]:
        """Close what is open; a response without any output gets an empty message."""
        if self._item is None and not self.output:
            yield from self._grow("message", "")
        yield from self._close(status)

    def _grow(self, kind: str, text: str) -> Iterator[bytes]:
        if self._item is None or self._item["type"] != kind:
            yield from self._close()
            make: Callable[[], dict[str, Any]] = reasoning if kind == "reasoning" else message
            yield from self._open(make())
            yield self._about("response.content_part.added", content_index=0, part=self._part(""))
        if text:
            self._text += text
            if kind == "reasoning":
                yield self._about("response.reasoning_text.delta", content_index=0, delta=text)
            else:
                yield self._about("response.output_text.delta", content_index=0, delta=text, logprobs=[])

    def _call(self, call: ToolCall) -> Iterator[bytes]:
        if isinstance(call.id, str):
            yield from self._close()
            yield from self._open(call_item(call.id, str(call.function.name), "", "in_progress"))
        if call.function.arguments:
            self._text += call.function.arguments
            yield self._about("response.function_call_arguments.delta", delta=call.function.arguments)

    def _open(self, item: dict[str, Any]) -> Iterator[bytes]:
        self._item, self._text = item, ""
        yield self.event("response.output_item.added", output_index=len(self.output), item=item)

    def _close(self, status: str = "completed") -> Iterator[bytes]:
        item = self._item
        if item is None:
            return
        if item["type"] == "function_call":
            yield self._about("response.function_call_arguments.done", arguments=self._text, name=item["name"])
            item = item | {"arguments": self._text, "status": status}
        else:
            if item["type"] == "reasoning":
                yield self._about("response.reasoning_text.done", content_index=0, text=self._text)
            else:
                yield self._about("response.output_text.done", content_index=0, text=self._text, logprobs=[])
            yield self._about("response.content_part.done", content_index=0, part=self._part(self._text))
            item = item | {"content": [self._part(self._text)], "status": status}
        yield self.event("response.output_item.done", output_index=len(self.output), item=item)
        self.output.append(item)
        self._item = None

    def _part(self, text: str) -> dict[str, Any]:
        assert self._item is not None
        return {"type": "reasoning_text", "text": text} if self._item["type"] == "reasoning" else text_part(text)

    def _about(self, kind: str, **fields: Any) -> bytes:
        """An event about the open item."""
        assert self._item is not None
        return self.event(kind, item_id=self._item["id"], output_index=len(self.output), **fields)


def message() -> dict[str, Any]:
    return text_item(new_id("msg"), "", "in_progress")


def reasoning() -> dict[str, Any]:
    return {"id": new_id("rs"), "type": "reasoning", "summary": [], "content": [], "status": "in_progress"}
