"""Every parameter out of range is refused by name; every edge that is allowed is allowed."""

import msgspec
import pytest

from lockstep.protocol import SamplingParams, StructuredOutputs

BAD = [
    ("n", 0), ("n", 65), ("n", 1.5), ("n", True), ("temperature", -0.1), ("temperature", float("nan")), ("temperature", 101),
    ("top_p", 0), ("top_p", 1.1), ("top_k", -2), ("min_p", -0.1), ("min_p", 1.1), ("seed", 2**63), ("seed", 1.0),
    ("stop", [""]), ("stop", [1]), ("stop_token_ids", [-1]), ("stop_token_ids", 3), ("max_tokens", 0), ("max_tokens", 1.0),
    ("min_tokens", -1), ("min_tokens", 17), ("logprobs", 129), ("logprobs", -1), ("prompt_logprobs", "a"),
    ("repetition_penalty", 0), ("presence_penalty", 2.1), ("frequency_penalty", -2.1), ("logit_bias", {1: 101}),
    ("logit_bias", {-1: 1}), ("allowed_token_ids", []), ("allowed_token_ids", [-1]), ("bad_words", [""]),
    ("structured_outputs", {"regex": "a"}),
]  # fmt: skip
GOOD = [
    {"temperature": 0}, {"top_p": 1}, {"top_k": -1}, {"min_p": 1}, {"seed": -(2**63)}, {"stop": "a"}, {"max_tokens": None},
    {"min_tokens": 16}, {"logprobs": 0}, {"logit_bias": {5: -100}}, {"n": 64}, {"max_tokens": None, "min_tokens": 4000},
]  # fmt: skip


@pytest.mark.parametrize("name,value", BAD)
def test_a_bad_value_is_refused_by_name(name, value):
    with pytest.raises(ValueError, match=rf"{name}=.* is invalid: it must be "):
        SamplingParams(**{name: value})


@pytest.mark.parametrize("kwargs", GOOD)
def test_the_edges_are_allowed_and_survive_the_wire(kwargs):
    params = SamplingParams(**kwargs)
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params


def test_a_stop_string_is_a_list_of_one_and_minus_one_turns_top_k_off():
    params = SamplingParams(stop="end", top_k=-1)
    assert params.stop == ["end"] and params.top_k == 0


def test_greedy_means_temperature_zero():
    assert SamplingParams(temperature=0).greedy and not SamplingParams().greedy


@pytest.mark.parametrize(
    "fields,said",
    [
        ({}, "has no constraint: give exactly one of json, regex, choice, grammar, json_object"),
        ({"json_object": False}, "has no constraint"),
        ({"regex": "a", "choice": ["b"]}, "exactly one of"),
        ({"json": 3}, "json=3 is invalid: it must be a JSON schema"),
        ({"regex": ""}, "regex='' is invalid"),
        ({"choice": []}, "choice=.* is invalid"),
        ({"choice": [""]}, "choice=.* is invalid"),
        ({"grammar": ""}, "grammar='' is invalid"),
        ({"regex": "a", "disable_any_whitespace": True}, "that is for json and json_object"),
        ({"json_object": True, "disable_any_whitespace": True, "whitespace_pattern": " "}, "give one of them"),
    ],
)
def test_structured_outputs_are_one_well_formed_constraint(fields, said):
    with pytest.raises(ValueError, match=said):
        StructuredOutputs(**fields)


@pytest.mark.parametrize(
    "fields", [{"json": {}}, {"json": "{}"}, {"regex": "a+"}, {"choice": ["a"]}, {"grammar": "start: /a/"}, {"json_object": True}]
)
def test_structured_outputs_survive_the_wire(fields):
    params = SamplingParams(structured_outputs=StructuredOutputs(**fields))
    assert msgspec.msgpack.decode(msgspec.msgpack.encode(params), type=SamplingParams) == params
