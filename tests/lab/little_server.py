"""A small OpenAI-compatible server with known delays and faults, over real sockets: what the client is held to.

Its tokens are words, and half words for words of eight letters and more. It cannot do anything else, which is the
point: the client must be right about servers that Penstock did not write.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from typing import Any

from aiohttp import web


@dataclass
class Little:
    """Settings, and what was asked of it."""

    prefill_s: float = 0.0
    token_s: float = 0.0
    per_event: int = 1
    refuses: frozenset[str] = frozenset()  # fields answered with 400
    has_usage: bool = True
    has_tokenize: bool = True
    context: int | None = 4096
    statuses: list[int] = field(
        default_factory=list
    )  # answered in turn after the probe, 200 = serve
    faults: list[str] = field(default_factory=list)
    key: str | None = None
    hold: int = 0  # answers wait until so many requests are open: a closed loop would wait for ever
    bodies: list[dict[str, Any]] = field(default_factory=list)
    at: list[float] = field(default_factory=list)
    num_open: int = 0
    most_open: int = 0
    num_cut: int = 0

    def app(self) -> web.Application:
        app = web.Application(client_max_size=1 << 26)
        app.router.add_get("/v1/models", self.models)
        app.router.add_post("/v1/completions", self.answer)
        app.router.add_post("/v1/chat/completions", self.answer)
        if self.has_tokenize:
            app.router.add_post("/tokenize", self.tokenize)
        return app

    async def models(self, request: web.Request) -> web.Response:
        if self.key is not None and request.headers.get("authorization") != f"Bearer {self.key}":
            return error(401, "invalid_api_key")
        told = {"id": "little", "object": "model", "max_model_len": self.context}
        return web.json_response({"object": "list", "data": [told]})

    async def tokenize(self, request: web.Request) -> web.Response:
        return web.json_response({"count": count((await request.json())["prompt"]), "tokens": []})

    async def answer(self, request: web.Request) -> web.StreamResponse:
        body = await request.json()
        if found := self.refuses & body.keys():
            return error(400, f"unknown_{found.pop()}")
        if body["max_tokens"] > 1 or "messages" in body:
            self.bodies.append(body)
            self.at.append(asyncio.get_running_loop().time())
            if self.statuses and (status := self.statuses.pop(0)) != 200:
                return error(status, "rate_limit_exceeded" if status == 429 else "")
        self.num_open += 1
        self.most_open = max(self.most_open, self.num_open)
        while body["max_tokens"] > 1 and self.most_open < self.hold:
            await asyncio.sleep(0.01)
        try:
            return await self.stream(request, body)
        except (ConnectionResetError, asyncio.CancelledError):
            self.num_cut += 1
            raise
        finally:
            self.num_open -= 1

    async def stream(self, request: web.Request, body: dict[str, Any]) -> web.StreamResponse:
        fault = self.faults.pop(0) if self.faults and body["max_tokens"] > 1 else ""
        is_chat = "messages" in body
        response = web.StreamResponse(headers={"content-type": "text/event-stream"})
        await response.prepare(request)

        async def say(event: dict[str, Any]) -> None:
            # In two writes: an event must not be expected to come in one piece.
            text = f"data: {json.dumps(event)}\n\n".encode()
            await response.write(text[:9])
            await response.write(text[9:])

        def choice(text: str, finish: str | None = None) -> dict[str, Any]:
            shown = {"delta": {"content": text}} if is_chat else {"text": text}
            return {"choices": [{"index": 0, "finish_reason": finish, **shown}]}

        if is_chat:
            await say({"choices": [{"index": 0, "delta": {"role": "assistant", "content": ""}}]})
        await asyncio.sleep(self.prefill_s)
        wanted = body["max_tokens"]
        for start in range(0, wanted, self.per_event):
            if fault and start >= wanted // 2:
                if fault == "error":
                    await say({"error": {"message": "it broke", "code": "step_failed"}})
                    return response
                assert request.transport is not None
                request.transport.close()
                return response
            if start:
                await asyncio.sleep(self.token_s * self.per_event)
            await say(choice(" word" * min(self.per_event, wanted - start)))
        await say(choice("", "length"))
        if self.has_usage and body.get("stream_options"):
            prompt = body.get("prompt") or " ".join(m["content"] for m in body["messages"])
            usage = {"prompt_tokens": count(prompt), "completion_tokens": wanted}
            await say({"choices": [], "usage": usage})
        await response.write(b"data: [DONE]\n\n")
        return response


def count(text: str) -> int:
    return sum(1 if len(word) < 8 else 2 for word in text.split())


def error(status: int, code: str) -> web.Response:
    return web.json_response({"error": {"message": f"no: {code}", "code": code}}, status=status)


@asynccontextmanager
async def serving(little: Little) -> AsyncIterator[str]:
    """The server's URL while it runs."""
    runner = web.AppRunner(little.app(), handler_cancellation=True, shutdown_timeout=0.1)
    await runner.setup()
    site = web.TCPSite(runner, "127.0.0.1", 0)
    await site.start()
    try:
        host, port = runner.addresses[0][:2]
        yield f"http://{host}:{port}"
    finally:
        await runner.cleanup()
