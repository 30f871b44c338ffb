"""One name for a request wherever it shows: header, response, log lines, /v1/requests; and streams that tell each end once."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from lockstep.testing.server import RunningServer, running_server

LONG = {"prompt": "def f(", "max_tokens": 1500, "ignore_eos": True, "temperature": 0, "stream": True}
SEVERAL = {"n": 4, "temperature": 1.0, "seed": 5, "max_tokens": 40, "stop": ["e"], "stream": True}


@pytest.fixture(scope="module")
def server() -> Iterator[RunningServer]:
    with running_server("--log-format", "json", "--log-level", "info", tp=1) as found:
        yield found


@pytest.fixture(scope="module")
def http(server: RunningServer) -> Iterator[httpx.Client]:
    with httpx.Client(base_url=server.url, timeout=60) as client:
        yield client


class Stream(threading.Thread):
    """A long request under a name of its own, read on a thread."""

    def __init__(self, server: RunningServer, name: str) -> None:
        super().__init__(daemon=True)
        self._server, self._name = server, name
        self.id, self.reason = "", ""
        self.start()

    def run(self) -> None:
        headers = {"X-Request-Id": self._name}
        with httpx.stream("POST", f"{self._server.url}/v1/completions", json=LONG, headers=headers, timeout=60) as answer:
            for line in answer.iter_lines():
                if line.startswith("data: {"):
                    event = json.loads(line[6:])
                    self.id, self.reason = event["id"], event["choices"][0]["finish_reason"] or self.reason


def running(http: httpx.Client, count: int) -> list[dict[str, Any]]:
    """The requests under way, once there are so many."""
    give_up_s = time.monotonic() + 20
    while len(found := http.get("/v1/requests").json()["data"]) != count:
        assert time.monotonic() < give_up_s, found
        time.sleep(0.05)
    return list(found)


@pytest.mark.parametrize(
    ("path", "body", "prefix"),
    [
        ("/v1/completions", {"prompt": "x", "max_tokens": 1}, "cmpl-"),
        ("/v1/chat/completions", {"messages": [{"role": "user", "content": "x"}], "max_tokens": 1}, "chatcmpl-"),
    ],
)
def test_the_response_has_the_name_of_the_header(http: httpx.Client, path: str, body: dict[str, Any], prefix: str) -> None:
    made = http.post(path, json=body)
    assert made.json()["id"] == prefix + made.headers["x-request-id"]
    named = http.post(path, json=body, headers={"X-Request-Id": "req_7"})
    assert (named.json()["id"], named.headers["x-request-id"]) == (f"{prefix}req_7", "req_7")
    in_body = http.post(path, json={**body, "request_id": "mine"}, headers={"X-Request-Id": "req_8"})
    assert (in_body.json()["id"], in_body.headers["x-request-id"]) == (f"{prefix}mine", "mine")


def test_log_lines_have_the_name_that_the_body_gave(server: RunningServer, http: httpx.Client) -> None:
    http.post("/generate", json={"text": "x", "rid": "in-the-log", "sampling_params": {"max_new_tokens": 1}}).raise_for_status()
    said, give_up_s = list[str](), time.monotonic() + 20
    while not said and time.monotonic() < give_up_s:  # it is written once the answer is out
        lines = [json.loads(line) for line in server.said().splitlines() if line.startswith("{") and line.endswith("}")]
        said = [line["message"].split(" ")[1] for line in lines if line.get("request_id") == "in-the-log"]
        time.sleep(0.05)
    assert said == ["/generate"]


def test_requests_are_aborted_by_exactly_their_names(server: RunningServer, http: httpx.Client) -> None:
    first = Stream(server, "one")
    (info,) = running(http, 1)
    assert (info["external_id"], info["response_id"]) == ("one", "cmpl-one")
    name = info["request_id"]
    second = Stream(server, name.lstrip("#"))  # as much like the other's name in the engine as a client may call itself
    running(http, 2)
    third = Stream(server, "three")
    running(http, 3)

    def abort(*names: str) -> int:
        return len(http.post("/abort_requests", json={"request_ids": names}).raise_for_status().json()["aborted"])

    assert abort("cmpl-on", "ne", f"cmpl-{name}", "cmpl-cmpl-one") == 0
    assert abort(name.lstrip("#")) == 1
    second.join(20)
    assert second.reason == "abort" and [one["external_id"] for one in running(http, 2)] == ["one", "three"]
    assert abort("cmpl-three") == 1 and abort(name) == 1
    for stream in (first, third):
        stream.join(20)
        assert stream.reason == "abort"


def test_what_is_the_engines_no_client_may_call_itself(http: httpx.Client) -> None:
    answer = http.post("/v1/completions", json={"prompt": "x", "request_id": "#0-1"})
    assert answer.status_code == 400 and answer.json()["error"]["param"] == "request_id"
    made = http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1}, headers={"X-Request-Id": "#0-1"})
    assert made.status_code == 200 and "#" not in made.headers["x-request-id"]


@pytest.mark.parametrize("path", ["/v1/completions", "/v1/chat/completions", "/generate"])
def test_each_choice_of_a_stream_ends_once(http: httpx.Client, path: str) -> None:
    """Choices of different lengths: what has ended is not told again while others go on."""
    if path == "/generate":
        body = {
            "text": "def f(",
            "stream": True,
            "sampling_params": {"n": 4, "temperature": 1.0, "seed": 5, "max_new_tokens": 40, "stop": ["e"]},
        }
    else:
        body = {**SEVERAL, **({"prompt": "def f("} if "chat" not in path else {"messages": [{"role": "user", "content": "hi"}]})}
    assert any(_ends_apart(http, path, body) for _ in range(10)), "they all ended together"


def _ends_apart(http: httpx.Client, path: str, body: dict[str, Any]) -> bool:
    """Each choice ends once, and is not told of after that. Whether they ended in different events: a process that was not run
    for some milliseconds tells all that came meanwhile in one."""
    answer = http.post(path, json=body)
    assert answer.status_code == 200, answer.text
    events = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    if path == "/generate":
        last_events = [at for at, event in enumerate(events) if event["meta_info"]["finish_reason"]]
        assert len(last_events) == 4
        return last_events != list(range(len(events) - 4, len(events)))
    ends = [(at, c["index"]) for at, event in enumerate(events) for c in event["choices"] if c["finish_reason"]]
    assert sorted(index for _, index in ends) == [0, 1, 2, 3]
    last = {index: at for at, index in ends}
    assert not [c for at, event in enumerate(events) for c in event["choices"] if at > last[c["index"]]]
    return len({at for at, _ in ends}) > 1


def test_a_bias_of_a_giant_token_is_refused(http: httpx.Client) -> None:
    answer = http.post("/v1/completions", json={"prompt": "x", "max_tokens": 1, "logit_bias": {"9" * 30: 1}})
    assert answer.status_code == 400, answer.text
