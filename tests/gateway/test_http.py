"""What HTTP clients see beside the answers: errors, keys, ids, CORS, health, metrics."""

from __future__ import annotations

import dataclasses
import json
import subprocess
import sys
from collections.abc import AsyncIterator
from typing import Any

import httpx
import pytest

from penstock.core.errors import BadConfig, PenstockError
from penstock.core.types import Request
from penstock.gateway import errors
from penstock.gateway.app import Gateway, create_app
from penstock.gateway.config import GatewayConfig
from penstock.gateway.server import listen
from penstock.gateway.text import TextModel
from tests.gateway.conftest import ANSWER
from tests.gateway.scripted import Scripted

COMPLETION = "/v1/completions"
CHAT = "/v1/chat/completions"
HELLO: dict[str, Any] = {"model": "tiny", "prompt": "Hello", "max_tokens": 100}


def app_of(service: Scripted, text: TextModel, **settings: Any) -> Gateway:
    return create_app(service, {"tiny": text}, GatewayConfig(**settings))


def client_of(app: Gateway) -> httpx.AsyncClient:
    return httpx.AsyncClient(transport=httpx.ASGITransport(app), base_url="http://penstock")


@pytest.fixture
async def http(service: Scripted, text: TextModel) -> AsyncIterator[httpx.AsyncClient]:
    async with client_of(app_of(service, text, max_body_bytes=2000)) as client:
        yield client


BAD: list[tuple[str, dict[str, Any], str | None, str]] = [
    (COMPLETION, {"temperature": "hot"}, "temperature", "expected `float"),
    (COMPLETION, {"temperature": -0.1}, "temperature", ">= 0"),
    (COMPLETION, {"top_p": 0}, "top_p", "> 0"),
    (COMPLETION, {"n": 0}, "n", ">= 1"),
    (COMPLETION, {"n": 1000}, "n", "at most 128"),
    (COMPLETION, {"max_tokens": 1.5}, "max_tokens", "expected `int"),
    (COMPLETION, {"max_tokens": 0}, "max_tokens", "at least 1"),
    (COMPLETION, {"temperture": 0.5}, "temperture", "did you mean 'temperature'"),
    (COMPLETION, {"zzzz": 1}, "zzzz", "Unrecognized"),
    (COMPLETION, {"slo": {"ttft": 1}}, "slo.ttft", "did you mean 'ttft_s'"),
    (COMPLETION, {"slo": {"ttft_s": 0}}, "slo.ttft_s", "> 0"),
    (COMPLETION, {"prompt": []}, "prompt", "empty or mixed"),
    (COMPLETION, {"prompt": ["a", 1]}, "prompt", "empty or mixed"),
    (COMPLETION, {"prompt": [[]]}, "prompt", "at least one token"),
    (COMPLETION, {"prompt": ""}, "prompt", "at least one token"),
    (COMPLETION, {"prompt": [10**6]}, "prompt", "token ids"),
    (COMPLETION, {"prompt": [-1]}, "prompt", "token ids"),
    (COMPLETION, {"prompt": None}, "prompt", "missing"),
    (COMPLETION, {"prompt": {"a": 1}}, "prompt", "got `object"),
    (COMPLETION, {"stop": ["a", ""]}, "stop", "empty"),
    (COMPLETION, {"stop": ["a"] * 65}, "stop", "at most 64"),
    (COMPLETION, {"logprobs": 21}, "logprobs", "at most 20"),
    (COMPLETION, {"best_of": 3}, "best_of", "equals n"),
    (COMPLETION, {"suffix": "end"}, "suffix", "not supported"),
    (COMPLETION, {"logit_bias": {"x": 1}}, "logit_bias", "not a token id"),
    (COMPLETION, {"logit_bias": {"1": 200}}, "logit_bias", "<= 100"),
    (COMPLETION, {"stream_options": {"include_usage": True}}, "stream_options", "stream is true"),
    (COMPLETION, {"seed": 2**70}, "seed", ""),
    (COMPLETION, {"stop_token_ids": [5, 10**6]}, "stop_token_ids", "1000000 is not a token id"),
    (COMPLETION, {"adapter": "lora-1"}, "adapter", "no adapters are served"),
    (CHAT, {"stop_token_ids": [10**6]}, "stop_token_ids", "not a token id"),
    (CHAT, {"adapter": "lora-1"}, "adapter", "no adapters are served"),
    (CHAT, {"messages": []}, "messages", "at least one"),
    (CHAT, {"messages": "Hi"}, "messages", "expected `array"),
    (CHAT, {}, "messages", "missing"),
    (CHAT, {"messages": [{"content": "Hi"}]}, "messages[0].role", "missing"),
    (CHAT, {"messages": [{"role": "cook", "content": "Hi"}]}, "messages[0].role", "not one of"),
    (CHAT, {"messages": [{"role": "user"}]}, "messages[0].content", "missing"),
    (
        CHAT,
        {"messages": [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}]},
        "messages[0].content[0]",
        "only text",
    ),
    (CHAT, {"top_logprobs": 3}, "top_logprobs", "needs logprobs"),
    (CHAT, {"max_completion_tokens": 0}, "max_completion_tokens", "at least 1"),
]


@pytest.mark.parametrize(("path", "fields", "param", "words"), BAD)
async def test_wrong_fields_are_named(
    http: httpx.AsyncClient, path: str, fields: dict[str, Any], param: str | None, words: str
) -> None:
    good: dict[str, Any] = dict(HELLO)
    if path == CHAT:
        good = {"model": "tiny"}
        if param is not None and not param.startswith("messages"):
            good["messages"] = [{"role": "user", "content": "Hi"}]
    told = await http.post(path, json=good | fields)
    assert told.status_code == 400, told.text
    error = told.json()["error"]
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert words in error["message"]


HARMLESS: list[dict[str, Any]] = [
    {"user": "me", "metadata": {"a": "b"}, "store": False, "service_tier": "auto"},
    {"response_format": {"type": "text"}, "tools": [], "tool_choice": "none"},
    {"modalities": ["text"], "parallel_tool_calls": True, "top_k": -1, "top_p": 1},
    {"stop": None, "n": None, "stream": None, "temperature": 0, "stream_options": None},
]


@pytest.mark.parametrize("fields", HARMLESS)
async def test_harmless_fields_are_taken(http: httpx.AsyncClient, fields: dict[str, Any]) -> None:
    chat = {"model": "tiny", "messages": [{"role": "user", "content": "Hi"}]}
    told = await http.post(CHAT, json=chat | fields)
    assert told.status_code == 200, told.text
    assert told.json()["choices"][0]["message"]["content"] == ANSWER


@pytest.mark.parametrize(
    "raw",
    [
        b"[" * 1900,
        b'{"user":' + b"[" * 1900,
        b'{"temperature": 1e999}',
        b"",
        b"{",
        b"[]",
        b'"x"',
        b"\xff\xfe",
        b'{"model": "\xff"}',
    ],
)
async def test_what_is_not_an_object_is_refused(http: httpx.AsyncClient, raw: bytes) -> None:
    told = await http.post(COMPLETION, content=raw)
    assert told.status_code == 400
    assert told.json()["error"]["message"]


async def test_half_a_surrogate_pair(http: httpx.AsyncClient) -> None:
    told = await http.post(COMPLETION, content=b'{"model": "tiny", "prompt": "\\ud800"}')
    assert told.status_code == 400


async def test_sizes(http: httpx.AsyncClient) -> None:
    told = await http.post(COMPLETION, json=HELLO | {"prompt": "x" * 3000})
    assert (told.status_code, told.json()["error"]["code"]) == (413, "body_too_large")

    async def parts() -> AsyncIterator[bytes]:
        for _ in range(30):
            yield b"x" * 100

    told = await http.post(COMPLETION, content=parts())
    assert told.status_code == 413


@pytest.mark.parametrize("room", [None, 1, 100])
async def test_context(service: Scripted, text: TextModel, room: int | None) -> None:
    async with client_of(app_of(service, text)) as http:
        ids = [5] * 500
        told = await http.post(
            COMPLETION, json={"model": "tiny", "prompt": ids, "max_tokens": room}
        )
        if room == 100:
            error = told.json()["error"]
            assert (told.status_code, error["code"]) == (400, "context_length_exceeded")
            assert "512" in error["message"] and "500" in error["message"]
        else:
            assert told.status_code == 200
            assert service.requests[0].sampling.max_tokens == (room or 12)
        told = await http.post(COMPLETION, json={"model": "tiny", "prompt": "x" * 10**6})
        assert told.json()["error"]["code"] == "context_length_exceeded"


@pytest.mark.parametrize(
    ("method", "path", "status", "code"),
    [
        ("GET", COMPLETION, 405, "method_not_allowed"),
        ("POST", "/v1/models", 405, "method_not_allowed"),
        ("GET", "/v1/nothing", 404, "unknown_url"),
        ("POST", "/v1/images/generations", 404, "unknown_url"),
        ("GET", "/v1/models/none", 404, "model_not_found"),
    ],
)
async def test_wrong_paths(
    http: httpx.AsyncClient, method: str, path: str, status: int, code: str
) -> None:
    told = await http.request(method, path)
    assert (told.status_code, told.json()["error"]["code"]) == (status, code)
    if status == 405:
        assert "allow" in told.headers


async def test_keys_guard_all_but_the_open_paths(service: Scripted, text: TextModel) -> None:
    keys = {"one": "anna", "two": "bert"}
    async with client_of(app_of(service, text, api_keys=keys, isolate_tenants=True)) as http:
        for path in ("/health", "/metrics", "/", "/version"):
            assert (await http.get(path)).status_code == 200
        for path in ("/v1/models", "/tokenize", "/v1/nothing"):
            told = await http.get(path)
            assert (told.status_code, told.json()["error"]["code"]) == (401, "invalid_api_key")
            assert told.headers["www-authenticate"] == "Bearer"
        for given in ("Bearer wrong", "Basic one", "Bearer", "one"):
            told = await http.post(COMPLETION, json=HELLO, headers={"authorization": given})
            assert told.status_code == 401
        for key in keys:
            good = {"authorization": f"bearer {key}"}
            assert (await http.post(COMPLETION, json=HELLO, headers=good)).status_code == 200
    first, second = service.requests
    assert (first.tenant, second.tenant) == ("anna", "bert")
    assert first.prompt.num_tokens >= 1 and first.prompt.blocks(1) != second.prompt.blocks(1)


async def test_request_ids(http: httpx.AsyncClient) -> None:
    fresh = {(await http.get("/health")).headers["x-request-id"] for _ in range(3)}
    assert len(fresh) == 3
    told = await http.post(COMPLETION, json=HELLO, headers={"x-request-id": "mine-1"})
    assert told.headers.get_list("x-request-id") == ["mine-1"]
    told = await http.get("/nothing", headers={"x-request-id": "x" * 500})
    assert len(told.headers["x-request-id"]) < 100


async def test_cors(service: Scripted, text: TextModel) -> None:
    site, other = {"origin": "https://site"}, {"origin": "https://other"}
    ask = {"access-control-request-method": "POST", "access-control-request-headers": "x-a"}
    async with client_of(app_of(service, text, cors_origins=("https://site",))) as http:
        told = await http.options(COMPLETION, headers=site | ask)
        assert told.status_code == 204
        assert told.headers["access-control-allow-origin"] == "https://site"
        assert told.headers["access-control-allow-headers"] == "x-a"
        assert "POST" in told.headers["access-control-allow-methods"]
        assert (await http.options(COMPLETION, headers=other | ask)).status_code == 400
        for path in (COMPLETION, "/v1/nothing"):
            told = await http.post(path, json=HELLO, headers=site)
            assert told.headers["access-control-allow-origin"] == "https://site"
            told = await http.post(path, json=HELLO, headers=other)
            assert "access-control-allow-origin" not in told.headers
    async with client_of(app_of(service, text, cors_origins=("*",))) as http:
        told = await http.get("/v1/models", headers=other)
        assert told.headers["access-control-allow-origin"] == "*"


async def test_health(service: Scripted, text: TextModel) -> None:
    app = app_of(service, text)
    async with client_of(app) as http:
        assert (await http.get("/health")).status_code == 200
        service.is_alive = False
        assert (await http.get("/health")).status_code == 503
        service.is_alive = True
        await app.drain()
        assert (await http.get("/health")).json() == {"status": "draining"}
        told = await http.post(COMPLETION, json=HELLO)
        assert (told.status_code, told.json()["error"]["code"]) == (503, "draining")
        assert int(told.headers["retry-after"]) >= 1


async def test_metrics(service: Scripted, text: TextModel, answer_ids: list[int]) -> None:
    service.num_cached = 1
    async with client_of(app_of(service, text)) as http:
        for fields in ({}, {"max_tokens": 2}, {"stream": True}):
            await http.post(COMPLETION, json=HELLO | fields)
        await http.post(COMPLETION, json=HELLO | {"max_tokens": 5000})
        service.fail_with = errors.Overloaded("full")
        await http.post(COMPLETION, json=HELLO)
        service.fail_with, service.fail_after = errors.ReplicaLost("lost"), 2
        await http.post(COMPLETION, json=HELLO | {"stream": True})
        lines = (await http.get("/metrics")).text.splitlines()
    series = dict(line.rsplit(" ", 1) for line in lines if not line.startswith("#"))
    values = {name: float(value) for name, value in series.items()}
    tiny = '{model_name="tiny"}'
    num_prompt = len(text.encode("Hello"))
    assert values[f"penstock:prompt_tokens_total{tiny}"] == 3 * num_prompt
    assert values[f"penstock:generation_tokens_total{tiny}"] == 2 * len(answer_ids) + 4
    assert values[f"penstock:prefix_cache_hits_total{tiny}"] == 3
    finished = 'penstock:request_success_total{finished_reason="%s",model_name="tiny"}'
    assert (values[finished % "stop"], values[finished % "length"]) == (2, 1)
    for name in ("time_to_first_token", "time_per_output_token", "e2e_request_latency"):
        assert values[f"penstock:{name}_seconds_count{tiny}"] == 3
    assert values['penstock:kv_cache_usage_perc{engine="replica-0"}'] == 0.25
    assert values['penstock:num_requests_running{engine="replica-0"}'] == 0
    drafts = [
        values[f'penstock:spec_decode_{name}{{engine="replica-0"}}']
        for name in (
            "num_draft_tokens_total",
            "num_accepted_tokens_total",
            "acceptance_rate",
        )
    ]
    assert drafts == [8, 6, 0.75]
    lanes = [values[f'penstock:lane_share{{engine="replica-0",lane="{lane}"}}'] for lane in (0, 1)]
    assert lanes == [0.6, 0]
    assert values['penstock:lane_tokens{engine="replica-0",lane="0"}'] == 128
    assert values[f"penstock:num_requests_in_flight{tiny}"] == 0
    refused = 'penstock:request_failure_total{code="rate_limit_exceeded",model_name="tiny"}'
    assert values[refused] == 1
    assert values[refused.replace("rate_limit_exceeded", "replica_lost")] == 1


@pytest.mark.parametrize("stream", [False, True])
async def test_cached_tokens_of_answers_that_a_stop_string_ended(
    service: Scripted, text: TextModel, stream: bool
) -> None:
    """The replica says with every output what it found in its cache; the last of them is never heard."""
    service.num_cached, service.says_cached_always = 1, True
    async with client_of(app_of(service, text)) as http:
        fields: dict[str, Any] = {"stop": "world", "n": 2}
        if stream:
            fields |= {"stream": True, "stream_options": {"include_usage": True}}
        told = (await http.post(COMPLETION, json=HELLO | fields)).text
        if stream:
            told = told.split("\n\n")[-3].removeprefix("data: ")
        metrics = (await http.get("/metrics")).text
    assert json.loads(told)["usage"]["prompt_tokens_details"]["cached_tokens"] == 1
    assert 'penstock:prefix_cache_hits_total{model_name="tiny"} 1.0' in metrics


async def test_no_more_tokens_are_cached_than_the_prompt_has(
    service: Scripted, text: TextModel
) -> None:
    service.num_cached = 300  # preempted, and its own output was in the cache when it came back
    async with client_of(app_of(service, text)) as http:
        usage = (await http.post(COMPLETION, json=HELLO)).json()["usage"]
    assert usage["prompt_tokens_details"]["cached_tokens"] == usage["prompt_tokens"]


async def test_tokenize_and_back(http: httpx.AsyncClient, text: TextModel) -> None:
    told = (await http.post("/tokenize", json={"model": "tiny", "prompt": "Hello 🐢"})).json()
    assert told["tokens"] == text.encode("Hello 🐢") and told["max_model_len"] == 512
    back = await http.post("/detokenize", json={"model": "tiny", "tokens": told["tokens"]})
    assert back.json() == {"prompt": "Hello 🐢"}
    chat = {"messages": [{"role": "user", "content": "Hi"}]}
    told = (await http.post("/tokenize", json=chat)).json()
    assert told["tokens"] == text.encode("<|user|>Hi<|end|><|assistant|>")
    assert (await http.post("/tokenize", json={"prompt": "a"} | chat)).status_code == 400


async def test_the_playground_is_one_page(http: httpx.AsyncClient) -> None:
    told = await http.get("/")
    assert told.headers["content-type"].startswith("text/html")
    assert "<main" in told.text and "//cdn" not in told.text and 'src="http' not in told.text


async def test_what_nobody_expected_is_a_plain_500(service: Scripted, text: TextModel) -> None:
    service.fail_with = ZeroDivisionError("secret detail")
    async with client_of(app_of(service, text)) as http:
        told = await http.post(COMPLETION, json=HELLO)
    assert told.status_code == 500
    assert told.json()["error"]["type"] == "server_error" and "secret" not in told.text


async def test_a_service_that_stops_short_is_an_error(service: Scripted, text: TextModel) -> None:
    async def submit(request: Request, on_output: object = None) -> None:
        return None

    service.submit = submit  # type: ignore[method-assign]
    async with client_of(app_of(service, text)) as http:
        assert (await http.post(COMPLETION, json=HELLO)).status_code == 500
        assert (await http.post(COMPLETION, json=HELLO | {"stream": True})).status_code == 500


async def test_long_prompts_are_tokenised_in_a_thread(service: Scripted, text: TextModel) -> None:
    async with client_of(app_of(service, text, thread_above_chars=10)) as http:
        told = await http.post(COMPLETION, json=HELLO | {"prompt": "Hello world " * 20})
        assert told.json()["choices"][0]["text"] == ANSWER


def test_every_error_has_a_face() -> None:
    def below(cls: type[PenstockError]) -> set[type[PenstockError]]:
        return {cls}.union(*(below(kind) for kind in cls.__subclasses__()))

    ours = ("penstock.core.", "penstock.gateway.")
    for cls in (cls for cls in below(PenstockError) if cls.__module__.startswith(ours)):
        error = cls("words", hint="do this", param="p")
        shown = errors.error_body(error)["error"]
        assert isinstance(shown, dict) and shown["message"] == "words (do this)"
        assert 400 <= errors.face(error).status < 600
        if error.fault == "caller" and issubclass(cls, errors.BadRequest):
            assert errors.face(error).status < 500
        if error.retry == "later":
            assert dict(errors.error_headers(error, 1.0))[b"retry-after"] == b"1"


def test_configuration_says_what_is_wrong() -> None:
    senseless: list[tuple[str, Any]] = [
        ("port", 70000), ("host", ""), ("max_queue", 0), ("max_logprobs", -1),
        ("thread_above_chars", -1), ("stall_timeout_s", -1.0), ("stall_timeout_s", 0.0),
        ("stall_timeout_s", float("nan")), ("retry_after_s", -0.5), ("retry_after_s", float("inf")),
        ("request_prefix", ""), ("cors_origins", ("",)),
    ]  # fmt: skip
    for name, value in senseless:
        with pytest.raises(ValueError, match=name):
            GatewayConfig(**{name: value})
    GatewayConfig(stall_timeout_s=None, thread_above_chars=None, max_logprobs=0, retry_after_s=0.0)
    assert dataclasses.is_dataclass(GatewayConfig)
    taken = listen("127.0.0.1", 0)
    with taken, pytest.raises(BadConfig, match="cannot listen"):
        listen("127.0.0.1", taken.getsockname()[1])


def test_the_gateway_needs_no_torch() -> None:
    code = "import sys, penstock.gateway.server; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


async def test_streams_are_well_formed(http: httpx.AsyncClient) -> None:
    told = await http.post(COMPLETION, json=HELLO | {"stream": True})
    assert told.headers["content-type"].startswith("text/event-stream")
    events = told.text.split("\n\n")
    assert events[-2:] == ["data: [DONE]", ""]
    chunks = [json.loads(event.removeprefix("data: ")) for event in events[:-2]]
    assert {chunk["object"] for chunk in chunks} == {"text_completion"}
    assert all("usage" not in chunk for chunk in chunks)
