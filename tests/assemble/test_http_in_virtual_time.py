"""The front door runs in virtual time too: HTTP, gateway, fleet, link and replica; executor and link are modelled."""

from __future__ import annotations

import asyncio
import json

import httpx

from penstock.assemble import assemble, load_config, modelled_leaves
from penstock.engine.folder import DEFAULT_FOLDER
from penstock.gateway.app import create_app
from penstock.gateway.config import GatewayConfig
from penstock.gateway.text import TextModel
from penstock.report.log import Digest
from penstock.sim.loop import run

SETS = ("fleet.0.executor.kind=modelled", "fleet.0.executor.gpu=l4", "fleet.0.replicas=2")
USERS, TURNS, TOKENS, THINK_S = 20, 5, 12, 30.0


def day() -> tuple[str, float, list[int]]:
    """Users who think half a minute between completions; what the log digest, the clock and they say."""
    log = Digest()
    told: list[int] = []

    async def user(http: httpx.AsyncClient, number: int) -> None:
        for turn in range(TURNS):
            await asyncio.sleep(THINK_S)
            body = {
                "model": "default",
                "prompt": [number * 7 + turn + place for place in range(40)],
                "max_tokens": TOKENS,
                "stream": True,
                "stream_options": {"include_usage": True},
            }
            answer = await http.post("/v1/completions", json=body)
            lines = [line for line in answer.text.splitlines() if line.startswith("data: {")]
            told.append(json.loads(lines[-1][6:])["usage"]["completion_tokens"])
            assert answer.text.endswith("data: [DONE]\n\n")

    async def main() -> float:
        service = await assemble(
            load_config(sets=SETS), modelled_leaves(load_config(sets=SETS), log)
        )
        config = GatewayConfig(thread_above_chars=None, request_prefix="day")
        app = create_app(service, {"default": TextModel.load(DEFAULT_FOLDER)}, config)
        transport = httpx.ASGITransport(app=app)
        async with httpx.AsyncClient(transport=transport, base_url="http://day") as http:
            await asyncio.gather(*(user(http, number) for number in range(USERS)))
        ended_at = asyncio.get_running_loop().time()
        await service.stop()
        return ended_at

    ended_at = run(main())
    return log.hexdigest(), ended_at, told


def test_a_day_of_completions_takes_no_time() -> None:
    digest, ended_at, told = day()
    assert told == [TOKENS] * (USERS * TURNS)
    assert TURNS * THINK_S < ended_at < TURNS * (THINK_S + 2)
    assert day()[:2] == (digest, ended_at)
