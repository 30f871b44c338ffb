"""What people get wrong, and what they are told: a real server's answers."""

from __future__ import annotations

import json
import re
from typing import Any

import httpx
import pytest

from lockstep.server.routes.web import POLICY

DIGITS = {"prompt": "a", "max_tokens": 8, "temperature": 0}
HI = [{"role": "user", "content": "hi"}]


def error(http: httpx.Client, path: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    base = {"prompt": "a", "max_tokens": 2} if path == "/v1/completions" else {"messages": HI, "max_tokens": 2}
    answer = http.post(path, json=base | body)
    assert answer.status_code == 400, answer.text
    return dict(answer.json()["error"])


@pytest.mark.parametrize(
    ("body", "param", "says"),
    [
        ({"logit_bias": {"99999999": 1}}, "logit_bias", "outside the vocabulary"),
        ({"structured_outputs": {"regex": "(a"}}, "structured_outputs", "the regex is invalid: unclosed group"),
        ({"guided_regex": "(a"}, "structured_outputs", "the regex is invalid"),
        ({"response_format": {"type": "json_schema", "json_schema": {"name": "a", "schema": {"type": "foo"}}}}, "response_format", "foo"),
        ({"structured_outputs": {"grammar": 'root ::= "a"'}}, "structured_outputs", "Lark's syntax, from the rule `start`"),
        ({"seed": 2**63}, "seed", "the whole number 9223372036854775808 is out of range"),
        ({"seed": 10**30}, "seed", f"the whole number 1{'0' * 23}... is out of range"),
        ({"data_parallel_rank": 7}, "data_parallel_rank", "does not exist"),
        ({"stop": [str(i) for i in range(17)]}, "stop", "at most 16"),
        ({"stream_options": {"include_usage": True}}, "stream_options", "stream=true"),
        ({"prompt": []}, "prompt", "not empty"),
    ],
)
def test_the_field_that_is_wrong_is_named(http: httpx.Client, body: dict[str, Any], param: str, says: str) -> None:
    found = error(http, **body)
    assert found["param"] == param and says in found["message"]
    assert "start:" not in found["message"], "the grammar that a regex becomes is ours"


WRONG = {"type": "json_schema", "name": "a", "schema": {"type": "foo"}}
MULTIPLES = {"anyOf": [{"type": "integer", "multipleOf": 4999}, {"type": "integer", "multipleOf": 4993}]}
TOOL = {"name": "f", "parameters": {"type": "foo"}}


@pytest.mark.parametrize(
    ("path", "body", "param"),
    [
        ("/v1/completions", {"prompt": "a", "response_format": {"type": "json_schema", "json_schema": WRONG}}, "response_format"),
        ("/v1/chat/completions", {"messages": HI, "response_format": {"type": "json_schema", "json_schema": WRONG}}, "response_format"),
        ("/v1/chat/completions", {"messages": HI, "tools": [{"function": TOOL}], "tool_choice": "required"}, "tools"),
        ("/v1/responses", {"input": "a", "text": {"format": WRONG}}, "text.format"),
        ("/v1/responses", {"input": "a", "tools": [{"type": "function", **TOOL}], "tool_choice": "required"}, "tools"),
        ("/generate", {"text": "a", "sampling_params": {"regex": "(a"}}, "sampling_params.regex"),
        ("/generate", {"text": "a", "sampling_params": {"ebnf": "root ::= x"}}, "sampling_params.ebnf"),
        (
            "/v1/completions",
            {"prompt": "a", "response_format": {"type": "json_schema", "json_schema": {"schema": MULTIPLES}}},
            "response_format",
        ),
    ],
)
def test_a_shape_that_cannot_be_is_told_of_the_field_that_was_given(
    http: httpx.Client, path: str, body: dict[str, Any], param: str
) -> None:
    answer = http.post(path, json=body)
    assert answer.status_code == 400, answer.text
    found = answer.json()["error"]
    assert found["param"] == param and found["message"].startswith(f"{param} ") and "structured_outputs" not in found["message"]


@pytest.mark.parametrize(
    ("path", "body", "status", "param"),
    [
        ("/v1/responses", {"input": "a", "previous_response_id": "resp_none"}, 404, "previous_response_id"),
        ("/v1/responses", {"input": "a", "echo": True}, 400, "echo"),
        ("/v1/responses", {"input": "a", "suffix": "b"}, 400, "suffix"),
        ("/v1/chat/completions", {"messages": HI, "echo": True}, 400, "echo"),
        ("/v1/chat/completions", {"messages": HI, "max_tokens": 1, "echo": False}, 200, None),
    ],
)
def test_what_would_be_ignored_is_refused_by_its_name(
    http: httpx.Client, path: str, body: dict[str, Any], status: int, param: str | None
) -> None:
    answer = http.post(path, json=body)
    assert answer.status_code == status and answer.json().get("error", {}).get("param") == param, answer.text


@pytest.mark.parametrize(
    ("message", "says"),
    [
        ({"role": "foo", "content": "a"}, "'user'"),
        ({"role": "user"}, "needs content"),
        ({"role": "assistant", "content": None}, "needs content, or tool_calls"),
    ],
)
def test_messages_that_say_nothing_are_refused(http: httpx.Client, message: dict[str, Any], says: str) -> None:
    found = error(http, "/v1/chat/completions", messages=[*HI, message])
    assert found["param"].startswith("messages.1") and says in found["message"]


def test_a_call_needs_no_content(http: httpx.Client) -> None:
    call = {"role": "assistant", "tool_calls": [{"id": "1", "type": "function", "function": {"name": "f", "arguments": "{}"}}]}
    messages = [*HI, call, {"role": "tool", "tool_call_id": "1", "content": "2"}]
    assert http.post("/v1/chat/completions", json={"messages": messages, "max_tokens": 1}).status_code == 200


@pytest.mark.parametrize(
    ("given", "pattern"),
    [
        ({"guided_regex": "[0-9]{3}"}, "[0-9]{3}"),
        ({"guided_choice": ["yes", "no"]}, "yes|no"),
        ({"guided_json": {"type": "boolean"}}, "true|false"),
        ({"guided_grammar": 'start: "x" "y"'}, "xy"),
    ],
)
def test_the_old_names_of_structured_outputs_hold(http: httpx.Client, given: dict[str, Any], pattern: str) -> None:
    answer = http.post("/v1/completions", json=DIGITS | {"max_tokens": 16} | given).json()
    assert re.fullmatch(pattern, answer["choices"][0]["text"]), answer


def test_both_names_at_once_are_refused(http: httpx.Client) -> None:
    assert "leave one out" in error(http, guided_regex="a", structured_outputs={"regex": "b"})["message"]


def test_a_body_that_is_not_said_to_be_json(http: httpx.Client) -> None:
    answer = http.post("/v1/completions", content=json.dumps(DIGITS))
    assert answer.status_code == 400 and "Content-Type: application/json" in answer.json()["error"]["message"]


def test_half_a_surrogate_pair(http: httpx.Client) -> None:
    answer = http.post("/v1/completions", content=rb'{"prompt": "a\ud83d"}', headers={"Content-Type": "application/json"})
    assert answer.status_code == 400 and "half of a surrogate pair" in answer.json()["error"]["message"]


def test_a_forced_call_has_no_room_for_spaces(http: httpx.Client) -> None:
    schema = {"type": "object", "properties": {"a": {"type": "boolean"}}, "required": ["a"], "additionalProperties": False}
    function = {"name": "f", "parameters": schema}
    body = {"messages": HI, "max_tokens": 64, "tools": [{"type": "function", "function": function}], "tool_choice": "required"}
    # the model would write spaces for ever: no token is likelier
    space = http.post("/tokenize", json={"prompt": " "}).json()["tokens"]
    answer = http.post("/v1/chat/completions", json=body | {"logit_bias": {str(space[0]): 50}, "parallel_tool_calls": False}).json()
    (call,) = answer["choices"][0]["message"]["tool_calls"]
    assert json.loads(call["function"]["arguments"]) in ({"a": True}, {"a": False})
    assert call["function"]["arguments"].count(" ") <= 1


def test_a_profile_is_started_and_stopped_once(http: httpx.Client) -> None:
    assert http.post("/stop_profile").status_code == 409
    assert http.post("/start_profile").status_code == 200
    again = http.post("/start_profile")
    assert again.status_code == 409 and "already" in again.json()["error"]["message"]
    assert http.post("/stop_profile").status_code == 200
    assert http.post("/stop_profile").json()["error"]["code"] == "conflict"


def test_the_page_of_routes_needs_no_other_host(http: httpx.Client) -> None:
    answer = http.get("/docs")
    assert answer.status_code == 200 and answer.headers["content-security-policy"] == POLICY
    for path in http.get("/openapi.json").json()["paths"]:
        assert f"<code>{path}</code>" in answer.text
    assert "<script" not in answer.text and "//" not in answer.text
    for name in re.findall(r'(?:href)="([^"]+)"', answer.text):
        assert f'id="{name[1:]}"' in answer.text if name[0] == "#" else http.get(f"/{name}").status_code == 200
    for field, kind, default in (
        ("prompt", "string or list", "needed"),
        ("top_p", "above 0, to 1", "null"),
        ("max_tokens", "integer", ">16<"),
    ):
        row = next(one for one in answer.text.splitlines() if f"<td><code>{field}</code>" in one and default in one)
        assert kind in row
    again = http.get("/redoc")  # its other name in the ecosystem
    assert again.text == answer.text and again.headers["content-security-policy"] == POLICY
