"""The official `openai` client against the gateway: its documented calls, and its classes for our errors."""

from __future__ import annotations

import asyncio
import time

import openai
import pytest
from openai import AsyncOpenAI, OpenAI

from penstock.core.errors import Overloaded, ReplicaLost, StepFailed
from penstock.core.types import Request
from penstock.gateway.text import TextModel
from tests.gateway.conftest import ANSWER, CONTEXT, Start
from tests.gateway.scripted import Scripted

USER = {"role": "user", "content": "Hi"}


def client_of(url: str, **more: object) -> OpenAI:
    return OpenAI(base_url=f"{url}/v1", api_key="key", max_retries=0, **more)  # type: ignore[arg-type]


@pytest.fixture
def client(start: Start, service: Scripted) -> OpenAI:
    return client_of(start(service))


def test_models(client: OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["tiny"]
    assert client.models.retrieve("tiny").owned_by == "penstock"
    with pytest.raises(openai.NotFoundError) as caught:
        client.models.retrieve("huge")
    assert caught.value.code == "model_not_found"


def test_completion(client: OpenAI, text: TextModel, answer_ids: list[int]) -> None:
    told = client.completions.create(model="tiny", prompt="Hello", max_tokens=100)
    assert told.object == "text_completion"
    assert told.id.startswith("cmpl-")
    assert told.choices[0].text == ANSWER
    assert told.choices[0].finish_reason == "stop"
    assert told.usage is not None
    assert told.usage.prompt_tokens == len(text.encode("Hello"))
    assert told.usage.completion_tokens == len(answer_ids)


def test_completion_defaults_to_sixteen_tokens(client: OpenAI, service: Scripted) -> None:
    told = client.completions.create(model="tiny", prompt="Hello")
    assert told.choices[0].finish_reason == "length"
    assert told.usage is not None and told.usage.completion_tokens == 16
    assert service.requests[0].sampling.temperature == 1.0


def test_streaming_completion(client: OpenAI) -> None:
    stream = client.completions.create(model="tiny", prompt="Hello", max_tokens=100, stream=True)
    chunks = list(stream)
    assert "".join(chunk.choices[0].text for chunk in chunks) == ANSWER
    assert [chunk.choices[0].finish_reason for chunk in chunks][-1] == "stop"
    assert len({chunk.id for chunk in chunks}) == 1


def test_several_prompts_and_answers(start: Start, text: TextModel) -> None:
    def script(request: Request, answer: int) -> list[int]:
        return [*text.encode(f"{request.prompt.num_tokens} {answer}"), 0]

    service = Scripted(script)
    client = client_of(start(service))
    told = client.completions.create(model="tiny", prompt=[[5, 6], [7, 8, 9]], n=2)
    assert [(choice.index, choice.text) for choice in told.choices] == [
        (0, "2 0"),
        (1, "2 1"),
        (2, "3 0"),
        (3, "3 1"),
    ]
    assert len({request.id for request in service.requests}) == 2
    stream = client.completions.create(model="tiny", prompt=["a", "b"], n=2, stream=True)
    texts = [""] * 4
    for chunk in stream:
        texts[chunk.choices[0].index] += chunk.choices[0].text
    assert texts == ["1 0", "1 1", "1 0", "1 1"]


def test_chat(client: OpenAI, service: Scripted, text: TextModel) -> None:
    told = client.chat.completions.create(
        model="tiny",
        messages=[
            {"role": "developer", "content": "Be brief"},
            {"role": "user", "content": [{"type": "text", "text": "Hello"}]},
        ],
        temperature=0.5,
        top_p=0.9,
        seed=7,
        max_completion_tokens=50,
        frequency_penalty=0.1,
        presence_penalty=0.2,
        logit_bias={"5": -100},
        user="me",
        metadata={"a": "b"},
    )
    assert told.object == "chat.completion"
    assert told.choices[0].message.role == "assistant"
    assert told.choices[0].message.content == ANSWER
    request = service.requests[0]
    assert text.tokenizer.decode(list(request.prompt.ids), skip_special_tokens=False) == (  # type: ignore[attr-defined]
        "<|system|>Be brief<|end|><|user|>Hello<|end|><|assistant|>"
    )
    sampling = request.sampling
    assert (sampling.temperature, sampling.top_p, sampling.seed) == (0.5, 0.9, 7)
    assert (sampling.max_tokens, sampling.logit_bias) == (50, ((5, -100.0),))
    assert (sampling.frequency_penalty, sampling.presence_penalty) == (0.1, 0.2)


def test_chat_may_use_the_rest_of_the_context(client: OpenAI, service: Scripted) -> None:
    client.chat.completions.create(model="tiny", messages=[USER])  # type: ignore[list-item]
    request = service.requests[0]
    assert request.sampling.max_tokens == CONTEXT - request.prompt.num_tokens


def test_chat_streaming_with_usage(start: Start, service: Scripted) -> None:
    service.num_cached = 2
    stream = client_of(start(service)).chat.completions.create(
        model="tiny",
        messages=[USER],  # type: ignore[list-item]
        stream=True,
        stream_options={"include_usage": True},
    )
    chunks = list(stream)
    assert chunks[0].choices[0].delta.role == "assistant"
    assert "".join(c.choices[0].delta.content or "" for c in chunks if c.choices) == ANSWER
    assert all(chunk.usage is None for chunk in chunks[:-1])
    usage = chunks[-1].usage
    assert chunks[-1].choices == [] and usage is not None
    assert usage.total_tokens == usage.prompt_tokens + usage.completion_tokens
    assert usage.prompt_tokens_details is not None
    assert usage.prompt_tokens_details.cached_tokens == 2


def test_chat_stream_helper(client: OpenAI) -> None:
    """The client's own accumulator of events."""
    with client.chat.completions.stream(model="tiny", messages=[USER]) as stream:  # type: ignore[list-item]
        for _ in stream:
            pass
        told = stream.get_final_completion()
    assert told.choices[0].message.content == ANSWER


def test_stop_strings(client: OpenAI, service: Scripted) -> None:
    told = client.completions.create(
        model="tiny", prompt="Hello", max_tokens=100, stop=["quick", " 🐢 s"]
    )
    assert told.choices[0].text == "Hello world, żółw"
    assert told.choices[0].finish_reason == "stop"
    stream = client.completions.create(
        model="tiny", prompt="Hello", max_tokens=100, stop="the quick", stream=True
    )
    assert "".join(chunk.choices[0].text for chunk in stream) == "Hello world, żółw 🐢 said: "


def test_chat_logprobs(client: OpenAI, answer_ids: list[int]) -> None:
    told = client.chat.completions.create(
        model="tiny",
        messages=[USER],  # type: ignore[list-item]
        logprobs=True,
        top_logprobs=2,
    )
    assert told.choices[0].logprobs is not None
    content = told.choices[0].logprobs.content
    assert content is not None
    assert [entry.logprob for entry in content] == [-id / 100 for id in answer_ids[:-1]]
    assert b"".join(bytes(entry.bytes or []) for entry in content) == ANSWER.encode()
    assert all(len(entry.top_logprobs) == 2 for entry in content)


def test_completion_logprobs_and_echo(
    client: OpenAI, text: TextModel, answer_ids: list[int]
) -> None:
    told = client.completions.create(
        model="tiny", prompt="Hello 🐢", max_tokens=100, logprobs=1, echo=True
    )
    choice = told.choices[0]
    assert choice.text == "Hello 🐢" + ANSWER
    logprobs = choice.logprobs
    assert logprobs is not None
    assert logprobs.tokens is not None and logprobs.text_offset is not None
    assert logprobs.token_logprobs is not None
    prompt_ids = text.encode("Hello 🐢")
    assert logprobs.token_logprobs[0] is None
    ids = [*prompt_ids[1:], *answer_ids[:-1]]
    assert logprobs.token_logprobs[1:] == [-id / 100 for id in ids]
    for token, offset in zip(logprobs.tokens, logprobs.text_offset, strict=True):
        if not token.startswith("bytes:"):
            assert choice.text[offset : offset + len(token)] == token


def test_echo_alone_scores_the_prompt(client: OpenAI, text: TextModel) -> None:
    told = client.completions.create(
        model="tiny", prompt="Hello world", max_tokens=0, logprobs=0, echo=True
    )
    choice = told.choices[0]
    assert choice.text == "Hello world"
    assert choice.logprobs is not None
    assert len(choice.logprobs.token_logprobs or []) == len(text.encode("Hello world"))
    assert told.usage is not None and told.usage.completion_tokens == 0


def test_streamed_logprobs_follow_their_text(client: OpenAI, answer_ids: list[int]) -> None:
    stream = client.completions.create(
        model="tiny", prompt="Hello", max_tokens=100, logprobs=0, stop="quick", stream=True
    )
    told, values, offsets = "", [], []
    for chunk in stream:
        told += chunk.choices[0].text
        logprobs = chunk.choices[0].logprobs
        if logprobs is not None:
            values += logprobs.token_logprobs or []
            offsets += logprobs.text_offset or []
    assert told == ANSWER.split("quick")[0]
    assert values == [-id / 100 for id in answer_ids[: len(values)]]
    assert offsets == sorted(offsets) and offsets[-1] < len(told)


def test_our_fields_ride_in_extra_body(client: OpenAI, service: Scripted) -> None:
    client.completions.create(
        model="tiny",
        prompt="Hello",
        extra_body={
            "slo": {"ttft_s": 0.5, "deadline_s": 3, "weight": 2},
            "priority": -1,
            "program": "run-1",
            "cache_salt": "pepper",
            "top_k": 5,
            "min_p": 0.1,
            "min_tokens": 3,
            "ignore_eos": True,
            "stop_token_ids": [9],
            "repetition_penalty": 1.1,
        },
    )
    request = service.requests[0]
    assert (request.slo.ttft_s, request.slo.tpot_s, request.slo.deadline_s) == (0.5, None, 3)
    assert (request.slo.weight, request.priority, request.program) == (2, -1, "run-1")
    sampling = request.sampling
    assert (sampling.top_k, sampling.min_p, sampling.min_tokens) == (5, 0.1, 3)
    assert (sampling.ignore_eos, sampling.stop_ids) == (True, (9,))
    assert request.cache_salt == "pepper"


def test_bad_requests(client: OpenAI) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="Hello", temperature=-1)
    assert caught.value.param == "temperature"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt="x" * 5000, max_tokens=1000)
    assert caught.value.code == "context_length_exceeded"
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(
            model="tiny",
            messages=[USER],  # type: ignore[list-item]
            tools=[{"type": "function", "function": {"name": "f"}}],
        )
    assert caught.value.param == "tools"
    with pytest.raises(openai.NotFoundError):
        client.completions.create(model="huge", prompt="Hello")


def test_keys(start: Start, service: Scripted) -> None:
    url = start(service, api_keys={"right": "anna"})
    with pytest.raises(openai.AuthenticationError) as caught:
        client_of(url).models.list()
    assert caught.value.code == "invalid_api_key"
    good = OpenAI(base_url=f"{url}/v1", api_key="right")
    good.completions.create(model="tiny", prompt="Hello")
    assert service.requests[0].tenant == "anna"


def test_a_full_queue_says_when_to_come_back(start: Start, service: Scripted) -> None:
    service.fail_with = Overloaded("the queue is full", retry_after_s=6.2)
    with pytest.raises(openai.RateLimitError) as caught:
        client_of(start(service)).completions.create(model="tiny", prompt="Hello")
    assert caught.value.response.headers["retry-after"] == "7"


def test_the_gateways_own_limit(start: Start, service: Scripted) -> None:
    """It counts answers: prompts times n. What could never fit is the caller's to change."""
    client = client_of(start(service, max_queue=4))
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt=["a"] * 5)
    assert caught.value.param == "prompt"
    with pytest.raises(openai.BadRequestError) as caught:
        client.completions.create(model="tiny", prompt=["a", "b"], n=3)
    assert caught.value.param == "n"
    for _ in range(3):
        client.completions.create(model="tiny", prompt=["a", "b"], n=2)
    service.step_s = 0.01
    stream = client.completions.create(model="tiny", prompt="a", n=3, max_tokens=100, stream=True)
    next(iter(stream))
    with pytest.raises(openai.RateLimitError):
        client.completions.create(model="tiny", prompt="b", n=2)
    client.completions.create(model="tiny", prompt="b", max_tokens=1)
    stream.close()


def test_draining(start: Start, service: Scripted) -> None:
    service.is_draining = True
    with pytest.raises(openai.InternalServerError) as caught:
        client_of(start(service)).completions.create(model="tiny", prompt="Hello")
    assert caught.value.status_code == 503 and "retry-after" in caught.value.response.headers


@pytest.mark.parametrize("bundle", [1, 3])
def test_a_failure_inside_a_stream_is_an_event(
    start: Start, service: Scripted, bundle: int
) -> None:
    service.fail_with, service.fail_after, service.bundle = ReplicaLost("it died"), 2, bundle
    stream = client_of(start(service)).completions.create(
        model="tiny", prompt="Hello", max_tokens=100, stream=True
    )
    told = ""
    with pytest.raises(openai.APIError, match="it died"):
        for chunk in stream:
            told += chunk.choices[0].text
    assert told and ANSWER.startswith(told)


def test_a_failure_before_the_stream_has_its_status(start: Start, service: Scripted) -> None:
    service.fail_with, service.fail_after = StepFailed("a step failed"), 0
    with pytest.raises(openai.InternalServerError) as caught:
        client_of(start(service)).completions.create(model="tiny", prompt="Hello", stream=True)
    assert caught.value.status_code == 500


def wait_until(is_so: object) -> None:
    """A condition of another thread, given time."""
    deadline = time.monotonic() + 10
    while not is_so():  # type: ignore[operator]
        assert time.monotonic() < deadline, "it never became so"
        time.sleep(0.002)


def test_leaving_a_stream_frees_the_request(start: Start, service: Scripted) -> None:
    service.step_s = 0.01
    stream = client_of(start(service)).completions.create(
        model="tiny", prompt="Hello", max_tokens=100, stream=True
    )
    next(iter(stream))
    assert service.running
    stream.close()
    wait_until(lambda: service.cancelled)
    assert not service.running


def test_a_timeout_frees_the_request(start: Start, service: Scripted) -> None:
    service.step_s = 30
    client = client_of(start(service), timeout=0.2)
    with pytest.raises(openai.APITimeoutError):
        client.completions.create(model="tiny", prompt="Hello")
    wait_until(lambda: service.cancelled)


def test_an_early_stop_frees_the_request(start: Start, service: Scripted) -> None:
    service.step_s = 0.002
    client = client_of(start(service))
    client.completions.create(model="tiny", prompt="Hello", max_tokens=100, stop="world")
    wait_until(lambda: service.cancelled)
    client.completions.create(model="tiny", prompt="Hello", max_tokens=100)
    wait_until(lambda: len(service.finished) == 1)
    assert len(service.cancelled) == 1, "an answer that ended by itself is not cancelled"


async def test_the_async_client(start: Start, service: Scripted) -> None:
    service.step_s = 0.001
    url = start(service)
    async with AsyncOpenAI(base_url=f"{url}/v1", api_key="key", max_retries=0) as client:
        assert [model.id async for model in client.models.list()] == ["tiny"]

        async def one() -> str:
            stream = await client.chat.completions.create(
                model="tiny",
                messages=[USER],  # type: ignore[list-item]
                stream=True,
                stream_options={"include_usage": True},
            )
            return "".join([c.choices[0].delta.content or "" async for c in stream if c.choices])

        assert await asyncio.gather(*(one() for _ in range(20))) == [ANSWER] * 20
        told = await client.completions.create(model="tiny", prompt="Hello", n=2, max_tokens=100)
        assert [choice.text for choice in told.choices] == [ANSWER, ANSWER]
        with pytest.raises(openai.BadRequestError):
            await client.completions.create(model="tiny", prompt="")


async def test_cancelling_an_async_call_frees_the_request(start: Start, service: Scripted) -> None:
    service.step_s = 30
    async with AsyncOpenAI(base_url=f"{start(service)}/v1", api_key="key") as client:
        call = asyncio.create_task(client.completions.create(model="tiny", prompt="Hello"))
        while not service.running:
            await asyncio.sleep(0.002)
        call.cancel()
        with pytest.raises(asyncio.CancelledError):
            await call
        while not service.cancelled:
            await asyncio.sleep(0.002)
