"""Tools and thoughts through the official client, whole and streamed."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import openai
import pytest
from openai import OpenAI
from tokenizers import AddedToken, Tokenizer

from penstock.core.types import Request
from penstock.gateway.text import TextModel
from tests.gateway.conftest import Start
from tests.gateway.scripted import Scripted

USER: Any = {"role": "user", "content": "How warm is it?"}
TEMPLATE = (
    "{% if tools %}Tools, to be called as <tool_call>{...}</tool_call>:{% for tool in tools %}{{ tool | tojson }}"
    "{% endfor %}{% endif %}{% for m in messages %}<|{{ m.role }}|>{{ m.content }}"
    "{% for call in m.tool_calls or [] %}<tool_call>{{ call.function | tojson }}</tool_call>{% endfor %}<|end|>"
    "{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "weather",
        "description": "How warm it is",
        "parameters": {
            "type": "object",
            "properties": {"city": {"enum": ["Oslo", "Rome"]}, "days": {"type": "boolean"}},
            "required": ["city", "days"],
            "additionalProperties": False,
        },
    },
}
NEWS: Any = {"type": "function", "function": {"name": "news", "parameters": {"type": "object"}}}
CALL = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo", "days": true}}\n</tool_call>'
Make = Callable[..., OpenAI]


@pytest.fixture(scope="module", params=["letters", "special"])
def knowing(folder: Path, tmp_path_factory: pytest.TempPathFactory, request: Any) -> TextModel:
    """A model that knows tools and thinks; its marks are plain text, or special tokens."""
    place = tmp_path_factory.mktemp("knowing") / "model"
    shutil.copytree(folder, place)
    if request.param == "special":
        tokenizer = Tokenizer.from_file(str(place / "tokenizer.json"))
        marks = ("<tool_call>", "</tool_call>", "<think>", "</think>")
        tokenizer.add_special_tokens([AddedToken(mark, special=True) for mark in marks])
        tokenizer.save(str(place / "tokenizer.json"))
    template = TEMPLATE + "{# </think> #}"
    told = {"eos_token": "<|end|>", "chat_template": template}
    (place / "tokenizer_config.json").write_text(json.dumps(told))
    return TextModel.load(place)


@pytest.fixture
def make(start: Start, knowing: TextModel) -> Make:
    """A client of a service that says `says`, or draws what the grammar allows."""

    def made(says: str = "", seed: int = 0, **config: object) -> OpenAI:
        def script(request: Request, answer: int) -> Sequence[int]:
            grammar = request.sampling.grammar
            if grammar is None:
                return [*knowing.encode(says), 0]
            matcher, ids = knowing.grammars.matcher(grammar), list[int]()
            drawn = np.random.default_rng(seed + answer)
            while not ids or ids[-1] != 0:
                allowed = matcher.allowed(ids)
                ids.append(0 if allowed[0] else int(drawn.choice(np.flatnonzero(allowed))))
                assert len(ids) < 480
            return ids

        service = Scripted(script)
        made.service = service  # type: ignore[attr-defined]
        return OpenAI(
            base_url=f"{start(service, speaks=knowing, **config)}/v1", api_key="key", max_retries=0
        )

    return made


def both(client: OpenAI, **asked: Any) -> tuple[dict[str, Any], str]:
    """The message and why it ended; whole and streamed must say the same."""
    asked = {"model": "tiny", "messages": [USER], **asked}
    whole = client.chat.completions.create(**asked).choices[0]
    message = whole.message.model_dump(exclude_none=True)
    streamed: dict[str, Any] = {"content": "", "reasoning_content": "", "tool_calls": []}
    reasons = []
    for chunk in client.chat.completions.create(**asked, stream=True):
        delta = chunk.choices[0].delta.model_dump(exclude_none=True)
        reasons.append(chunk.choices[0].finish_reason)
        for name in ("content", "reasoning_content"):
            streamed[name] += delta.get(name, "")
        for call in delta.get("tool_calls", ()):
            if "id" in call:
                streamed["tool_calls"].append({**call, "function": dict(call["function"])})
            else:
                known = streamed["tool_calls"][call["index"]]["function"]
                known["arguments"] += call["function"]["arguments"]
    for name in ("content", "reasoning_content"):
        assert streamed[name] == message.get(name, "")
    calls = message.get("tool_calls", [])
    assert [call["function"] for call in streamed["tool_calls"]] == [c["function"] for c in calls]
    assert reasons[-1] == whole.finish_reason and set(reasons[:-1]) <= {None}
    return message, whole.finish_reason


def test_a_call_is_told_apart_from_what_is_said(make: Make) -> None:
    client = make(f"Let me look.\n{CALL}")
    message, why = both(client, tools=[WEATHER, NEWS])
    assert why == "tool_calls" and message["content"] == "Let me look."
    (call,) = message["tool_calls"]
    assert call["type"] == "function" and call["id"].startswith("call_")
    assert call["function"]["name"] == "weather"
    assert json.loads(call["function"]["arguments"]) == {"city": "Oslo", "days": True}


def test_several_calls_and_only_one_where_one_is_wanted(make: Make) -> None:
    client = make(f"{CALL}\n{CALL.replace('Oslo', 'Rome')}")
    message, _ = both(client, tools=[WEATHER])
    cities = [json.loads(call["function"]["arguments"])["city"] for call in message["tool_calls"]]
    assert cities == ["Oslo", "Rome"] and "content" not in message
    assert len({call["id"] for call in message["tool_calls"]}) == 2
    message, _ = both(client, tools=[WEATHER], parallel_tool_calls=False)
    assert len(message["tool_calls"]) == 1


def test_without_tools_marks_are_text(make: Make) -> None:
    client = make(CALL)
    for asked in ({}, {"tools": [WEATHER], "tool_choice": "none"}):
        message, why = both(client, **asked)
        assert message["content"] == CALL and why == "stop"


def test_thoughts_are_told_apart(make: Make) -> None:
    client = make(f"<think>\nIt may be cold.\n</think>\n\n{CALL}")
    message, why = both(client, tools=[WEATHER])
    assert message["reasoning_content"] == "It may be cold."
    assert why == "tool_calls" and len(message["tool_calls"]) == 1
    message, why = both(make("Only this."))
    assert message["content"] == "Only this." and "reasoning_content" not in message


@pytest.mark.parametrize("seed", range(3))
def test_required_calls_keep_the_schema(make: Make, seed: int) -> None:
    """The service draws any token that is allowed: a call must come of it."""
    client = make(seed=seed, reasoning="off")
    named = {"type": "function", "function": {"name": "weather"}}
    message, why = both(client, tools=[WEATHER, NEWS], tool_choice=named, parallel_tool_calls=False)
    (call,) = message["tool_calls"]
    told = json.loads(call["function"]["arguments"])
    assert why == "tool_calls" and call["function"]["name"] == "weather"
    assert told["city"] in ("Oslo", "Rome") and isinstance(told["days"], bool)


def test_a_conversation_goes_on_behind_a_call(make: Make, knowing: TextModel) -> None:
    client = make("3 degrees.")
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "weather", "arguments": '{"city": "Oslo"}'},
    }
    messages: Any = [
        USER,
        {"role": "assistant", "tool_calls": [call]},
        {"role": "tool", "tool_call_id": "call_1", "content": "3"},
    ]
    message, _ = both(client, messages=messages, tools=[WEATHER])
    assert message["content"] == "3 degrees."
    prompt = knowing.decode(make.service.requests[0].prompt.ids)  # type: ignore[attr-defined]
    assert '"arguments": {"city": "Oslo"}' in prompt and '"description": "How warm it is"' in prompt


@pytest.mark.parametrize(
    ("asked", "param", "said"),
    [
        ({"tool_choice": "required"}, "tool_choice", "needs tools"),
        ({"tools": [WEATHER], "tool_choice": "always"}, "tool_choice", "always"),
        (
            {"tools": [WEATHER], "tool_choice": {"type": "function", "function": {"name": "n"}}},
            "tool_choice",
            "weather",
        ),
        ({"tools": [{"type": "browser", "function": {"name": "x"}}]}, "tools[0].type", "functions"),
        (
            {
                "tools": [WEATHER],
                "tool_choice": "required",
                "response_format": {"type": "json_object"},
            },
            "response_format",
            "another format",
        ),
        (
            {"messages": [USER, {"role": "assistant", "tool_calls": [
                {"id": "1", "type": "function", "function": {"name": "f", "arguments": "{"}}]}]},
            "messages[1].tool_calls[0].function.arguments",
            "JSON",
        ),
    ],
)  # fmt: skip
def test_what_is_wrong_is_said(make: Make, asked: dict[str, Any], param: str, said: str) -> None:
    client = make("x")
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", **{"messages": [USER], **asked})
    assert caught.value.param == param and said in str(caught.value)


def test_a_template_without_tools_refuses_them(start: Start, text: TextModel) -> None:
    client = OpenAI(base_url=f"{start(Scripted(lambda r, a: [0]))}/v1", api_key="k", max_retries=0)
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=[USER], tools=[WEATHER])
    assert caught.value.param == "tools" and "gateway.tools" in str(caught.value)


def test_an_answer_may_think_before_it_keeps_a_schema(make: Make, knowing: TextModel) -> None:
    client = make()
    schema = {"enum": ["a", "b"]}
    asked: Any = {"type": "json_schema", "json_schema": {"name": "n", "schema": schema}}
    both(client, response_format=asked)
    grammar = make.service.requests[0].sampling.grammar  # type: ignore[attr-defined]
    for answer in ('"a"', '<think>"c"? {</think>\n"b"'):
        matcher = knowing.grammars.matcher(grammar)
        ids = knowing.encode(answer)
        for place, id in enumerate(ids):
            assert matcher.allowed(ids[:place])[id], answer[:place]
        assert matcher.allowed(ids)[0]
