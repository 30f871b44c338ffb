"""Small bodies that would be expensive: what is wrong a million times is refused once."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest
from pydantic import ValidationError

from lockstep.server.schemas.completions import CompletionRequest
from lockstep.server.schemas.embeddings import EmbeddingRequest


def test_a_list_of_wrong_elements_costs_next_to_nothing_in_every_field() -> None:
    child = subprocess.run([sys.executable, "-m", "tests.server.wide_bodies"], capture_output=True, text=True, timeout=100, check=False)
    assert child.returncode == 0, child.stderr[-2000:]
    found = json.loads(child.stdout)
    for name in ("EmbeddingRequest.input[]", "ChatRequest.messages[].content", "ResponsesRequest.metadata", "DetokenizeRequest.tokens"):
        assert name in found["places"]
    assert found["most_errors"] <= 100, found["where"]
    assert found["grown_mb"] < 100, found


@pytest.mark.parametrize(
    ("prompt", "said"),
    [
        ([1] * ((1 << 20) + 1), "it has 1048577 token ids, more than 1048576"),
        (["x"] * 257, "it has 257 prompts: at most 256"),
        ([None] * 300, "it has 300 prompts: at most 256"),
        ([], "and not empty: from 1 to 256"),
        (["x", 1], "nothing mixed"),
        ([1, True], "nothing mixed"),
        ([[1], "x"], "nothing mixed"),
        ([[1, None]], "nothing mixed"),
        ([[1], []], "an empty prompt, number 1 from 0 on"),
        ({}, "text, a list of texts"),
    ],
)
def test_a_prompt_of_no_kind_is_told_in_one_sentence(prompt: object, said: str) -> None:
    with pytest.raises(ValidationError) as found:
        CompletionRequest.model_validate({"prompt": prompt})
    assert [said in one["msg"] for one in found.value.errors()] == [True]


def test_every_input_of_embeddings_that_the_route_takes_passes() -> None:
    for given, count in (("x", 1), ([1, 2], 1), (["x"] * 2048, 2048), ([[1], [2]], 2)):
        assert len(EmbeddingRequest.model_validate({"input": given}).prompts()) == count
    with pytest.raises(ValidationError, match="at most 2048"):
        EmbeddingRequest.model_validate({"input": [[1]] * 2049})
