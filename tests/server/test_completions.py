"""`/v1/completions` of a real server, by raw HTTP: fields, shapes, streams, refusals."""

from __future__ import annotations

import json
import math
import socket
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from lockstep import LLM, SamplingParams
from lockstep.testing.server import RunningServer

PROMPT = "def fibonacci(n):"
GREEDY = {"prompt": PROMPT, "temperature": 0, "max_tokens": 12}


@pytest.fixture(scope="module")
def llm() -> Iterator[LLM]:
    with LLM(cpu_binding=False) as found:
        yield found


def post(http: httpx.Client, **body: Any) -> dict[str, Any]:
    answer = http.post("/v1/completions", json=body)
    assert answer.status_code == 200, answer.text
    return dict(answer.json())


def events(http: httpx.Client, path: str = "/v1/completions", **body: Any) -> list[dict[str, Any]]:
    """Every chunk of a stream; asserts its form."""
    answer = http.post(path, json={**body, "stream": True})
    assert answer.status_code == 200, answer.text
    assert answer.headers["content-type"].startswith("text/event-stream")
    blocks = answer.text.split("\n\n")
    assert blocks[-2:] == ["data: [DONE]", ""]
    assert all(b.startswith("data: ") for b in blocks[:-1])
    return [json.loads(b.removeprefix("data: ")) for b in blocks[:-2]]


def refused(http: httpx.Client, status: int = 400, path: str = "/v1/completions", **body: Any) -> dict[str, Any]:
    answer = http.post(path, json=body)
    assert answer.status_code == status, answer.text
    error = answer.json()["error"]
    assert set(error) == {"message", "type", "param", "code"} and error["message"]
    return dict(error)


def test_text_is_that_of_offline_inference(http: httpx.Client, llm: LLM) -> None:
    prompts = [PROMPT, "import ", "class A:\n"]
    expected = [o.outputs[0].text for o in llm.generate(prompts, SamplingParams(temperature=0, max_tokens=12), use_tqdm=False)]
    answer = post(http, **{**GREEDY, "prompt": prompts})
    assert [c["text"] for c in answer["choices"]] == expected
    assert [c["index"] for c in answer["choices"]] == [0, 1, 2]
    ids = llm.get_tokenizer()(prompts)["input_ids"]
    assert [c["text"] for c in post(http, **{**GREEDY, "prompt": ids})["choices"]] == expected
    assert post(http, **{**GREEDY, "prompt": ids[0]})["choices"][0]["text"] == expected[0]
    streamed = ["", "", ""]
    for chunk in events(http, **{**GREEDY, "prompt": prompts}):
        for choice in chunk["choices"]:
            streamed[choice["index"]] += choice["text"]
    assert streamed == expected


def test_shape_and_usage(http: httpx.Client) -> None:
    answer = post(http, **GREEDY, request_id="mine", model="lockstep-demo")
    assert answer["id"] == "cmpl-mine" and answer["object"] == "text_completion" and answer["model"] == "lockstep-demo"
    assert answer["system_fingerprint"].startswith("lockstep-")
    choice = answer["choices"][0]
    assert choice["finish_reason"] == "length" and choice["stop_reason"] is None and choice["logprobs"] is None
    usage = answer["usage"]
    assert usage["completion_tokens"] == 12 and usage["total_tokens"] == usage["prompt_tokens"] + 12
    assert "cached_tokens" in usage["prompt_tokens_details"]


def test_seeds_and_n(http: httpx.Client) -> None:
    body = {"prompt": PROMPT, "temperature": 1.0, "max_tokens": 8, "seed": 7, "n": 3}
    first, again = post(http, **body), post(http, **body)
    assert [c["text"] for c in first["choices"]] == [c["text"] for c in again["choices"]]
    assert len({c["text"] for c in first["choices"]}) > 1 and [c["index"] for c in first["choices"]] == [0, 1, 2]
    streamed = ["", "", ""]
    for chunk in events(http, **body):
        for choice in chunk["choices"]:
            streamed[choice["index"]] += choice["text"]
    assert streamed == [c["text"] for c in first["choices"]]


def test_best_of_tells_the_likeliest(http: httpx.Client) -> None:
    body = {"prompt": PROMPT, "temperature": 1.2, "max_tokens": 6, "seed": 3, "ignore_eos": True, "logprobs": 0}
    all_of_them = post(http, **body, n=4)["choices"]
    means = sorted((sum(c["logprobs"]["token_logprobs"]) / 6 for c in all_of_them), reverse=True)
    best = post(http, **body, n=2, best_of=4)
    assert [sum(c["logprobs"]["token_logprobs"]) / 6 for c in best["choices"]] == pytest.approx(means[:2])
    assert [c["index"] for c in best["choices"]] == [0, 1]
    assert refused(http, **body, n=2, best_of=1)["param"] == "best_of"
    assert refused(http, **body, best_of=2, stream=True)["param"] == "best_of"


def test_stop_strings_and_ids(http: httpx.Client) -> None:
    whole = post(http, **{**GREEDY, "max_tokens": 40})["choices"][0]["text"]
    stop = whole[5:8]
    cut = post(http, **{**GREEDY, "max_tokens": 40}, stop=[stop])["choices"][0]
    assert cut["text"] == whole[: whole.index(stop)] and cut["finish_reason"] == "stop" and cut["stop_reason"] == stop
    kept = post(http, **{**GREEDY, "max_tokens": 40}, stop=stop, include_stop_str_in_output=True)["choices"][0]
    assert kept["text"] == whole[: whole.index(stop) + len(stop)]
    token = post(http, **GREEDY, return_token_ids=True)["choices"][0]["token_ids"][3]
    by_id = post(http, **GREEDY, stop_token_ids=[token])["choices"][0]
    assert by_id["finish_reason"] == "stop" and by_id["stop_reason"] == token


def test_logprobs_have_the_older_shape(http: httpx.Client) -> None:
    choice = post(http, **GREEDY, logprobs=3)["choices"][0]
    found = choice["logprobs"]
    assert len(found["tokens"]) == len(found["token_logprobs"]) == len(found["top_logprobs"]) == len(found["text_offset"]) == 12
    assert "".join(found["tokens"]) == choice["text"]
    for token, logprob, top, offset in zip(*(found[k] for k in ("tokens", "token_logprobs", "top_logprobs", "text_offset")), strict=True):
        assert choice["text"][offset:].startswith(token)
        assert logprob == max(top.values()) and len(top) <= 3
    as_ids = post(http, **GREEDY, logprobs=1, return_tokens_as_token_ids=True, return_token_ids=True)["choices"][0]
    assert as_ids["logprobs"]["tokens"] == [f"token_id:{i}" for i in as_ids["token_ids"]]


@pytest.mark.parametrize("max_tokens", [0, 1, 4])
def test_echo_with_logprobs_scores_the_prompt(http: httpx.Client, llm: LLM, max_tokens: int) -> None:
    """What evaluation harnesses ask to score an answer."""
    text = PROMPT + "\n    return n"
    ids = llm.get_tokenizer()(text)["input_ids"]
    choice = post(http, prompt=text, temperature=0, max_tokens=max_tokens, echo=True, logprobs=2)["choices"][0]
    found = choice["logprobs"]
    assert choice["text"].startswith(text) and "".join(found["tokens"]) == choice["text"]
    assert len(found["tokens"]) == len(ids) + max_tokens
    assert found["token_logprobs"][0] is None and found["top_logprobs"][0] is None
    scored = llm.generate([text], SamplingParams(temperature=0, max_tokens=1, prompt_logprobs=2), use_tqdm=False)[0].prompt_logprobs or []
    expected = [next(iter(p.values())).logprob for p in scored if p is not None]
    assert found["token_logprobs"][1 : len(ids)] == pytest.approx(expected, abs=1e-4)
    assert post(http, prompt=ids, max_tokens=0, echo=True)["choices"][0]["text"] == text
    streamed = events(http, prompt=text, temperature=0, max_tokens=max_tokens, echo=True, logprobs=2)
    assert "".join(c["text"] for e in streamed for c in e["choices"]) == choice["text"]
    offsets = [o for e in streamed for c in e["choices"] for o in c["logprobs"]["text_offset"]]
    assert offsets == found["text_offset"]


def offsets_of(chunks: list[dict[str, Any]]) -> list[int]:
    return [o for e in chunks for c in e["choices"] if c["logprobs"] for o in c["logprobs"]["text_offset"]]


@pytest.mark.parametrize("interval", [1, 5])
def test_a_token_has_the_same_offset_where_its_text_is_held_back(http: httpx.Client, interval: int) -> None:
    """Text that may begin a stop string is told late, or never, and counts all the same."""
    body = {"prompt": "def f(", "max_tokens": 24, "seed": 0, "temperature": 0.8, "logprobs": 2, "ignore_eos": True}
    free = post(http, **body)["choices"][0]["text"]
    for stop in ("self", free[:2] + "\x7f", free[6:8] + "\x7f", free[15:18]):
        whole = post(http, **body, stop=[stop])["choices"][0]["logprobs"]
        assert offsets_of(events(http, **body, stop=[stop], stream_interval=interval)) == whole["text_offset"], stop
        ends = [offset + len(token) for offset, token in zip(whole["text_offset"], whole["tokens"], strict=True)]
        assert [0, *ends[:-1]] == whole["text_offset"]


@pytest.mark.parametrize(
    "more", [{"max_tokens": 4}, {"max_tokens": 0}, {"max_tokens": 3, "n": 2}, {"allowed_token_ids": [124, 240, 224, 131]}]
)
def test_offsets_are_into_the_text_also_where_characters_have_several_tokens(http: httpx.Client, more: dict[str, Any]) -> None:
    body = {"prompt": "héé 漢字 🎉", "max_tokens": 12, "seed": 1, "echo": True, "logprobs": 0, "ignore_eos": True} | more
    choices = post(http, **body)["choices"]
    for choice in choices:
        text, found = choice["text"], choice["logprobs"]
        offsets = found["text_offset"]
        assert offsets[:17] == [0, 1, 1, 2, 2, 3, 4, 4, 4, 5, 5, 5, 6, 7, 7, 7, 7] and all(o >= 8 for o in offsets[17:])
        assert offsets == sorted(offsets) and offsets[-1] <= len(text)
        whole = [(token, offset) for token, offset in zip(found["tokens"], offsets, strict=True) if "\ufffd" not in token]
        assert all(text[offset:].startswith(token) for token, offset in whole)
    streamed = events(http, **body)
    assert [offsets_of([{"choices": [c for e in streamed for c in e["choices"] if c["index"] == i]}]) for i in range(len(choices))] == [
        choice["logprobs"]["text_offset"] for choice in choices
    ]


def test_prompt_logprobs_and_token_ids(http: httpx.Client) -> None:
    choice = post(http, **GREEDY, prompt_logprobs=1, return_token_ids=True)["choices"][0]
    assert choice["prompt_logprobs"][0] is None and len(choice["prompt_logprobs"]) == len(choice["prompt_token_ids"])
    for token, entries in zip(choice["prompt_token_ids"][1:], choice["prompt_logprobs"][1:], strict=True):
        assert set(entries[str(token)]) == {"logprob", "rank", "decoded_token"}
    assert len(choice["token_ids"]) == 12


def test_biases_and_lists_of_tokens(http: httpx.Client) -> None:
    ids = post(http, **GREEDY, return_token_ids=True)["choices"][0]["token_ids"]
    biased = post(http, **GREEDY, logit_bias={str(ids[0]): -100}, return_token_ids=True)["choices"][0]["token_ids"]
    assert ids[0] not in biased
    allowed = post(http, **GREEDY, allowed_token_ids=[5, 6], return_token_ids=True)["choices"][0]["token_ids"]
    assert set(allowed) <= {5, 6}


def test_stream_options_and_interval(http: httpx.Client) -> None:
    plain = events(http, **GREEDY)
    assert all("usage" not in e for e in plain) and 1 <= len(plain) <= 12
    counted = events(http, **GREEDY, stream_options={"include_usage": True})
    assert counted[-1]["choices"] == [] and counted[-1]["usage"]["completion_tokens"] == 12
    assert all(e["usage"] is None for e in counted[:-1])
    always = events(http, **GREEDY, stream_options={"continuous_usage_stats": True})
    counts = [e["usage"]["completion_tokens"] for e in always]
    assert counts == sorted(set(counts)) and counts[-1] == 12  # an event may bring several tokens
    slow = events(http, **GREEDY, stream_interval=5, logprobs=0)
    sizes = [len(e["choices"][0]["logprobs"]["tokens"]) for e in slow]
    assert sum(sizes) == 12 and all(size >= 5 for size in sizes[1:-1])  # several tokens may have come at once
    text = "".join(e["choices"][0]["text"] for e in plain)
    assert "".join(e["choices"][0]["text"] for e in slow) == text


def test_truncation_and_special_tokens(http: httpx.Client) -> None:
    whole = post(http, **GREEDY, return_token_ids=True)["choices"][0]["prompt_token_ids"]
    cut = post(http, **GREEDY, return_token_ids=True, truncate_prompt_tokens=3)["choices"][0]["prompt_token_ids"]
    assert cut == whole[-3:]
    assert post(http, prompt="word " * 5000, max_tokens=4, truncate_prompt_tokens=-1)["usage"]["prompt_tokens"] == 2044


@pytest.mark.parametrize(
    ("fields", "param"),
    [
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": -1}, "temperature"),
        ({"temperature": True}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"n": 17}, "n"),
        ({"n": 0}, "n"),
        ({"n": 10**400}, "n"),
        ({"logprobs": 21}, "logprobs"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": "5"}, "max_tokens"),
        ({"min_tokens": 20, "max_tokens": 10}, "min_tokens"),
        ({"stop": ["x"] * 17}, "stop"),
        ({"stop": [""]}, "stop"),
        ({"stop": 3}, "stop"),
        ({"seed": 2**63}, "seed"),
        ({"logit_bias": {"x": 1}}, "logit_bias"),
        ({"logit_bias": {"--5": 1}}, "logit_bias"),
        ({"logit_bias": {"1": 1000}}, "logit_bias"),
        ({"allowed_token_ids": []}, "allowed_token_ids"),
        ({"suffix": "end"}, "suffix"),
        ({"use_beam_search": True}, "use_beam_search"),
        ({"priority": 3}, "priority"),
        ({"data_parallel_rank": 5}, "data_parallel_rank"),
        ({"prompt": None}, "prompt"),
        ({"prompt": []}, "prompt"),
        ({"prompt": ""}, "prompt"),
        ({"prompt": [1, "a"]}, "prompt"),
        ({"prompt": [[]]}, "prompt"),
        ({"prompt": [4096]}, "prompt"),
        ({"prompt": [-1]}, "prompt"),
        ({"prompt": ["x"] * 257}, "prompt"),
        ({"prompt": {"a": 1}}, "prompt"),
        ({"stream_options": 4}, "stream_options"),
        ({"response_format": {"type": "xml"}}, "response_format.type"),
        ({"allowed_token_ids": [1] * 100_000}, "allowed_token_ids"),
        ({"request_id": "a b"}, "request_id"),
    ],
)
def test_refusals_name_the_field(http: httpx.Client, fields: dict[str, Any], param: str) -> None:
    error = refused(http, **{"prompt": "x", **fields})
    assert error["param"] == param and error["type"] == "invalid_request_error"
    assert param.partition(".")[0] in error["message"] or "empty" in error["message"] or param == "prompt"


def test_other_refusals(http: httpx.Client) -> None:
    assert refused(http, status=404, prompt="x", model="gpt-4")["code"] == "model_not_found"
    assert refused(http, prompt="word " * 5000)["code"] == "context_length_exceeded"
    broken = http.post("/v1/completions", content=b'{"prompt": ', headers={"content-type": "application/json"})
    assert broken.status_code == 400 and broken.json()["error"]["param"] is None
    nan = http.post("/v1/completions", content=b'{"prompt": "x", "temperature": NaN}', headers={"content-type": "application/json"})
    assert nan.status_code == 400
    assert refused(http, prompt="x", headers=None, **{"max_tokens": 1, "prompt_embeds": "x"})["param"] == "prompt_embeds"
    half = http.post("/v1/completions", content=b'{"prompt": "\\ud800"}', headers={"content-type": "application/json"})
    assert half.status_code == 400


def test_unknown_fields_and_nulls_are_ignored(http: httpx.Client) -> None:
    fields = {"user": "me", "wat": [1], "metadata": None, "stop": None, "logprobs": None, "seed": None, "top_k": -1, "stream_options": None}
    assert post(http, **GREEDY, **fields)["choices"][0]["text"] == post(http, **GREEDY)["choices"][0]["text"]


def test_headers_choose_the_replica_and_the_session(http: httpx.Client) -> None:
    body = {"prompt": "x", "max_tokens": 1}
    good = http.post("/v1/completions", json=body, headers={"x-session-id": "s", "x-data-parallel-rank": "0"})
    assert good.status_code == 200
    for wrong in ("1", "x", "-1"):
        answer = http.post("/v1/completions", json=body, headers={"x-data-parallel-rank": wrong})
        assert answer.status_code == 400, wrong


@pytest.mark.parametrize("stream", [True, False])
def test_who_hangs_up_ends_the_request(server: RunningServer, http: httpx.Client, stream: bool) -> None:
    body = json.dumps({"prompt": PROMPT, "max_tokens": 2000, "ignore_eos": True, "stream": stream, "n": 4}).encode()
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as caller:
        head = f"POST /v1/completions HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(body)}\r\n\r\n"
        caller.sendall(head.encode() + body)
        wait_for(http, lambda info: info["running"] >= 4)
    wait_for(http, lambda info: info["running"] == 0 and info["kv_blocks_used"] == 0)


def wait_for(http: httpx.Client, condition: Any, timeout_s: float = 20.0) -> None:
    """Until the engine's numbers satisfy `condition`."""
    give_up_s = time.monotonic() + timeout_s
    while not condition(info := http.get("/server_info").json()["stats"]):
        assert time.monotonic() < give_up_s, info
        time.sleep(0.02)


def test_logprobs_are_numbers(http: httpx.Client) -> None:
    """A token that may not be chosen has no probability; JSON has no infinity."""
    found = post(http, **GREEDY, allowed_token_ids=[5], logprobs=5)["choices"][0]["logprobs"]
    assert all(math.isfinite(x) for top in found["top_logprobs"] for x in top.values())
