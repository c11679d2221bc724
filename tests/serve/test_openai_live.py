"""The official `openai` client against the real engine: one `penstock serve` with the model that comes along."""

from __future__ import annotations

import asyncio
import importlib.util
import json
import math
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from penstock.engine.folder import DEFAULT_FOLDER
from tests.serve.test_serve import Running, serving, until

if importlib.util.find_spec("torch") is None:
    pytest.skip("torch is not installed (extra `engine`)", allow_module_level=True)
if not (DEFAULT_FOLDER / "model.safetensors").exists():
    pytest.skip("the default model is not there", allow_module_level=True)

MODEL = "default"
PROMPT = "import os\n\ndef read(path):\n    "
GREEDY: dict[str, Any] = {"model": MODEL, "prompt": PROMPT, "max_tokens": 12, "temperature": 0}
USER: Any = [{"role": "user", "content": "What is a list?"}]
USAGE: Any = {"include_usage": True}


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving() as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


@pytest.fixture(scope="module")
def greedy(client: OpenAI) -> str:
    """What the model says after PROMPT when nothing is left to chance."""
    told = client.completions.create(**GREEDY)
    assert told.usage is not None and told.usage.completion_tokens == 12
    assert told.choices[0].finish_reason == "length" and told.choices[0].text
    return told.choices[0].text


def gauge(server: Running, name: str) -> float:
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f"penstock:{name}{{"))


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == [MODEL]
    assert client.models.retrieve(MODEL).id == MODEL


def test_a_stream_says_the_same_and_its_usage(client: OpenAI, greedy: str) -> None:
    chunks = list(client.completions.create(**GREEDY, stream=True, stream_options=USAGE))
    assert "".join(chunk.choices[0].text for chunk in chunks if chunk.choices) == greedy
    usage = chunks[-1].usage
    assert usage is not None and usage.completion_tokens == 12
    assert usage.prompt_tokens > 5 and usage.total_tokens == usage.prompt_tokens + 12


def test_chat_whole_and_streamed(client: OpenAI) -> None:
    fields: dict[str, Any] = {"model": MODEL, "messages": USER, "max_tokens": 12, "temperature": 0}
    told = client.chat.completions.create(**fields)
    message = told.choices[0].message
    assert message.role == "assistant" and message.content
    assert told.choices[0].finish_reason in ("length", "stop")
    chunks = list(client.chat.completions.create(**fields, stream=True, stream_options=USAGE))
    assert chunks[0].choices[0].delta.role == "assistant"
    streamed = "".join(c.choices[0].delta.content or "" for c in chunks if c.choices)
    assert streamed[:1] == message.content[:1]  # of a cached prompt: last bits may differ
    assert chunks[-1].usage is not None and chunks[-1].usage.completion_tokens > 0


def test_a_schema_is_kept(client: OpenAI) -> None:
    schema = {
        "type": "object",
        "properties": {"name": {"type": "string", "maxLength": 8}, "ok": {"type": "boolean"}},
        "required": ["name", "ok"],
        "additionalProperties": False,
    }
    asked: Any = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    stream = client.chat.completions.create(
        model=MODEL, messages=USER, response_format=asked, max_tokens=64, seed=1, stream=True
    )
    told = json.loads("".join(chunk.choices[0].delta.content or "" for chunk in stream))
    assert set(told) == {"name", "ok"} and isinstance(told["ok"], bool)


def test_several_answers(client: OpenAI, greedy: str) -> None:
    told = client.completions.create(**GREEDY, n=2)
    assert [choice.index for choice in told.choices] == [0, 1]
    assert [choice.text[:1] for choice in told.choices] == [greedy[:1]] * 2
    assert told.usage is not None and told.usage.completion_tokens == 24


def test_logprobs_are_those_of_the_likeliest(client: OpenAI, greedy: str) -> None:
    told = client.completions.create(**GREEDY, logprobs=3)
    logprobs = told.choices[0].logprobs
    assert logprobs is not None and logprobs.token_logprobs is not None
    assert told.choices[0].text == greedy and "".join(logprobs.tokens or []) == greedy
    assert len(logprobs.token_logprobs) == 12
    for chosen, top in zip(logprobs.token_logprobs, logprobs.top_logprobs or [], strict=True):
        assert chosen <= 0 and chosen == pytest.approx(max(top.values()))
        assert sum(map(math.exp, top.values())) <= 1 + 1e-4


def test_echo_scores_the_prompt(client: OpenAI, greedy: str) -> None:
    """Scored as a prompt, the answer has the logprobs that it was drawn with."""
    drawn = client.completions.create(**GREEDY, logprobs=0).choices[0].logprobs
    assert drawn is not None and drawn.token_logprobs is not None
    whole = GREEDY | {"prompt": PROMPT + greedy, "max_tokens": 0}
    choice = client.completions.create(**whole, echo=True, logprobs=0).choices[0]
    assert choice.text == PROMPT + greedy
    scored = choice.logprobs
    assert scored is not None and scored.tokens is not None and scored.token_logprobs is not None
    assert scored.token_logprobs[0] is None and "".join(scored.tokens) == choice.text
    assert None not in scored.token_logprobs[1:]
    if scored.tokens[-12:] == drawn.tokens:  # cut into the same tokens again
        assert scored.token_logprobs[-12:] == pytest.approx(drawn.token_logprobs, abs=0.05)


def test_a_prompt_in_the_cache_is_scored_whole(client: OpenAI) -> None:
    prompt = "def add(first, second):\n    return first + second\n" * 3
    fields = GREEDY | {"prompt": prompt, "max_tokens": 1}
    for _ in range(2):  # after the first all its blocks are in the prefix cache
        logprobs = client.completions.create(**fields, echo=True, logprobs=1).choices[0].logprobs
        assert logprobs is not None and logprobs.token_logprobs is not None
        assert len(logprobs.token_logprobs) > 32 and None not in logprobs.token_logprobs[1:]
        client.completions.create(**fields)


def test_a_stop_string(client: OpenAI, greedy: str) -> None:
    stop = greedy[len(greedy) // 2 :][:3]
    told = client.completions.create(**GREEDY, stop=stop)
    assert told.choices[0].text == greedy[: greedy.index(stop)]
    assert told.choices[0].finish_reason == "stop"


def test_a_seed_gives_the_same_again(client: OpenAI) -> None:
    def say(seed: int) -> str:
        fields = GREEDY | {"temperature": 1.5, "max_tokens": 16, "seed": seed}
        return client.completions.create(**fields).choices[0].text

    assert say(7) == say(7) != say(8)


def test_what_cannot_be_served(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model=MODEL, prompt="def f(x): return x\n" * 1000)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.NotFoundError) as missing:
        client.completions.create(model="gpt-none", prompt="a")
    assert missing.value.code == "model_not_found"
    for field, value in (("stop_token_ids", [10**6]), ("adapter", "lora")):
        with pytest.raises(openai.BadRequestError) as caught:
            client.completions.create(**GREEDY, extra_body={field: value})
        assert caught.value.param == field


def test_a_prompt_seen_before_is_told_as_cached(client: OpenAI) -> None:
    """Also when a stop string ends the answer."""
    prompt = "class Stack:\n    def push(self, item):\n        self.items.append(item)\n" * 4
    fields = GREEDY | {"prompt": prompt, "max_tokens": 24}
    text = client.completions.create(**fields).choices[0].text
    usage = client.completions.create(**fields, stop=text[:4]).usage
    assert usage is not None and usage.prompt_tokens_details is not None
    assert (usage.prompt_tokens_details.cached_tokens or 0) >= 16


def test_leaving_a_stream_ends_it_in_the_engine(client: OpenAI, server: Running) -> None:
    stream = client.completions.create(
        **GREEDY | {"max_tokens": 1500}, stream=True, extra_body={"ignore_eos": True}
    )
    next(iter(stream))
    until(lambda: gauge(server, "num_requests_running") == 1)
    stream.close()
    until(lambda: gauge(server, "num_requests_running") == 0, 10.0)
    assert gauge(server, "num_requests_in_flight") == 0


async def test_the_async_client(server: Running, greedy: str) -> None:
    async with AsyncOpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0) as client:
        assert [model.id async for model in client.models.list()] == [MODEL]

        async def streamed() -> str:
            stream = await client.completions.create(**GREEDY, stream=True)
            return "".join([chunk.choices[0].text async for chunk in stream])

        told = await asyncio.gather(*(streamed() for _ in range(4)))
        assert [text[:1] for text in told] == [greedy[:1]] * 4
        chat = await client.chat.completions.create(model=MODEL, messages=USER, max_tokens=4)
        assert chat.choices[0].message.content is not None
        with pytest.raises(openai.NotFoundError):
            await client.completions.create(model="gpt-none", prompt="a")
