"""The official `openai` client, sync, async and streaming, and langchain-openai, against a real server."""

from __future__ import annotations

import asyncio
from collections.abc import Iterator

import pytest
from openai import AsyncOpenAI, BadRequestError, NotFoundError, OpenAI

from lockstep import LLM, SamplingParams
from lockstep.testing.server import RunningServer

MODEL = "lockstep-demo"
PROMPT = "def fibonacci(n):"
ASK = [{"role": "user", "content": "Write a loop."}]


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
    assert chat.invoke("Write a loop.").content == expected
    assert "".join(str(piece.content) for piece in chat.stream("Write a loop.")) == expected
    whole = client.completions.create(model=MODEL, prompt=PROMPT, temperature=0, max_tokens=8).choices[0].text
    assert LangChainOpenAI(**settings, max_tokens=8).invoke(PROMPT) == whole
