"""A client of any OpenAI-compatible server: streams one answer and notes when its tokens came.

    async with Client("http://127.0.0.1:8000") as client:
        server = await client.probe()
        reading = await client.ask(Wish(prompt="once upon", max_tokens=20))

Instants are those of the running loop, taken when bytes arrive. A token counts when its text (or its end) shows; a
server that sends several in one event gives fewer gaps than tokens. Counts are the server's usage, else events.

Not every server takes every field: `probe` sends one short request with all that would be nice (an SLO, a priority,
ignore_eos, usage in streams) and, when it is refused, finds out which of them the server takes.
"""

from __future__ import annotations

from collections.abc import AsyncIterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field, replace
from types import TracebackType
from typing import Literal, Self

import aiohttp
import msgspec

from penstock.core.clock import now
from penstock.core.errors import BadRequest
from penstock.lab.stream import (
    Counted,
    Event,
    Failed,
    Model,
    Models,
    Reading,
    check,
    decoded,
    reaching,
)

Extra = Literal["slo", "priority", "ignore_eos", "usage"]
EXTRAS: tuple[Extra, ...] = ("slo", "priority", "ignore_eos", "usage")
CONNECT_S = 10.0
MAX_EVENT_BYTES = 1 << 24


@dataclass(frozen=True, slots=True, kw_only=True)
class Server:
    """What the probe found. `max_context` None: it does not say."""

    model: str
    max_context: int | None
    extras: tuple[Extra, ...]
    models: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True, kw_only=True)
class Wish:
    """One request as the client sends it. `prompt` is text, or the messages of a chat."""

    prompt: str | list[dict[str, str]]
    max_tokens: int | None = None
    tenant: str = "default"
    slo: dict[str, float] = field(default_factory=dict)
    priority: int | None = None
    is_exact: bool = False  # wants max_tokens tokens, whatever ends the text earlier


class Client:
    """See the module's text. `is_chat`: use chat completions for text prompts too."""

    def __init__(
        self,
        url: str,
        *,
        api_key: str | None = None,
        model: str | None = None,
        is_chat: bool = False,
        timeout_s: float = 600.0,
    ) -> None:
        self.url = root_url(url)
        self._api_key, self._is_chat = api_key, is_chat
        self._timeout_s = timeout_s
        self._session: aiohttp.ClientSession | None = None
        self.server = Server(model=model or "", max_context=None, extras=EXTRAS)

    async def __aenter__(self) -> Self:
        headers = {"authorization": f"Bearer {self._api_key}"} if self._api_key else {}
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(limit=0),
            timeout=aiohttp.ClientTimeout(total=self._timeout_s, sock_connect=CONNECT_S),
            headers=headers,
            read_bufsize=MAX_EVENT_BYTES,
        )
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._session is not None:
            await self._session.close()

    # ------------------------------------------------------------------ what a server is

    async def probe(self) -> Server:
        """Find the model and what the server takes. Raises PenstockError when it cannot serve at all."""
        await self.find_model()
        if not await self._takes(EXTRAS):
            await self._try(())  # what it dislikes about the request itself comes up here
            taken = [extra for extra in EXTRAS if await self._takes((extra,))]
            self.server = replace(self.server, extras=tuple(taken))
        return self.server

    async def _takes(self, extras: tuple[Extra, ...]) -> bool:
        try:
            await self._try(extras)
        except Failed as error:
            if error.status in (400, 422):
                return False
            raise
        return True

    async def _try(self, extras: tuple[Extra, ...]) -> None:
        self.server = replace(self.server, extras=extras)
        await self.ask(
            Wish(
                prompt="one two three",
                max_tokens=1,
                slo={"ttft_s": 60.0},
                priority=0,
                is_exact=True,
            )
        )

    async def find_model(self) -> Server:
        """Take the named model, or the first the server lists."""
        listed = await self._get_models()
        names = tuple(model.id for model in listed)
        wanted = self.server.model or (names[0] if names else "")
        if not wanted:
            raise BadRequest(f"{self.url} lists no model", hint="name one with --model")
        if names and wanted not in names:
            shown = ", ".join(names[:8])
            raise BadRequest(f"{self.url} serves no model {wanted!r}", hint=f"it serves: {shown}")
        context = next((each.max_model_len for each in listed if each.id == wanted), None)
        self.server = replace(self.server, model=wanted, max_context=context, models=names)
        return self.server

    async def _get_models(self) -> list[Model]:
        with self._reaching():
            async with self._open().get(f"{self.url}/v1/models") as response:
                await check(response)
                try:
                    return msgspec.json.decode(await response.read(), type=Models).data
                except msgspec.MsgspecError:
                    raise BadRequest(
                        f"{self.url} does not answer like an OpenAI-compatible server",
                        hint="give the address in front of /v1, for example http://127.0.0.1:8000",
                    ) from None

    async def count_tokens(self, text: str) -> int | None:
        """What the server's /tokenize says of a text; None when it has none."""
        body = {"model": self.server.model, "prompt": text, "add_special_tokens": False}
        with self._reaching():
            async with self._open().post(f"{self.url}/tokenize", json=body) as response:
                if response.status != 200:
                    return None
                try:
                    return msgspec.json.decode(await response.read(), type=Counted).count
                except msgspec.MsgspecError:
                    return None

    # ------------------------------------------------------------------ asking

    async def ask(self, wish: Wish, reading: Reading | None = None) -> Reading:
        """Stream one answer and note its times, in `reading` as they come. Raises Failed."""
        reading = Reading() if reading is None else reading
        async for at, event in self._events(wish):
            reading.take(event, at)
        if reading.finish is None:
            raise Failed("cut off", "the server ended the stream before the answer was finished")
        return reading

    async def tell(self, wish: Wish) -> AsyncIterator[str]:
        """Stream one answer's text. Raises Failed."""
        async for _, event in self._events(wish):
            for choice in event.choices:
                if choice.shown():
                    yield choice.shown()

    async def _events(self, wish: Wish) -> AsyncIterator[tuple[float, Event]]:
        path, body = self._body(wish)
        with self._reaching():
            async with self._open().post(self.url + path, json=body) as response:
                await check(response)
                rest = b""
                async for data in response.content.iter_any():
                    at = now()
                    *lines, rest = (rest + data).split(b"\n")
                    for line in lines:
                        if not line.startswith(b"data:"):
                            continue
                        told = line[5:].strip()
                        if told == b"[DONE]":
                            return
                        yield at, decoded(told)

    def _body(self, wish: Wish) -> tuple[str, dict[str, object]]:
        extras = self.server.extras
        body: dict[str, object] = {"model": self.server.model, "stream": True}
        if wish.max_tokens is not None:
            body["max_tokens"] = wish.max_tokens
        if "usage" in extras:
            body["stream_options"] = {"include_usage": True}
        if "ignore_eos" in extras and wish.is_exact:
            body["ignore_eos"] = True
        if "slo" in extras and wish.slo:
            body["slo"] = wish.slo
        if "priority" in extras and wish.priority is not None:
            body["priority"] = wish.priority
        if wish.tenant != "default":
            body["user"] = wish.tenant
        if isinstance(wish.prompt, list) or self._is_chat:
            body["messages"] = (
                wish.prompt
                if isinstance(wish.prompt, list)
                else [{"role": "user", "content": wish.prompt}]
            )
            return "/v1/chat/completions", body
        body["prompt"] = wish.prompt
        return "/v1/completions", body

    def _open(self) -> aiohttp.ClientSession:
        assert self._session is not None, "use the client inside `async with`"
        return self._session

    def _reaching(self) -> AbstractContextManager[None]:
        return reaching(self.url, self._timeout_s)


def root_url(url: str) -> str:
    """The address in front of /v1, with a scheme."""
    url = url.rstrip("/").removesuffix("/v1").rstrip("/")
    return url if "://" in url else f"http://{url}"
