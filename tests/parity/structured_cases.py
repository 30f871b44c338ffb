"""Requests whose outputs must look like something, and what says that they do."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any

import jsonschema

from lockstep import SamplingParams, StructuredOutputs
from lockstep.frontend.outputs import RequestOutput

PERSON = {
    "type": "object",
    "properties": {
        "name": {"type": "string", "minLength": 1, "maxLength": 6},
        "age": {"type": "integer", "minimum": 0, "maximum": 130},
        "tags": {"type": "array", "items": {"enum": ["a", 'b"c', 3, None]}, "minItems": 1, "maxItems": 3},
    },
    "required": ["name", "age", "tags"],
    "additionalProperties": False,
}
TREE = {
    "$defs": {
        "leaf": {"type": "object", "properties": {"leaf": {"type": "boolean"}}, "required": ["leaf"], "additionalProperties": False},
        "pair": {
            "type": "array",
            "prefixItems": [{"$ref": "#/$defs/leaf"}, {"type": "null"}],
            "minItems": 2,
            "maxItems": 2,
            "items": False,
        },
    },
    "anyOf": [{"$ref": "#/$defs/leaf"}, {"$ref": "#/$defs/pair"}],
}
CODE = {"type": "string", "pattern": "^[A-Z]{2}-[0-9]{3}$"}
AMOUNT = {"type": "number", "minimum": -5, "maximum": 7.25}
SCHEMAS: dict[str, Any] = {"person": PERSON, "tree": TREE, "code": CODE, "amount": AMOUNT}
PATTERN = r"[a-f]{4}-\d{2,6}(/(up|down))?"
CHOICES = ["red", "reddish", "green\n", 'b"l\\ue']
GRAMMAR = 'start: item ("," item){0,3} ";"\nitem: "x" | "(" item ")"\n'


def fits_schema(schema: Any) -> Callable[[str], bool]:
    def fits(text: str) -> bool:
        jsonschema.Draft202012Validator(schema).validate(json.loads(text))
        return True

    return fits


def _fits_grammar(text: str) -> bool:
    body, end = text[:-1], text[-1:]
    plain = all(re.fullmatch(r"\(*x\)*", item) and item.count("(") == item.count(")") for item in body.split(","))
    return end == ";" and plain and body.count(",") <= 3


CASES: dict[str, tuple[StructuredOutputs, Callable[[str], Any]]] = {
    **{name: (StructuredOutputs(json=schema), fits_schema(schema)) for name, schema in SCHEMAS.items()},
    "person as text, without spaces": (
        StructuredOutputs(json=json.dumps(PERSON), disable_any_whitespace=True),
        lambda text: fits_schema(PERSON)(text) and json.dumps(json.loads(text), separators=(",", ":"), ensure_ascii=False) == text,
    ),
    "regex": (StructuredOutputs(regex=PATTERN), lambda text: re.fullmatch(PATTERN, text, re.ASCII)),
    "choice": (StructuredOutputs(choice=CHOICES), lambda text: text in CHOICES),
    "grammar": (StructuredOutputs(grammar=GRAMMAR), _fits_grammar),
}


def params(name: str, **sampling: Any) -> SamplingParams:
    return SamplingParams(**({"max_tokens": 72} | sampling), structured_outputs=CASES[name][0])


def check(name: str, output: RequestOutput) -> bool:
    """Assert that an output which ended by itself fits. Whether it did end so: others were cut off at max_tokens."""
    (done,) = output.outputs
    assert done.finish_reason in ("stop", "length"), output.error
    if done.finish_reason == "stop":
        assert CASES[name][1](done.text), f"{name}: {done.text!r}"
    return done.finish_reason == "stop"
