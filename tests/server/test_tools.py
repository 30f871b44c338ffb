"""Tools and thoughts through the API, with a model that writes what each family writes."""

from __future__ import annotations

import json
from typing import Any

import pytest

from lockstep.protocol import SamplingParams
from tests.server.scripted import Scripted

TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {"type": "object", "properties": {"city": {"type": "string"}}}}}
    for name in ("weather", "news")
]
ROME, OSLO = '{"city": "Rome"}', '{"city": "Oslo"}'
WRITTEN = {
    "hermes": f'Let me look.\n<tool_call>\n{{"name": "weather", "arguments": {ROME}}}\n</tool_call>\n<tool_call>'
    f'{{"name": "news", "arguments": {OSLO}}}</tool_call>',
    "llama3_json": f'{{"name": "weather", "parameters": {ROME}}}; {{"name": "news", "parameters": {OSLO}}}',
    "mistral": f"[TOOL_CALLS]weather{ROME}[TOOL_CALLS]news{OSLO}",
    "pythonic": "[weather(city='Rome'), news(city='Oslo')]",
}


def gathered(events: list[dict[str, Any]]) -> tuple[str, str, list[dict[str, Any]], str | None]:
    """(content, thoughts, calls, finish reason) of a stream, as clients put them together."""
    content, thoughts, calls, reason = "", "", list[dict[str, Any]](), None
    assert events[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    for event in events:
        for choice in event["choices"]:
            delta, reason = choice["delta"], choice["finish_reason"] or reason
            content += delta.get("content") or ""
            thoughts += delta.get("reasoning_content") or ""
            for call in delta.get("tool_calls", []):
                if "id" in call:
                    assert call["index"] == len(calls) and call["type"] == "function"
                    calls.append({"name": call["function"]["name"], "arguments": "", "id": call["id"]})
                calls[call["index"]]["arguments"] += call["function"]["arguments"]
    return content, thoughts, calls, reason


@pytest.mark.parametrize("parser", WRITTEN)
def test_calls_whole_and_streamed(parser: str) -> None:
    app = Scripted(WRITTEN[parser], tool_call_parser=parser)
    choice = app.chat(tools=TOOLS)["choices"][0]
    calls = [c["function"] for c in choice["message"]["tool_calls"]]
    assert [(c["name"], json.loads(c["arguments"])) for c in calls] == [("weather", {"city": "Rome"}), ("news", {"city": "Oslo"})]
    assert choice["finish_reason"] == "tool_calls"
    assert choice["message"]["content"] == ("Let me look." if parser == "hermes" else None)
    assert len({c["id"] for c in choice["message"]["tool_calls"]}) == 2
    content, _, streamed, reason = gathered(app.chat_events(tools=TOOLS))
    assert [{"name": c["name"], "arguments": c["arguments"]} for c in streamed] == calls and reason == "tool_calls"
    assert content == (choice["message"]["content"] or "")


def test_one_call_where_several_are_not_wanted() -> None:
    app = Scripted(WRITTEN["hermes"], tool_call_parser="hermes")
    assert len(app.chat(tools=TOOLS, parallel_tool_calls=False)["choices"][0]["message"]["tool_calls"]) == 1
    assert len(gathered(app.chat_events(tools=TOOLS, parallel_tool_calls=False))[2]) == 1


def test_text_without_calls_stays_text() -> None:
    app = Scripted("The weather is {fine}.")  # the demo model is of the Llama family
    choice = app.chat(tools=TOOLS)["choices"][0]
    assert choice["message"]["content"] == "The weather is {fine}." and choice["finish_reason"] == "stop"
    assert "tool_calls" not in choice["message"]
    written = Scripted(WRITTEN["llama3_json"])
    assert written.chat(tools=TOOLS, tool_choice="none")["choices"][0]["message"]["content"] == WRITTEN["llama3_json"]
    assert written.chat()["choices"][0]["message"]["content"] == WRITTEN["llama3_json"]


def test_special_tokens_are_read_only_where_they_mark_calls() -> None:
    app = Scripted(WRITTEN["mistral"], tool_call_parser="mistral")
    app.chat(tools=TOOLS)
    app.chat()
    assert [job.sampling.skip_special_tokens for job in app.engine.jobs] == [False, True]


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"tool_choice": "auto"}, "tool_choice"),
        ({"tool_choice": "required"}, "tool_choice"),
        ({"tools": TOOLS, "tool_choice": {"type": "function", "function": {"name": "x"}}}, "tool_choice"),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools.0.function.name"),
        ({"tools": [{"type": "browser"}]}, "tools.0.type"),
        ({"tools": TOOLS * 65}, "tools"),
        ({"functions": [{"name": "x"}]}, "functions"),
    ],
)
def test_tools_that_cannot_be(body: dict[str, Any], param: str) -> None:
    answer = Scripted("x").post("/v1/chat/completions", messages=[{"role": "user", "content": "hi"}], **body)
    assert answer.status_code == 400 and answer.json()["error"]["param"] == param, answer.text


def test_auto_may_be_off() -> None:
    app = Scripted("x", enable_auto_tool_choice=False)
    answer = app.post("/v1/chat/completions", messages=[{"role": "user", "content": "hi"}], tools=TOOLS)
    assert answer.status_code == 400 and "--no-enable-auto-tool-choice" in answer.text


def test_imposed_calls_are_read_from_bare_json(monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []
    monkeypatch.setattr("lockstep.server.sampling._structured", asked.append)
    monkeypatch.setattr("lockstep.server.sampling.SamplingParams", lambda structured_outputs, **given: SamplingParams(**given))
    app = Scripted(ROME)
    chosen = {"type": "function", "function": {"name": "weather"}}
    choice = app.chat(tools=TOOLS, tool_choice=chosen)["choices"][0]
    assert choice["message"]["tool_calls"][0]["function"] == {"name": "weather", "arguments": ROME} and choice["finish_reason"] == "stop"
    parameters = TOOLS[0]["function"]["parameters"]  # type: ignore[index]
    assert asked == [{"json": parameters, "disable_any_whitespace": True}]
    app.engine.text = f'[{{"name": "news", "parameters": {OSLO}}}]'
    content, _, calls, reason = gathered(app.chat_events(tools=TOOLS, tool_choice="required"))
    assert [(c["name"], c["arguments"]) for c in calls] == [("news", OSLO)] and reason == "tool_calls" and not content
    assert asked[1]["json"]["type"] == "array"


def test_thoughts_are_told_apart() -> None:
    app = Scripted("<think>\nHm, Rome?\n</think>\n\nIt rains.", reasoning_parser="qwen3")
    message = app.chat()["choices"][0]["message"]
    assert message["reasoning_content"] == "Hm, Rome?" and message["content"] == "It rains."
    assert gathered(app.chat_events())[:2] == ("It rains.", "Hm, Rome?")
    assert "reasoning_content" not in app.chat(include_reasoning=False)["choices"][0]["message"]
    assert gathered(app.chat_events(include_reasoning=False))[:2] == ("It rains.", "")
    both = Scripted("<think>Rome</think>" + WRITTEN["hermes"], reasoning_parser="deepseek_r1", tool_call_parser="hermes")
    content, thoughts, calls, _ = gathered(both.chat_events(tools=TOOLS))
    assert (content, thoughts, len(calls)) == ("Let me look.", "Rome", 2)


def test_a_failure_in_the_middle_of_a_stream_is_an_event() -> None:
    app = Scripted("some words", error="rank 1 is gone")
    events = app.chat_events()
    assert events[-1]["error"]["message"] == "rank 1 is gone" and events[-1]["error"]["type"] == "server_error"
    whole = app.post("/v1/chat/completions", messages=[{"role": "user", "content": "hi"}])
    assert whole.status_code == 503 and whole.json()["error"]["message"] == "rank 1 is gone"
    assert set(app.engine.aborted) == {job.request_id for job in app.engine.jobs}


def test_function_calls_of_responses() -> None:
    app = Scripted(WRITTEN["hermes"], tool_call_parser="hermes")
    tools = [{"type": "function", **tool["function"]} for tool in TOOLS]  # type: ignore[dict-item]
    output = app.post("/v1/responses", input="hi", tools=tools).json()["output"]
    assert [item["type"] for item in output] == ["message", "function_call", "function_call"]
    assert output[1]["name"] == "weather" and json.loads(output[1]["arguments"]) == {"city": "Rome"}
    came = {"type": "function_call_output", "call_id": output[1]["call_id"], "output": "rain"}
    again = app.post("/v1/responses", input=[{"role": "user", "content": "hi"}, output[1], came], tools=tools)
    assert again.status_code == 200, again.text
    app.engine.text = "<think>hm</think>"
    assert app.post("/v1/responses", input=[{"type": "image"}]).status_code == 400
