"""The official `openai` client, sync, async and streaming, and langchain-openai, against a real server."""

from __future__ import annotations

import asyncio
import json
import time
from collections.abc import Iterator
from typing import Any, Literal

import httpx
import numpy as np
import openai
import pytest
from openai import AsyncOpenAI, BadRequestError, NotFoundError, OpenAI
from pydantic import BaseModel, ConfigDict

from lockstep import LLM, SamplingParams
from lockstep.testing.server import RunningServer

MODEL = "lockstep-demo"
PROMPT = "def fibonacci(n):"
ASK = [{"role": "user", "content": "Write a loop."}]
ENOUGH = 400  # tokens: the demo model fills a shape with much white space


class Forecast(BaseModel):
    """What the demo model is made to write. Every value is one of a few: it would not end a text of its own."""

    model_config = ConfigDict(extra="forbid")
    city: Literal["Rome", "Oslo"]
    days: Literal[1, 2, 3]


class News(BaseModel):
    model_config = ConfigDict(extra="forbid")
    topic: Literal["sports", "weather"]


SHAPES: dict[str, type[BaseModel]] = {"Forecast": Forecast, "News": News}


@pytest.fixture(scope="module")
def client(server: RunningServer) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as found:
        yield found


@pytest.fixture(scope="module")
def text() -> str:
    """What offline inference writes."""
    with LLM(cpu_binding=False) as llm:
        return llm.generate(PROMPT, SamplingParams(temperature=0, max_tokens=10), use_tqdm=False)[0].outputs[0].text


def test_models(client: OpenAI) -> None:
    assert [m.id for m in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).owned_by == "lockstep"
    with pytest.raises(NotFoundError):
        client.models.retrieve("none")


def test_completions(client: OpenAI, text: str) -> None:
    found = client.completions.create(model=MODEL, prompt=PROMPT, temperature=0, max_tokens=10, logprobs=2)
    choice = found.choices[0]
    assert choice.text == text and found.usage and found.usage.completion_tokens == 10
    assert choice.logprobs and choice.logprobs.top_logprobs and len(choice.logprobs.top_logprobs) == 10
    stream = client.completions.create(model=MODEL, prompt=PROMPT, temperature=0, max_tokens=10, stream=True)
    assert "".join(chunk.choices[0].text for chunk in stream) == text


def test_chat(client: OpenAI) -> None:
    found = client.chat.completions.create(model=MODEL, messages=ASK, temperature=0, max_tokens=10, logprobs=True, top_logprobs=3, n=2)
    assert [c.message.content for c in found.choices] == [found.choices[0].message.content] * 2
    assert found.choices[0].logprobs and found.choices[0].logprobs.content
    stream = client.chat.completions.create(
        model=MODEL, messages=ASK, temperature=0, max_tokens=10, stream=True, stream_options={"include_usage": True}
    )
    chunks = list(stream)
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == found.choices[0].message.content
    assert chunks[-1].usage and found.usage and chunks[-1].usage.prompt_tokens == found.usage.prompt_tokens
    whole = found.choices[0].message.content or ""
    with client.chat.completions.stream(model=MODEL, messages=ASK, temperature=0, max_tokens=10, stop=whole[4:6]) as helper:
        assert helper.get_final_completion().choices[0].message.content == whole[: whole.index(whole[4:6])]


def test_errors_are_typed(client: OpenAI) -> None:
    with pytest.raises(BadRequestError) as wrong:
        client.chat.completions.create(model=MODEL, messages=ASK, temperature=-1)
    assert wrong.value.param == "temperature" and wrong.value.type == "invalid_request_error"
    with pytest.raises(NotFoundError) as missing:
        client.completions.create(model="gpt-4", prompt="x")
    assert missing.value.code == "model_not_found"


def test_many_at_once(server: RunningServer, text: str) -> None:
    async def run() -> list[str]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:

            async def one(i: int) -> str:
                if i % 2:
                    return (await client.completions.create(model=MODEL, prompt=PROMPT, temperature=0, max_tokens=10)).choices[0].text
                stream = await client.completions.create(model=MODEL, prompt=PROMPT, temperature=0, max_tokens=10, stream=True)
                return "".join([chunk.choices[0].text async for chunk in stream])

            return await asyncio.gather(*(one(i) for i in range(24)))

    assert asyncio.run(run()) == [text] * 24


def test_tools(client: OpenAI) -> None:
    """A named tool, and any: the grammar makes calls of what even the demo model writes."""
    tools: Any = [openai.pydantic_function_tool(shape) for shape in SHAPES.values()]
    asked: Any = {"model": MODEL, "messages": ASK, "tools": tools, "temperature": 0, "max_tokens": ENOUGH, "parallel_tool_calls": False}
    for choice in ({"type": "function", "function": {"name": "News"}}, "required"):
        found = client.chat.completions.create(**asked, tool_choice=choice).choices[0]
        assert found.message.tool_calls and found.finish_reason == ("stop" if isinstance(choice, dict) else "tool_calls")
        (call,) = found.message.tool_calls
        assert call.type == "function" and isinstance(choice, str) | (call.function.name == "News")
        SHAPES[call.function.name].model_validate_json(call.function.arguments)
        with client.chat.completions.stream(**asked, tool_choice=choice) as stream:
            (streamed,) = stream.get_final_completion().choices[0].message.tool_calls or ()
        assert (streamed.function.name, streamed.function.arguments) == (call.function.name, call.function.arguments)
        assert isinstance(streamed.function.parsed_arguments, SHAPES[call.function.name])
    told = [{"role": "assistant", "tool_calls": [call.model_dump()]}, {"role": "tool", "tool_call_id": call.id, "content": "rain"}]
    assert client.chat.completions.create(**{**asked, "messages": [*ASK, *told], "max_tokens": 4}, tool_choice="auto").choices


def test_structured_output(client: OpenAI) -> None:
    asked: Any = {"model": MODEL, "messages": ASK, "temperature": 0, "max_tokens": ENOUGH}
    parsed = client.chat.completions.parse(**asked, response_format=Forecast).choices[0].message
    assert isinstance(parsed.parsed, Forecast)
    schema: Any = {"type": "json_schema", "json_schema": {"name": "forecast", "schema": Forecast.model_json_schema(), "strict": True}}
    plain = client.chat.completions.create(**asked, response_format=schema).choices[0].message.content or ""
    assert Forecast.model_validate_json(plain) == parsed.parsed
    with client.chat.completions.stream(**asked, response_format=Forecast) as stream:
        assert stream.get_final_completion().choices[0].message.parsed == parsed.parsed
    asked["max_tokens"] = 1000
    anything = client.chat.completions.create(**asked, response_format={"type": "json_object"}).choices[0]
    if anything.finish_reason == "stop":
        assert isinstance(json.loads(anything.message.content or ""), dict)
    assert (anything.message.content or "").startswith("{")
    answer = client.responses.parse(model=MODEL, input="Write a loop.", temperature=0, max_output_tokens=ENOUGH, text_format=Forecast)
    assert answer.output_parsed == parsed.parsed
    with pytest.raises(BadRequestError):
        broken: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"type": "nothing"}}}
        client.chat.completions.create(**asked, response_format=broken)


def test_embeddings(client: OpenAI) -> None:
    texts = ["import os", "def f():"]
    found = client.embeddings.create(model=MODEL, input=texts)
    assert [np.linalg.norm(one.embedding) for one in found.data] == pytest.approx([1.0] * 2, abs=1e-5)
    alone = client.embeddings.create(model=MODEL, input=texts[1], encoding_format="float")
    assert found.data[1].embedding == alone.data[0].embedding


def test_logprobs_of_the_prompt(client: OpenAI) -> None:
    """What evaluation harnesses ask for: the prompt's tokens scored, whole or in two parts alike."""
    found = client.completions.create(model=MODEL, prompt=PROMPT, max_tokens=1, temperature=0, logprobs=1, echo=True).choices[0].logprobs
    assert found and found.tokens and found.token_logprobs and found.top_logprobs and "".join(found.tokens[:-1]) == PROMPT
    assert found.token_logprobs[0] is None and all(p <= 0 for p in found.token_logprobs[1:])
    assert all(max(top.values()) >= p for top, p in zip(found.top_logprobs[1:], found.token_logprobs[1:], strict=True))


def test_16_chats_streamed_at_once(server: RunningServer, client: OpenAI) -> None:
    asked: Any = {"model": MODEL, "temperature": 0, "max_tokens": 24}
    talks: list[Any] = [[{"role": "user", "content": f"Write loop {i}."}] for i in range(16)]
    whole = [client.chat.completions.create(**asked, messages=talk).choices[0].message.content for talk in talks]

    async def run() -> list[str]:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as several:

            async def one(talk: Any) -> str:
                stream = await several.chat.completions.create(**asked, messages=talk, stream=True)
                return "".join([chunk.choices[0].delta.content or "" async for chunk in stream])

            return await asyncio.gather(*map(one, talks))

    assert asyncio.run(run()) == whole


def test_clients_that_leave_free_their_blocks(server: RunningServer) -> None:
    """A stream that is closed, and a call that is cancelled while it waits."""
    asked: Any = {"model": MODEL, "prompt": PROMPT, "max_tokens": 1900, "extra_body": {"ignore_eos": True}}

    def load() -> dict[str, float]:
        found: dict[str, float] = httpx.get(f"{server.url}/load", timeout=10).json()
        return found

    async def until_running(count: int) -> None:
        give_up_s = time.monotonic() + 20
        while load()["running"] != count:
            assert time.monotonic() < give_up_s, load()
            await asyncio.sleep(0.05)

    async def run() -> None:
        async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as client:
            stream = await client.completions.create(**asked, stream=True)
            await anext(aiter(stream))
            waiting = asyncio.create_task(client.completions.create(**asked))
            await until_running(2)
            assert load()["kv_cache_usage"] > 0
            await stream.close()
            await until_running(1)
            waiting.cancel()
            await until_running(0)

    asyncio.run(run())
    found = load()
    assert (found["server_load"], found["kv_cache_usage"]) == (0, 0)


def test_responses(client: OpenAI) -> None:
    plain = client.chat.completions.create(model=MODEL, messages=ASK, temperature=0, max_tokens=10).choices[0]
    found = client.responses.create(model=MODEL, input="Write a loop.", temperature=0, max_output_tokens=10)
    assert found.output_text == plain.message.content and found.usage and found.usage.output_tokens <= 10
    if plain.finish_reason == "length":
        assert found.status == "incomplete" and found.incomplete_details and found.incomplete_details.reason == "max_output_tokens"
    with pytest.raises(NotFoundError):
        client.responses.retrieve(found.id)
    with client.responses.stream(model=MODEL, input="Write a loop.", temperature=0, max_output_tokens=10) as stream:
        kinds = [event.type for event in stream]
    assert kinds[:4] == ["response.created", "response.in_progress", "response.output_item.added", "response.content_part.added"]
    assert kinds[-4:-1] == ["response.output_text.done", "response.content_part.done", "response.output_item.done"]
    events = list(client.responses.create(model=MODEL, input="Write a loop.", temperature=0, max_output_tokens=10, stream=True))
    assert [e.sequence_number for e in events] == list(range(len(events)))
    assert "".join(e.delta for e in events if e.type == "response.output_text.delta") == plain.message.content
    assert events[-1].type in ("response.completed", "response.incomplete") and events[-1].response.output_text == plain.message.content


def test_stored_responses(client: OpenAI) -> None:
    first = client.responses.create(model=MODEL, input="Write a loop.", instructions="Be brief.", max_output_tokens=4, store=True)
    assert client.responses.retrieve(first.id).output_text == first.output_text
    second = client.responses.create(model=MODEL, input="Go on.", previous_response_id=first.id, max_output_tokens=4)
    assert second.usage and first.usage and second.usage.input_tokens > first.usage.input_tokens
    with pytest.raises(BadRequestError):
        client.responses.cancel(first.id)
    client.responses.delete(first.id)
    with pytest.raises(NotFoundError):
        client.responses.retrieve(first.id)


def test_background_responses(client: OpenAI) -> None:
    long = client.responses.create(
        model=MODEL, input="Go.", max_output_tokens=1900, store=True, background=True, extra_body={"ignore_eos": True}
    )
    assert long.status == "in_progress"
    assert client.responses.cancel(long.id).status == "cancelled"
    assert client.responses.retrieve(long.id).status == "cancelled"
    with pytest.raises(BadRequestError):
        client.responses.create(model=MODEL, input="x", background=True)


def test_langchain(server: RunningServer, client: OpenAI) -> None:
    from langchain_openai import ChatOpenAI
    from langchain_openai import OpenAI as LangChainOpenAI
    from pydantic import SecretStr

    settings = {"model": MODEL, "base_url": f"{server.url}/v1", "api_key": SecretStr("none"), "temperature": 0, "max_retries": 0}
    expected = client.chat.completions.create(model=MODEL, messages=ASK, temperature=0, max_tokens=8).choices[0].message.content
    chat = ChatOpenAI(**settings, max_tokens=8)
    shaped = ChatOpenAI(**settings, max_tokens=ENOUGH)
    for method in ("json_schema", "function_calling"):
        assert isinstance(shaped.with_structured_output(Forecast, method=method).invoke("Write a loop."), Forecast)
    assert chat.invoke("Write a loop.").content == expected
    assert "".join(str(piece.content) for piece in chat.stream("Write a loop.")) == expected
    whole = client.completions.create(model=MODEL, prompt=PROMPT, temperature=0, max_tokens=8).choices[0].text
    assert LangChainOpenAI(**settings, max_tokens=8).invoke(PROMPT) == whole
