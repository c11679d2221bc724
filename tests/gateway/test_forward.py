"""Foreign servers behind the gateway, over real sockets: what callers get is what the server said, and what goes wrong
there is told as what it is, or not at all where another server could help."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import aiohttp
import openai
import pytest
from openai import AsyncOpenAI

from penstock.core.errors import BadConfig
from penstock.gateway.app import create_app
from penstock.gateway.config import GatewayConfig
from penstock.gateway.text import TextModel
from tests.gateway.scripted import Scripted
from tests.gateway.upstreams import (
    HEAD,
    Front,
    Rude,
    chunk,
    config_of,
    event,
    front,
    running,
    whole,
)

USER: Any = [{"role": "user", "content": "hello"}]
COUNT: Any = {"include_usage": True}
DONE = b"data: [DONE]\n\n"
GOOD = HEAD + chunk(event("one") + event("two")) + chunk(DONE) + b"0\r\n\r\n"


def client(url: str) -> AsyncOpenAI:
    return AsyncOpenAI(base_url=f"{url}/v1", api_key="key", max_retries=0, timeout=10)


async def ask(at: Front, **body: object) -> tuple[int, bytes]:
    told = {"model": "m", "messages": USER, "stream": True, **body}
    async with aiohttp.ClientSession() as http:
        async with http.post(f"{at.url}/v1/chat/completions", json=told) as answer:
            return answer.status, await answer.read()


async def until(condition: Any, timeout_s: float = 5.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0.01)


def gateway_of(service: Scripted, text: TextModel) -> Any:
    return create_app(service, dict.fromkeys(service.names, text), GatewayConfig(port=0))


async def test_answers_are_those_of_the_server_itself(service: Scripted, text: TextModel) -> None:
    """Penstock behind Penstock, read by OpenAI's client: straight and through."""
    service.num_cached = 3
    async with (
        running(gateway_of(service, text)) as url,
        front(config_of([url], "fleet.0.aliases=[]")) as at,
        client(url) as straight,
        client(at.url) as through,
    ):
        assert [each.id async for each in await through.models.list()] == ["tiny"]
        for number, call in enumerate((straight, through)):
            told = await call.chat.completions.create(
                model="tiny", messages=USER, n=2, stream=False
            )
            chunks = [
                each
                async for each in await call.chat.completions.create(
                    model="tiny", messages=USER, stream=True, stream_options=COUNT
                )
            ]
            plain = [
                each
                async for each in await call.completions.create(
                    model="tiny", prompt="Hello", stream=True, max_tokens=5
                )
            ]
            seen = (
                [choice.message.content for choice in told.choices],
                told.usage,
                "".join(each.choices[0].delta.content or "" for each in chunks if each.choices),
                chunks[-1].usage,
                "".join(each.choices[0].text for each in plain),
                plain[-1].choices[0].finish_reason,
                [each.usage for each in plain],  # it was not asked for
            )
            if number == 0:
                first = seen
        assert seen == first
        page = at.app.meter.text().decode()
        counts = {
            line.split()[0]: float(line.split()[1])
            for line in page.splitlines()
            if line.startswith("penstock:")
        }
        assert first[3] is not None
        tokens = first[3].completion_tokens
        assert counts['penstock:generation_tokens_total{model_name="tiny"}'] == 3 * tokens + 5
        assert counts['penstock:prefix_cache_hits_total{model_name="tiny"}'] == 3 + 3 + 1
        ended = 'penstock:request_success_total{finished_reason="%s",model_name="tiny"}'
        assert (counts[ended % "stop"], counts[ended % "length"]) == (2, 1)
        assert at.service.num_outstanding == 0


async def test_a_caller_that_leaves_ends_the_work_behind(
    service: Scripted, text: TextModel
) -> None:
    service.step_s = 0.02
    async with running(gateway_of(service, text)) as url, front(config_of([url])) as at:
        async with client(at.url) as call:
            stream = await call.chat.completions.create(model="tiny", messages=USER, stream=True)
            await anext(aiter(stream))
            await stream.close()
        await until(lambda: service.cancelled)
        await until(lambda: at.service.num_outstanding == 0)
        page = at.app.meter.text().decode()
        assert 'finished_reason="abort",model_name="tiny"} 1.0' in page


async def test_errors_of_the_server_are_the_caller_s_as_they_were(
    service: Scripted, text: TextModel
) -> None:
    async with (
        running(gateway_of(service, text)) as url,
        front(config_of([url])) as at,
        client(at.url) as call,
    ):
        with pytest.raises(openai.BadRequestError, match="temperture"):
            await call.chat.completions.create(
                model="tiny", messages=USER, extra_body={"temperture": 1}
            )
        with pytest.raises(openai.BadRequestError) as caught:
            await call.completions.create(model="tiny", prompt="a " * 600, max_tokens=4)
        assert caught.value.code == "context_length_exceeded"
        with pytest.raises(openai.NotFoundError, match="served: tiny"):
            await call.chat.completions.create(model="other", messages=USER)
        with pytest.raises(openai.BadRequestError, match="another server"):
            await call.post("../tokenize", body={"model": "tiny", "prompt": "a"}, cast_to=object)


@pytest.mark.parametrize(
    "bad",
    [
        Rude(whole(429, {"error": {"message": "full"}}, "retry-after: 7\r\n")),
        Rude(whole(500, {"error": {"message": "broken"}})),
        Rude(whole(503, {"message": "loading"})),
        Rude(whole(401, {"error": "who are you"})),
        Rude(b"", hangs_up=True),
        Rude(HEAD, hangs_up=True),
        Rude(whole(200, {"choices": []})),
    ],
    ids=["full", "broken", "loading", "key", "hangs up", "cut before a byte", "no stream"],
)
async def test_before_the_first_byte_another_server_is_asked(bad: Rude) -> None:
    good = Rude(GOOD)
    async with bad.up() as one, good.up() as two:
        config = config_of([one, two], "fleet.0.policy.route=round-robin")
        async with front(config) as at:
            for _ in range(2):
                status, body = await ask(at)
                assert status == 200 and body == event("one") + event("two") + DONE
        assert good.bodies[0]["stream_options"] == {"include_usage": True}
    async with bad.up() as one, front(config_of([one])) as at:
        status, body = await ask(at)  # nobody else is there
        told = json.loads(body)["error"]
        assert status in (429, 502, 503) and told["message"] and told["code"]


async def test_an_answer_that_is_cut_ends_in_an_error_and_is_not_said_twice() -> None:
    bad = Rude(HEAD + chunk(event("one")), hangs_up=True)
    good = Rude(GOOD)
    async with bad.up() as one, good.up() as two:
        async with front(config_of([one, two], "fleet.0.policy.route=round-robin")) as at:
            bodies = [(await ask(at))[1] for _ in range(2)]
        cut = next(body for body in bodies if b"error" in body)
        first, error, done = cut.decode().strip().split("\n\n")
        assert first == event("one").decode().strip() and done == "data: [DONE]"
        assert json.loads(error[6:])["error"]["code"] == "replica_lost"
    ended = Rude(HEAD + chunk(event("one")) + b"0\r\n\r\n")  # politely, but without [DONE]
    async with ended.up() as one, front(config_of([one])) as at:
        status, body = await ask(at)
        assert status == 502 and b"before it was complete" in body


async def test_a_silent_server_is_given_up_after_its_time() -> None:
    silent = Rude(HEAD + chunk(event("one")), goes_silent=True)
    async with silent.up() as one, front(config_of([one], idle_timeout_s=0.3)) as at:
        status, body = await ask(at)
        assert status == 200 and b"fell silent" in body
        await until(lambda: silent.num_left == 1)


async def test_a_server_that_goes_and_comes_back() -> None:
    good = Rude(GOOD, metrics="vllm:num_requests_running 5\nvllm:num_requests_waiting 2\n")
    async with good.up() as url:
        port = int(url.rpartition(":")[2])
    async with front(config_of([url], "fleet.0.name=m", back_off_s=0.1)) as at:
        status, body = await ask(at)
        assert status == 503 and json.loads(body)["error"]["code"] == "replica_lost"
        async with good.up(port):
            await until(lambda: at.service.reports()[0].is_alive)
            report = at.service.reports()[0]
            assert (report.num_running, report.num_waiting) == (5, 2)
            assert (await ask(at))[0] == 200
        await until(lambda: not at.service.reports()[0].is_alive)


async def test_whoever_finds_nobody_there_tells_the_others() -> None:
    one, two = Rude(GOOD), Rude(GOOD)
    async with one.up() as first:
        async with two.up() as second:
            config = config_of([first, second], "fleet.0.policy.route=round-robin", max_failures=9)
            at = front(config)
            seen = await at.__aenter__()
        for _ in range(2):
            assert (await ask(seen))[0] == 200
        assert [report.is_alive for report in seen.service.reports()] == [True, False]
        await at.__aexit__(None, None, None)
    assert (len(one.bodies), len(two.bodies)) == (2, 0)


async def test_each_server_may_have_its_own_name_for_the_model() -> None:
    one, two = Rude(GOOD, models=("x/m-8b", "other")), Rude(GOOD)
    async with one.up() as first, two.up() as second:
        sets = ("fleet.0.name=big", 'fleet.0.aliases=["also"]', "fleet.0.policy.route=round-robin")
        config = config_of([first, second], *sets, models={first: "x/m-8b"})
        async with front(config) as at:
            for name in ("big", "also"):
                for _ in range(2):
                    status, body = await ask(at, model=name, slo={"ttft_s": 1})
                    assert status == 200
            assert b'"model": "also"' in body and b'"model": "m"' not in body
        assert [body["model"] for body in one.bodies] == ["x/m-8b"] * 2
        assert [body["model"] for body in two.bodies] == ["m"] * 2
        assert "slo" not in one.bodies[0]
        with pytest.raises(BadConfig, match="does not serve 'big', but x/m-8b, other"):
            async with front(config_of([first, second], "fleet.0.name=big")):
                pass


async def test_servers_of_several_models_are_a_fleet_for_each() -> None:
    one, two = Rude(GOOD, models=("a", "b")), Rude(GOOD, models=("b",))
    async with one.up() as first, two.up() as second:
        async with front(config_of([first, second], "fleet.0.policy.route=round-robin")) as at:
            assert at.service.models() == ["a", "b"]
            for model in ("a", "a", "b", "b"):
                assert (await ask(at, model=model))[0] == 200
        assert [body["model"] for body in one.bodies] == ["a", "a", "b"]
        assert [body["model"] for body in two.bodies] == ["b"]


async def test_a_shared_beginning_goes_where_it_went_before() -> None:
    one, two = Rude(GOOD), Rude(GOOD)
    async with one.up() as first, two.up() as second, front(config_of([first, second])) as at:
        for user in "abcd" * 3:
            about = [{"role": "system", "content": user * 4000}, *USER]
            assert (await ask(at, messages=about))[0] == 200
        homes = [{str(body["messages"])[50] for body in each.bodies} for each in (one, two)]
        assert not homes[0] & homes[1] and homes[0] | homes[1] == set("abcd")


@pytest.mark.parametrize(
    ("sets", "why"),
    [
        (["fleet.0.replicas=2"], "replicas is of the servers"),
        (['fleet.0.policy.move={name="defragment"}'], "policy.move needs replicas"),
        (['fleet.0.adapters={a="/x"}'], "adapters is of the servers"),
        (['fleet.0.remote.urls=["host:8000"]'], "is not a URL"),
    ],
)
def test_what_a_foreign_server_cannot_be_told_is_refused(sets: list[str], why: str) -> None:
    with pytest.raises(BadConfig, match=why):
        config_of(["http://host:8000"], *sets)
