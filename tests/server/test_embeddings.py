"""`/v1/embeddings` of a real server, as OpenAI's own client and plain HTTP see it."""

from __future__ import annotations

import base64
from collections.abc import Iterator

import httpx
import numpy as np
import openai
import pytest

from lockstep.testing.server import RunningServer, running_server

HIDDEN = 256  # of the demo model


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_server("--max-model-len", "64") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[openai.OpenAI]:
    with openai.OpenAI(base_url=server.url + "/v1", api_key="none", max_retries=0) as made:
        yield made


def post(server: RunningServer, **body: object) -> httpx.Response:
    return httpx.post(server.url + "/v1/embeddings", json=body, timeout=60)


def vectors(response: httpx.Response) -> list[list[float]]:
    assert response.status_code == 200, response.text
    data = response.json()["data"]
    assert [one["index"] for one in data] == list(range(len(data)))
    return [one["embedding"] for one in data]


def test_openais_client_gets_vectors_of_length_one(client: openai.OpenAI) -> None:
    """It asks for base64 by itself, and decodes it."""
    found = client.embeddings.create(model="lockstep-demo", input=["def add(a, b):", "import os"])
    assert [len(one.embedding) for one in found.data] == [HIDDEN, HIDDEN]
    assert [np.linalg.norm(one.embedding) for one in found.data] == pytest.approx([1.0, 1.0], abs=1e-5)
    assert found.usage.prompt_tokens == found.usage.total_tokens > 0 and found.model == "lockstep-demo"


@pytest.mark.parametrize("pooling", ["last", "mean"])
def test_text_and_its_tokens_alone_or_in_company_have_the_same_vector(server: RunningServer, pooling: str) -> None:
    ids = [10, 20, 30, 40]
    alone = vectors(post(server, input=ids, pooling=pooling))
    several = vectors(post(server, input=[[7] * 50, ids, [9]], pooling=pooling))
    assert several[1] == alone[0] and several[0] != several[2]
    text = "def add(a, b):"
    assert vectors(post(server, input=[text], pooling=pooling)) == vectors(post(server, input=text, pooling=pooling))


def test_base64_has_the_numbers_of_the_list(server: RunningServer) -> None:
    plain = vectors(post(server, input="import os"))[0]
    packed = vectors(post(server, input="import os", encoding_format="base64"))[0]
    assert np.frombuffer(base64.b64decode(str(packed)), "<f4").tolist() == plain


def test_dimensions_cut_and_scale_again(server: RunningServer) -> None:
    whole = np.array(vectors(post(server, input="import os", normalize=False))[0])
    assert abs(np.linalg.norm(whole) - 1) > 1e-3, "the model's own vector is not of length 1"
    cut = np.array(vectors(post(server, input="import os", dimensions=16))[0])
    assert len(cut) == 16 and cut == pytest.approx(whole[:16] / np.linalg.norm(whole[:16]), abs=1e-6)


@pytest.mark.parametrize(
    "body,param,said",
    [
        ({"input": []}, "input", "from 1 to 2048"),
        ({"input": [[]]}, "input", "empty prompt"),
        ({"input": [[1], [999999]]}, "input", "input[1]: "),
        ({"input": [1] * 65}, "input", "max_model_len=64"),
        ({"input": "a", "dimensions": 257}, "dimensions", "from 1 to 256"),
        ({"input": "a", "dimensions": 0}, "dimensions", "from 1 to 256"),
        ({"input": "a", "pooling": "sum"}, "pooling", "last"),
        ({"input": "a", "encoding_format": "hex"}, "encoding_format", "base64"),
        ({"input": [True]}, None, ""),
        ({}, "input", "required"),
    ],
)
def test_what_cannot_be_is_refused_by_name(server: RunningServer, body: dict[str, object], param: str | None, said: str) -> None:
    answer = post(server, **body)
    assert answer.status_code == 400, answer.text
    error = answer.json()["error"]
    assert said in error["message"] and error["type"] == "invalid_request_error"
    assert param is None or error["param"] == param


def test_a_prompt_may_fill_the_whole_context(server: RunningServer) -> None:
    assert len(vectors(post(server, input=[5] * 64, pooling="mean"))[0]) == HIDDEN
    assert len(vectors(post(server, input=[5] * 64))[0]) == HIDDEN


def test_another_model_is_not_found(server: RunningServer) -> None:
    assert post(server, input="a", model="other").status_code == 404
