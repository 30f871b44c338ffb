"""Tool-call and reasoning parsers: what each format means, and that it means the same however the text is cut."""

from __future__ import annotations

import json
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from lockstep.frontend.reasoning import REASONING, Thinking
from lockstep.frontend.tools import PARSERS, Named, Required, ToolParser, family_parser, list_schema

NAMES = frozenset({"add", "weather"})
Result = tuple[str, list[tuple[str | None, str]]]


def read(parser: ToolParser, pieces: Sequence[str]) -> Result:
    """(content, [(name, arguments)]) of all deltas together; asserts that they are well formed."""
    content, calls = "", list[tuple[str | None, str]]()
    for parsed in [*map(parser.feed, pieces), parser.finish()]:
        content += parsed.content
        for call in parsed.calls:
            index, name, arguments = call.index, call.name, call.arguments
            if name is not None:
                assert index == len(calls), "calls are numbered as they come, and named once"
                calls.append((name, ""))
            assert index == len(calls) - 1
            calls[index] = (calls[index][0], calls[index][1] + arguments)
    return content, calls


def make(name: str) -> ToolParser:
    return {**PARSERS, "required": Required, "named": lambda names: Named("add")}[name](NAMES)


ADD = ("add", '{"a": 1, "b": "x}]\\" \\u00e9 [{"}')
NOW = ("weather", "{}")
ADD_TEXT = '{"name": "add", "arguments": ' + ADD[1] + "}"
CASES: list[tuple[str, str, Result]] = [
    ("hermes", "Just words, 1 < 2 <tool", ("Just words, 1 < 2 <tool", [])),
    ("hermes", f"Let me see.\n<tool_call>\n{ADD_TEXT}\n</tool_call>", ("Let me see.", [ADD])),
    ("hermes", f'<tool_call>{ADD_TEXT}</tool_call>\n<tool_call>{{"name": "weather"}}</tool_call>\n', ("", [ADD, NOW])),
    ("hermes", '<tool_call>{"arguments": {"c": [1, {}]}, "name": "other"}</tool_call>', ("", [("other", '{"c": [1, {}]}')])),
    ("hermes", "<tool_call>no call</tool_call> x", ("<tool_call>no call</tool_call> x", [])),
    ("hermes", '<tool_call>{"name": "add", "arguments": {"a": 1', ("", [("add", '{"a": 1')])),
    ("hermes", '<tool_call>{"name": "add", "argu', ('<tool_call>{"name": "add", "argu', [])),
    ("hermes", '<tool_call>{"name": "add", "arguments": "{\\"a\\": 1}"}</tool_call>', ("", [("add", '{"a": 1}')])),
    ("hermes", '<tool_call>{"name": 3, "arguments": {}}</tool_call>', ('<tool_call>{"name": 3, "arguments": {}}</tool_call>', [])),
    ("hermes", '<tool_call>{"name": "add", "arguments": null, "x": 12}', ("", [("add", "{}")])),
    ("llama3_json", '{"name": "add", "parameters": {"a": 1}}', ("", [("add", '{"a": 1}')])),
    ("llama3_json", f'<|python_tag|>{ADD_TEXT}; {{"name": "weather", "parameters": {{}}}}', ("", [ADD, NOW])),
    ("llama3_json", '  {"name": "Bob", "age": 3}', ('  {"name": "Bob", "age": 3}', [])),
    ("llama3_json", '{"a": {"b": 1}}', ('{"a": {"b": 1}}', [])),
    ("llama3_json", "{not json", ("{not json", [])),
    ("llama3_json", "The answer {is}", ("The answer {is}", [])),
    ("llama3_json", "<|python_tag|>print(1)", ("print(1)", [])),
    ("llama3_json", " \n", (" \n", [])),
    ("mistral", f'[TOOL_CALLS] [{ADD_TEXT}, {{"name": "weather", "arguments": {{}}}}]', ("", [ADD, NOW])),
    ("mistral", f"Sure. [TOOL_CALLS]add{ADD[1]}[TOOL_CALLS]weather{{}}", ("Sure.", [ADD, NOW])),
    ("mistral", f"[TOOL_CALLS]add[CALL_ID]123456789[ARGS]{ADD[1]}", ("", [ADD])),
    ("mistral", "[TOOL_CALLS] [3]", ("[TOOL_CALLS][3]", [])),
    ("mistral", "[TOOL_CALLS]add", ("[TOOL_CALLS]add", [])),
    ("mistral", "a [TOOL b", ("a [TOOL b", [])),
    ("pythonic", '[add(a=1, b="x)]\\""), weather()]', ("", [("add", '{"a": 1, "b": "x)]\\""}'), NOW])),
    ("pythonic", "<|python_start|>[add(a=[1, {'k': None}], b=true)]<|python_end|>", ("", [("add", '{"a": [1, {"k": null}], "b": true}')])),
    ("pythonic", "[1, 2] is a list", ("[1, 2] is a list", [])),
    ("pythonic", "[rm(path='/')]", ("[rm(path='/')]", [])),
    ("pythonic", "[add(__import__('os'))]", ("[add(__import__('os'))]", [])),
    ("pythonic", "[add(a=1", ("[add(a=1", [])),
    ("pythonic", "words [add(a=1)]", ("words [add(a=1)]", [])),
    ("required", f'[{ADD_TEXT}, {{"name": "weather", "parameters": {{}}}}]', ("", [ADD, NOW])),
    ("required", '[{"na', ('[{"na', [])),
    ("required", "no list", ("no list", [])),
    ("named", '{"a": 1}', ("", [("add", '{"a": 1}')])),
]


@pytest.mark.parametrize(("name", "text", "expected"), CASES)
def test_each_format_whole_and_character_by_character(name: str, text: str, expected: Result) -> None:
    assert read(make(name), [text]) == expected
    assert read(make(name), list(text)) == expected


PARTS = [
    "<tool_call>", "</tool_call>", "[TOOL_CALLS]", "<|python_tag|>", "<|python_start|>", "<|python_end|>", "[ARGS]", "<think>", "</think>",
    ADD_TEXT, '{"name": "weather", "parameters": {"x": "y"}}', '{"name": ', '"add"', '"arguments": ', "add(a=1)", "weather(", "[", "]", "{",
    "}", ",", ";", ":", '"', "'", "\\", " ", "\n", "null", "1", "é", "☃", "word",
]  # fmt: skip
TEXTS = st.lists(st.sampled_from(PARTS) | st.text(max_size=3), max_size=12).map("".join)
CUTS = st.lists(st.integers(1, 9), min_size=1, max_size=30)


def cut(text: str, sizes: list[int]) -> list[str]:
    pieces, at = list[str](), 0
    while at < len(text):
        size = sizes[len(pieces) % len(sizes)]
        pieces.append(text[at : at + size])
        at += size
    return pieces


@pytest.mark.parametrize("name", [*PARSERS, "required", "named"])
@settings(max_examples=300)
@given(text=TEXTS, sizes=CUTS)
def test_the_cut_does_not_matter(name: str, text: str, sizes: list[int]) -> None:
    assert read(make(name), cut(text, sizes)) == read(make(name), [text])


@pytest.mark.parametrize("inside", [False, True])
@settings(max_examples=300)
@given(text=TEXTS, sizes=CUTS)
def test_thoughts_do_not_depend_on_the_cut(inside: bool, text: str, sizes: list[int]) -> None:
    assert think(inside, cut(text, sizes)) == think(inside, [text])


def think(inside: bool, pieces: Sequence[str]) -> tuple[str, str]:
    thinking = Thinking(inside=inside)
    parts = [*map(thinking.feed, pieces), thinking.finish()]
    return "".join(p.reasoning for p in parts), "".join(p.content for p in parts)


@pytest.mark.parametrize(
    ("parser", "text", "expected"),
    [
        ("qwen3", "<think>\nhm, 1 < 2\n</think>\n\nYes.", ("hm, 1 < 2", "Yes.")),
        ("qwen3", "Yes. <think>no</think>", ("", "Yes. <think>no</think>")),
        ("qwen3", "<think>cut off", ("cut off", "")),
        ("qwen3", "<think></think>x", ("", "x")),
        ("deepseek_r1", "hm\n</think>\nYes.", ("hm", "Yes.")),
        ("deepseek_r1", "<think>hm</think>Yes.", ("hm", "Yes.")),
        ("deepseek_r1", "never an answer", ("never an answer", "")),
    ],
)
def test_thoughts(parser: str, text: str, expected: tuple[str, str]) -> None:
    assert think(REASONING[parser], [text]) == think(REASONING[parser], list(text)) == expected


def test_the_family_decides() -> None:
    assert family_parser("Qwen2ForCausalLM") == family_parser("Qwen3ForCausalLM") == "hermes"
    assert family_parser("LlamaForCausalLM") == "llama3_json"
    assert family_parser("MistralForCausalLM") == "mistral"
    assert family_parser("Gemma3ForCausalLM") == "pythonic"


def test_the_schema_of_required_calls() -> None:
    import jsonschema

    place = {"type": "object", "properties": {"at": {"$ref": "#/$defs/place"}}, "required": ["at"], "$defs": {"place": {"type": "string"}}}
    schema = list_schema([{"name": "add"}, {"name": "weather", "parameters": place}], several=False)
    jsonschema.validate([{"name": "weather", "parameters": {"at": "Rome"}}], schema)
    for wrong in ([], [{"name": "weather", "parameters": {}}], [{"name": "x", "parameters": {}}], [{"name": "add", "parameters": {}}] * 2):
        with pytest.raises(jsonschema.ValidationError):
            jsonschema.validate(json.loads(json.dumps(wrong)), schema)
    with pytest.raises(ValueError, match="place"):
        list_schema([{"name": "a", "parameters": place}, {"name": "b", "parameters": {**place, "$defs": {"place": {}}}}], several=True)
