"""Constraints at the door: what can be kept to is let in, everything else is refused with its reason, however it is disguised."""

from __future__ import annotations

import threading
from typing import Any

import pytest

from lockstep.frontend.errors import PromptError
from lockstep.frontend.structured import REMEMBERED, StructuredChecker
from lockstep.grammar import bounds, compiled
from lockstep.grammar.bounds import GrammarError
from lockstep.protocol import StructuredOutputs

DOUBLING = "start: A0\n" + "\n".join(f"A{i}: A{i + 1} A{i + 1}" for i in range(40)) + '\nA40: "x"\n'


def nested(depth: int) -> dict[str, Any]:
    schema: dict[str, Any] = {"type": "integer"}
    for _ in range(depth):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


@pytest.mark.parametrize(
    "fields",
    [
        {"json": {"type": "object", "properties": {"a": {"type": "string"}}, "required": ["a"]}},
        {"json": '{"type": "integer", "minimum": 3}'},
        {"json": {}},
        {"json": "true"},
        {"json": nested(50)},
        {"json": {"type": "number", "multipleOf": 0.01}},
        {"json": {"$defs": {"n": {"properties": {"c": {"items": {"$ref": "#/$defs/n"}}}}}, "$ref": "#/$defs/n"}},
        {"json": {"properties": {"multipleOf": {"type": "integer"}}}},  # a property of that name is none
        {"json_object": True},
        {"json_object": True, "disable_any_whitespace": True},
        {"json_object": True, "whitespace_pattern": " ?"},
        {"regex": r"a/b\/[\d/]"},
        {"regex": r"[a-z]+@\w{2,5}\.(com|org)"},
        {"choice": ["a", "ab", 'quo"te\\', "line\nbreak", "\x01", "😀", "</s>", "{x}"]},
        {"grammar": 'start: "a" b*\nb: /[0-9]/'},
        {"grammar": 'start: <|im_end|> "a"'},  # a special token, which only the model's tokenizer knows
    ],
)
def test_what_can_be_kept_to_is_let_in(fields: dict[str, Any]) -> None:
    compiled.check(StructuredOutputs(**fields))


@pytest.mark.parametrize(
    "fields,said",
    [
        ({"json": "{"}, "is no JSON"),
        ({"json": {"enum": [float("nan")]}}, "is no JSON"),
        ({"json": {"enum": [object()]}}, "is no JSON"),
        ({"json": "[]"}, "is a list"),
        ({"json": "false"}, "is a bool"),
        ({"json": {"type": "strin"}}, "strin"),
        ({"json": {"not": {}}}, "not"),
        ({"json": {"$ref": "#"}}, "no text at all"),
        ({"json": {"$ref": "http://127.0.0.1:9/schema"}}, "127.0.0.1:9"),  # nothing is fetched
        ({"json": {"$ref": "file:///etc/hostname"}}, "etc/hostname"),
        ({"json": nested(70)}, "nested"),
        ({"json": '{"a":' * 5000 + "1" + "}" * 5000}, "is no JSON"),
        ({"json": {"enum": ["x" * bounds.MAX_BYTES]}}, f"over {bounds.MAX_BYTES}"),
        ({"json": {"type": "integer", "multipleOf": 98765}}, "98765"),
        ({"json": '{"type": "integer", "multip\\u006ceOf": 98765}'}, "98765"),
        ({"json": {"type": "integer", "allOf": [{"multipleOf": 997}, {"multipleOf": 991}]}}, str(997 * 991)),
        ({"json": {"type": "integer", "multipleOf": 10**30 + 1}}, "multiple"),
        ({"json": {"allOf": [{"anyOf": [{"properties": {f"p{i}{j}": {}}} for j in range(3)]} for i in range(12)]}}, "too large"),
        ({"json_object": True, "whitespace_pattern": "("}, "regex"),
        ({"json_object": True, "whitespace_pattern": "a" * 9000}, "whitespace_pattern has 9000 bytes"),
        ({"regex": "a(b"}, "unclosed group"),
        ({"regex": "(?=x)a"}, "look-ahead"),
        ({"regex": r"(a)\1"}, "backreferences"),
        ({"regex": "a" * 9000}, "regex has 9000 bytes"),
        ({"regex": "(" * 4000 + "a" + ")" * 4000}, "."),
        ({"choice": ["a" * 40000, "b" * 40000]}, "choice has 80000 bytes"),
        ({"choice": ["\ud800"]}, "surrogate"),
        ({"grammar": 'start: "a" foo'}, "foo"),
        ({"grammar": "root ::= x"}, "."),
        ({"grammar": DOUBLING}, "too big"),
        ({"grammar": "start: " + "(" * 500 + '"a"' + ")" * 500}, "nested"),
        ({"grammar": 'start: % json {"multipleOf": 98765}'}, "as json instead"),
    ],
)
def test_what_cannot_is_refused_with_the_reason(fields: dict[str, Any], said: str) -> None:
    with pytest.raises(GrammarError, match="(?s)" + said) as caught:
        compiled.check(StructuredOutputs(**fields))
    assert 8 < len(str(caught.value)) < 600


def test_a_panic_of_the_library_is_an_error_of_this_request() -> None:
    class Panic(BaseException):
        pass

    with pytest.raises(GrammarError, match="oops"), compiled.guarded():
        raise Panic("oops")
    with pytest.raises(KeyboardInterrupt), compiled.guarded():
        raise KeyboardInterrupt


def test_verdicts_are_remembered_and_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[str] = []

    def check(wanted: StructuredOutputs) -> None:
        tried.append(str(wanted.regex))
        if wanted.regex == "bad":
            raise GrammarError("it is bad.")

    monkeypatch.setattr("lockstep.frontend.structured.check", check)
    checker = StructuredChecker()
    for _ in range(3):
        checker.check(StructuredOutputs(regex="good"))
        with pytest.raises(PromptError, match="it is bad"):
            checker.check(StructuredOutputs(regex="bad"))
    assert tried == ["good", "bad"] and checker.knows(StructuredOutputs(regex="bad"))
    for i in range(REMEMBERED):
        checker.check(StructuredOutputs(regex=f"x{i}"))
    assert not checker.knows(StructuredOutputs(regex="good")) and len(checker._verdicts) == REMEMBERED


def test_one_grammar_asked_for_by_many_threads_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    tried: list[int] = []
    gate = threading.Event()

    def check(wanted: StructuredOutputs) -> None:
        tried.append(1)
        gate.wait(10)

    monkeypatch.setattr("lockstep.frontend.structured.check", check)
    checker = StructuredChecker()
    threads = [threading.Thread(target=checker.check, args=(StructuredOutputs(regex="a"),)) for _ in range(4)]
    for thread in threads:
        thread.start()
    gate.set()
    for thread in threads:
        thread.join(10)
    assert len(tried) == 1
