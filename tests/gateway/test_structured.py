"""`response_format` and `structured_outputs` through the official client; the service draws what the grammar allows."""

from __future__ import annotations

import json
from collections.abc import Sequence
from typing import Any

import numpy as np
import openai
import pytest
from openai import OpenAI
from pydantic import BaseModel

from penstock.core.types import Request
from penstock.gateway.text import TextModel
from tests.gateway.conftest import Start
from tests.gateway.scripted import Scripted

USER: Any = [{"role": "user", "content": "Hi"}]


@pytest.fixture
def service(text: TextModel) -> Scripted:
    def script(request: Request, answer: int) -> Sequence[int]:
        grammar = request.sampling.grammar
        if grammar is None:
            return [*text.encode("anything"), 0]
        matcher, ids = text.grammars.matcher(grammar), list[int]()
        drawn = np.random.default_rng(answer)
        while not ids or ids[-1] != 0:
            allowed = matcher.allowed(ids)
            ids.append(0 if allowed[0] else int(drawn.choice(np.flatnonzero(allowed)[:40])))
            assert len(ids) < 400
        return ids

    return Scripted(script)


@pytest.fixture
def client(start: Start, service: Scripted) -> OpenAI:
    return OpenAI(base_url=f"{start(service)}/v1", api_key="key", max_retries=0)


def format_of(schema: object, **more: object) -> Any:
    return {"type": "json_schema", "json_schema": {"name": "n", "schema": schema, **more}}


CODE = {
    "type": "object",
    "properties": {"code": {"type": "string", "pattern": "^[a-c]{3}$"}, "ok": {"type": "boolean"}},
    "required": ["code", "ok"],
    "additionalProperties": False,
}


def test_a_schema_is_kept_whole_and_streamed(client: OpenAI) -> None:
    told = client.chat.completions.create(
        model="tiny", messages=USER, response_format=format_of(CODE, strict=True)
    )
    answer = json.loads(told.choices[0].message.content or "")
    assert set(answer) == {"code", "ok"} and set(answer["code"]) <= set("abc")
    stream = client.chat.completions.create(
        model="tiny", messages=USER, response_format=format_of(CODE), stream=True
    )
    text = "".join(chunk.choices[0].delta.content or "" for chunk in stream)
    assert json.loads(text) == answer


def test_the_client_parses_its_own_models(client: OpenAI) -> None:
    """`parse` sends pydantic's schema and reads it back."""

    class Small(BaseModel):
        flag: bool
        sizes: list[bool]

    told = client.chat.completions.parse(model="tiny", messages=USER, response_format=Small)
    assert isinstance(told.choices[0].message.parsed, Small)


def test_json_objects_and_plain_text(client: OpenAI, service: Scripted) -> None:
    client.chat.completions.create(
        model="tiny", messages=USER, response_format={"type": "json_object"}
    )
    grammar = service.requests[-1].sampling.grammar
    assert grammar is not None and grammar.kind == "json_schema"
    told = client.chat.completions.create(
        model="tiny", messages=USER, response_format={"type": "text"}
    )
    assert told.choices[0].message.content == "anything"


@pytest.mark.parametrize(
    ("asked", "texts"),
    [
        ({"choice": ["red", "green"]}, {"red", "green"}),
        ({"regex": "(ab|ba)"}, {"ab", "ba"}),
        ({"grammar": 'root ::= "yes" | "no"'}, {"yes", "no"}),
        ({"grammar": 'start: "yes" | "no"'}, {"yes", "no"}),
        ({"json": {"enum": [1, 2]}}, {"1", "2"}),
        ({"json": '{"enum": [1, 2]}'}, {"1", "2"}),
    ],
)
def test_structured_outputs(client: OpenAI, asked: object, texts: set[str]) -> None:
    told = client.completions.create(
        model="tiny", prompt="a", max_tokens=50, n=3, extra_body={"structured_outputs": asked}
    )
    assert {choice.text for choice in told.choices} <= texts


@pytest.mark.parametrize(
    ("asked", "param", "said"),
    [
        ({"response_format": {"type": "yaml"}}, "response_format.type", "yaml"),
        ({"response_format": {"type": "json_schema"}}, "response_format.json_schema", "missing"),
        ({"response_format": format_of({"type": "objekt"})}, "response_format", "objekt"),
        ({"response_format": format_of({"$ref": "#/no"})}, "response_format", "no"),
        ({"structured_outputs": {"regex": "(a"}}, "structured_outputs", "unclosed"),
        ({"structured_outputs": {"grammar": "root ::= ("}}, "structured_outputs.grammar", "GBNF"),
        ({"structured_outputs": {"json": "{"}}, "structured_outputs.json", "schema"),
        ({"structured_outputs": {}}, "structured_outputs", "exactly one"),
        (
            {"structured_outputs": {"regex": "a", "choice": ["b"]}},
            "structured_outputs",
            "regex and choice",
        ),
        (
            {"structured_outputs": {"regex": "a"}, "response_format": {"type": "json_object"}},
            "response_format",
            "both",
        ),
        ({"structured_outputs": {"regex": "a"}, "min_tokens": 3}, "min_tokens", "stop"),
        ({"structured_outputs": {"regex": "a"}, "ignore_eos": True}, "ignore_eos", "stop"),
        ({"structured_outputs": {"regexp": "a"}}, "structured_outputs.regexp", "regexp"),
    ],
)
def test_what_is_wrong_is_said_before_anything_is_queued(
    client: OpenAI, service: Scripted, asked: dict[str, object], param: str, said: str
) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(model="tiny", messages=USER, extra_body=asked)
    assert caught.value.param == param
    assert said in str(caught.value)
    assert service.requests == []
