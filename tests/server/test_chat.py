"""`/v1/chat/completions`, `/tokenize`, `/generate` and `/v1/models` of a real server, by raw HTTP."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import pytest

from lockstep import LLM, SamplingParams
from lockstep.testing.server import RunningServer, running_server
from tests.server.test_completions import events, refused

PATH = "/v1/chat/completions"
TALK = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Write a loop."}]
GREEDY: dict[str, Any] = {"messages": TALK, "temperature": 0, "max_tokens": 10}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(cpu_binding=False) as found:
        yield found


def post(http: httpx.Client, path: str = PATH, **body: Any) -> Any:
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_the_answer_is_that_of_offline_inference(http: httpx.Client, llm: LLM) -> None:
    expected = llm.chat(TALK, SamplingParams(temperature=0, max_tokens=10), use_tqdm=False)[0]
    answer = post(http, **GREEDY, return_token_ids=True)
    assert answer["choices"][0]["message"]["content"] == expected.outputs[0].text
    assert answer["prompt_token_ids"] == expected.prompt_token_ids
    assert answer["object"] == "chat.completion" and answer["id"].startswith("chatcmpl-")
    assert answer["usage"]["prompt_tokens"] == len(expected.prompt_token_ids)
    chunks = events(http, PATH, **GREEDY, stream_options={"include_usage": True})
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert "".join(c["delta"].get("content", "") for e in chunks for c in e["choices"]) == expected.outputs[0].text
    assert chunks[-2]["choices"][0]["finish_reason"] == answer["choices"][0]["finish_reason"]
    assert chunks[-1]["usage"] == answer["usage"] | {"prompt_tokens_details": chunks[-1]["usage"]["prompt_tokens_details"]}


def test_content_may_be_parts_and_max_completion_tokens_wins(http: httpx.Client) -> None:
    parts = [{"role": m["role"], "content": [{"type": "text", "text": m["content"]}]} for m in TALK]
    assert post(http, **{**GREEDY, "messages": parts})["choices"] == post(http, **GREEDY)["choices"]
    assert post(http, **GREEDY, max_completion_tokens=3)["usage"]["completion_tokens"] == 3
    developer = [{**TALK[0], "role": "developer"}, TALK[1]]
    assert post(http, **{**GREEDY, "messages": developer})["choices"] == post(http, **GREEDY)["choices"]


def test_logprobs_have_bytes(http: httpx.Client) -> None:
    answer = post(http, **GREEDY, logprobs=True, top_logprobs=2)
    content = answer["choices"][0]["logprobs"]["content"]
    assert len(content) == answer["usage"]["completion_tokens"]
    for entry in content:
        assert len(entry["top_logprobs"]) == 2 and entry["top_logprobs"][0]["logprob"] == entry["logprob"]
    joined = b"".join(bytes(entry["bytes"]) for entry in content)
    assert joined.decode(errors="replace") == answer["choices"][0]["message"]["content"]
    streamed = [
        x for e in events(http, PATH, **GREEDY, logprobs=True) for c in e["choices"] if c["logprobs"] for x in c["logprobs"]["content"]
    ]
    assert [x["bytes"] for x in streamed] == [x["bytes"] for x in content] and all(x["top_logprobs"] == [] for x in streamed)


def test_bytes_of_half_a_character(http: httpx.Client) -> None:
    """A token that is part of a character has its own bytes, not those of a replacement mark."""
    pieces = post(http, "/tokenize", prompt="\u2603")["tokens"]
    assert len(pieces) == 3
    answer = post(http, **{**GREEDY, "max_tokens": 1}, logprobs=True, allowed_token_ids=[pieces[0]])
    assert answer["choices"][0]["logprobs"]["content"][0]["bytes"] == [0xE2]


def test_continuing_a_message(http: httpx.Client) -> None:
    begun = [*TALK, {"role": "assistant", "content": "for i in"}]
    asked = {"messages": begun, "continue_final_message": True, "add_generation_prompt": False}
    ids = post(http, "/tokenize", **asked)["tokens"]
    assert post(http, "/detokenize", tokens=ids)["prompt"].endswith("<|im_start|>assistant\nfor i in")
    assert post(http, **asked, max_tokens=1)["usage"]["prompt_tokens"] == len(ids)
    assert refused(http, path=PATH, messages=begun, continue_final_message=True, add_generation_prompt=True)["param"]


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"content": "x"}]}, "messages.0.role"),
        ({"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {"url": "http://x"}}]}]}, "messages.0"),
        ({"messages": [{"role": "user", "content": 4}]}, "messages.0.content"),
        ({"messages": [{"role": "assistant", "tool_calls": [{"function": {"name": "f", "arguments": "{"}}]}]}, "messages.0.tool_calls"),
        ({"top_logprobs": 3}, "top_logprobs"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"chat_template": "{{ messages }}"}, "chat_template"),
        ({"chat_template_kwargs": {"chat_template": "x"}}, "chat_template_kwargs"),
        ({"chat_template_kwargs": {"tokenize": True}}, "chat_template_kwargs"),
        ({"max_completion_tokens": 0}, "max_completion_tokens"),
        ({"tool_choice": "auto"}, "tool_choice"),
    ],
)
def test_refusals_name_the_field(http: httpx.Client, fields: dict[str, Any], param: str) -> None:
    assert refused(http, path=PATH, **{**GREEDY, **fields})["param"] == param


def test_a_template_of_ones_own(tmp_path: Path) -> None:
    template = tmp_path / "plain.jinja"
    template.write_text("{% for m in messages %}[{{ m.content }}]{% endfor %}{{ tail }}")
    with running_server("--chat-template", str(template), tp=1) as server:
        ids = post_url(server, "/tokenize", messages=TALK, chat_template_kwargs={"tail": "!"})["tokens"]
        assert post_url(server, "/detokenize", tokens=ids)["prompt"] == "[Be brief.][Write a loop.]!"
    with pytest.raises(AssertionError, match="cannot be read"), running_server("--chat-template", str(tmp_path / "none"), tp=1):
        pass


def post_url(server: RunningServer, path: str, **body: Any) -> Any:
    answer = httpx.post(server.url + path, json=body, timeout=60)
    assert answer.status_code == 200, answer.text
    return answer.json()


def test_tokens_there_and_back(http: httpx.Client, llm: LLM) -> None:
    text = "def f(x): return 'é☃'"
    found = post(http, "/tokenize", prompt=text, return_token_strs=True)
    assert found["tokens"] == llm.get_tokenizer()(text)["input_ids"] and found["count"] == len(found["tokens"]) == len(found["token_strs"])
    assert post(http, "/detokenize", tokens=found["tokens"])["prompt"] == text
    assert found["max_model_len"] == 2048
    info, tokenizer = http.get("/tokenizer_info").json(), llm.get_tokenizer()
    assert (info["eos_token"], info["chat_template"]) == (tokenizer.eos_token, tokenizer.chat_template)
    for path, body in (("/tokenize", {}), ("/tokenize", {"prompt": "x", "messages": TALK}), ("/detokenize", {"tokens": [4096]})):
        assert http.post(path, json=body).status_code == 400


def test_tokens_in_tokens_out(http: httpx.Client, llm: LLM) -> None:
    prompt = "import "
    ids = llm.get_tokenizer()(prompt)["input_ids"]
    expected = llm.generate(prompt, SamplingParams(temperature=0, max_tokens=5), use_tqdm=False)[0].outputs[0]
    params = {"temperature": 0, "max_new_tokens": 5}
    one = post(http, "/generate", input_ids=ids, sampling_params=params, return_logprob=True)
    assert one["text"] == expected.text and one["output_ids"] == expected.token_ids
    assert one["meta_info"]["finish_reason"] == {"type": "length", "length": 5}
    assert [row[1] for row in one["meta_info"]["output_token_logprobs"]] == expected.token_ids
    several = post(http, "/generate", text=[prompt, prompt], sampling_params=params)
    assert [a["text"] for a in several] == [expected.text] * 2
    streamed = events(http, "/generate", text=prompt, sampling_params=params)
    assert streamed[-1]["text"] == expected.text and 1 <= len(streamed) <= 5  # an event may bring several tokens
    assert http.post("/generate", json={}).status_code == 400
    assert http.post("/generate", json={"text": "x", "sampling_params": {"n": 99}}).json()["error"]["param"] == "sampling_params.n"


def test_models_and_server(http: httpx.Client) -> None:
    listed = http.get("/v1/models").json()
    assert listed["object"] == "list" and listed["data"][0]["id"] == "lockstep-demo"
    assert http.get("/v1/models/lockstep-demo").json() == listed["data"][0]
    assert http.get("/v1/models/none").json()["error"]["code"] == "model_not_found"
    assert http.get("/ping").status_code == http.post("/ping").status_code == 200
    give_up_s = time.monotonic() + 20
    while (info := http.get("/server_info").json())["stats"]["running"]:  # whom a test before this one hung up on
        assert time.monotonic() < give_up_s, info
    assert info["config"]["parallel"]["tensor_parallel_size"] == 2
    assert "api_key" not in json.dumps(info)
