# ruff: noqa: E402
"""The official `openai` client against a diffusion language model: `penstock serve` with the tiny one of data/."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from openai import OpenAI

pytest.importorskip("torch")

from penstock.learn.local.registers import COLOURS, THINGS
from tests.serve.test_serve import Running, penstock, serving, until

FOLDER = Path(__file__).parents[2] / "data" / "tiny_diffusion"
MODEL = FOLDER.name
PAGE = """Stock of the old store

- feather: 98 white, shelf 9
- lantern: 85 red, shelf 3
- hinge: 94 green, shelf 8
- violin: 14 blue, shelf 6
- carpet: 49 brown, shelf 3

Colours:"""
ASK: dict[str, Any] = {"model": MODEL, "prompt": PAGE, "max_tokens": 70, "temperature": 0}
WHOLE: dict[str, Any] = {"ignore_eos": True}
USAGE: Any = {"include_usage": True}
USER: Any = [{"role": "user", "content": "What is a list?"}]


@pytest.fixture(scope="module")
def server() -> Iterator[Running]:
    with serving(str(FOLDER), "--policy", "dllm-serve", "--dtype", "fp32") as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[OpenAI]:
    with OpenAI(base_url=f"{server.url}/v1", api_key="none", max_retries=0, timeout=60) as made:
        yield made


@pytest.fixture(scope="module")
def text(client: OpenAI) -> str:
    told = client.completions.create(**ASK, extra_body=WHOLE)
    assert told.usage is not None and told.usage.completion_tokens == 70
    assert told.usage.total_tokens == told.usage.prompt_tokens + 70
    assert told.choices[0].finish_reason == "length"
    return told.choices[0].text


@pytest.mark.slow
def test_it_goes_on_in_the_page_s_own_words(text: str) -> None:
    pairs = [pair.split() for pair in text.split(",")[:6]]
    assert all(thing in THINGS and colour in COLOURS for thing, colour in pairs)


@pytest.mark.slow
def test_a_stream_comes_block_by_block_and_says_the_same(client: OpenAI, text: str) -> None:
    chunks = list(
        client.completions.create(**ASK, stream=True, stream_options=USAGE, extra_body=WHOLE)
    )
    pieces = [chunk.choices[0].text for chunk in chunks if chunk.choices]
    assert "".join(pieces) == text
    assert 3 <= len(pieces) <= 4  # blocks of 32, 32 and 6, and what the detokeniser held back
    usage = chunks[-1].usage
    assert usage is not None and usage.completion_tokens == 70


@pytest.mark.slow
@pytest.mark.parametrize("limit", [1, 33])
def test_an_answer_has_as_many_tokens_as_asked(client: OpenAI, limit: int) -> None:
    told = client.completions.create(**{**ASK, "max_tokens": limit}, extra_body=WHOLE)
    assert told.usage is not None and told.usage.completion_tokens == limit
    assert told.choices[0].finish_reason == "length"


@pytest.mark.slow
def test_a_stop_string_ends_the_text_before_it(client: OpenAI, text: str) -> None:
    word = text.split()[3]
    told = client.completions.create(**ASK, stop=[word], extra_body=WHOLE)
    assert told.choices[0].text == text[: text.index(word)]
    assert told.choices[0].finish_reason == "stop"


@pytest.mark.slow
def test_several_answers_and_seeds(client: OpenAI, text: str) -> None:
    greedy = client.completions.create(**ASK, n=2, extra_body=WHOLE)
    assert [choice.text for choice in greedy.choices] == [text, text]
    assert greedy.usage is not None and greedy.usage.completion_tokens == 140
    drawn = [
        client.completions.create(**{**ASK, "temperature": 1.0}, n=3, seed=seed, extra_body=WHOLE)
        for seed in (7, 7, 8)
    ]
    told = [[choice.text for choice in each.choices] for each in drawn]
    assert told[0] == told[1] != told[2]
    assert len(set(told[0])) == 3


@pytest.mark.slow
def test_a_chat(client: OpenAI) -> None:
    told = client.chat.completions.create(
        model=MODEL, messages=USER, max_tokens=40, temperature=0, extra_body=WHOLE
    )
    assert told.choices[0].message.role == "assistant"
    assert told.usage is not None and told.usage.completion_tokens == 40
    streamed = list(
        client.chat.completions.create(
            model=MODEL, messages=USER, max_tokens=40, temperature=0, extra_body=WHOLE, stream=True
        )
    )
    said = "".join([chunk.choices[0].delta.content or "" for chunk in streamed])
    assert said == told.choices[0].message.content


@pytest.mark.slow
@pytest.mark.parametrize(
    "field",
    [
        {"top_p": 0.5},
        {"logprobs": 2},
        {"presence_penalty": 1.0},
        {"frequency_penalty": 0.5},
        {"logit_bias": {"5": 3}},
        {"extra_body": {"top_k": 5}},
        {"extra_body": {"min_p": 0.1}},
        {"extra_body": {"min_tokens": 5}},
        {"extra_body": {"repetition_penalty": 1.1}},
    ],
)
def test_what_has_no_meaning_is_the_callers_error(client: OpenAI, field: dict[str, Any]) -> None:
    name = next(iter(field.get("extra_body", field)))
    with pytest.raises(openai.BadRequestError, match=f"{name} has no meaning") as found:
        client.completions.create(**ASK, **field)
    assert found.value.param == name and found.value.code == "unsupported_parameter"


@pytest.mark.slow
def test_what_chats_cannot_have_is_refused_too(client: OpenAI) -> None:
    asked: dict[str, Any] = {"model": MODEL, "messages": USER, "max_tokens": 8}
    with pytest.raises(openai.BadRequestError, match="logprobs has no meaning"):
        client.chat.completions.create(**asked, logprobs=True)
    with pytest.raises(openai.BadRequestError, match="no meaning") as found:
        client.chat.completions.create(**asked, response_format={"type": "json_object"})
    assert found.value.param == "response_format"
    with pytest.raises(openai.BadRequestError, match="tools"):
        tool: Any = {"type": "function", "function": {"name": "f", "parameters": {}}}
        client.chat.completions.create(**asked, tools=[tool])


def gauge(server: Running, name: str) -> float:
    lines = httpx.get(f"{server.url}/metrics").text.splitlines()
    return sum(float(line.split()[-1]) for line in lines if line.startswith(f"penstock:{name}{{"))


@pytest.mark.slow
def test_who_goes_away_leaves_no_memory_behind(client: OpenAI, server: Running) -> None:
    stream = client.completions.create(**{**ASK, "max_tokens": 300}, stream=True, extra_body=WHOLE)
    next(iter(stream))
    assert gauge(server, "num_requests_running") == 1
    stream.close()
    until(lambda: gauge(server, "num_requests_running") == 0)
    until(lambda: gauge(server, "kv_cache_usage_perc") == 0)


@pytest.mark.slow
def test_the_server_says_what_is_approximate_and_who_decides(server: Running) -> None:
    assert any("retention 0.5: `penstock bench agreement`" in line for line in server.lines)
    assert 'policy="diffusion"' in httpx.get(f"{server.url}/metrics").text


@pytest.mark.slow
def test_another_policy_is_refused_at_the_start() -> None:
    process = penstock("serve", str(FOLDER), "--port", "0", "--device", "cpu")
    _, said = process.communicate(timeout=60)
    assert process.returncode != 0
    assert "is a diffusion language model" in said and "--policy dllm-serve" in said
