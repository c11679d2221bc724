"""Calls of models that foreign servers serve: passed on as they came, answers told as they come.

Of the body only what routing and accounts need is looked at (model, stream, lengths, priority, promises, and the
bytes that the prompt is made from); what else it says is between the caller and the server. A call of a model of ours
goes to where it would have gone. Counts are those of the server (cluster.passage), times are what the caller saw.
"""

from __future__ import annotations

import dataclasses
import itertools
import secrets
from collections.abc import Awaitable, Callable, Collection
from typing import Any

import msgspec
from msgspec import Raw
from starlette.types import Message, Receive

from penstock.core.errors import BadRequest, PenstockError, UnknownModel
from penstock.core.forward import Forward, ForwardedPrompt
from penstock.core.ports import StartService
from penstock.core.types import ProgramId, Request, RequestId, Sampling
from penstock.gateway.ask import slo_of
from penstock.gateway.bodies import Message as ChatMessage
from penstock.gateway.bodies import SloBody
from penstock.gateway.calls import Call, Calls
from penstock.gateway.config import GatewayConfig
from penstock.gateway.errors import error_event
from penstock.gateway.exchange import Writer
from penstock.gateway.messages import plain_messages
from penstock.gateway.metrics import Meter
from penstock.gateway.passing import Passing, measure
from penstock.gateway.wire import EVENTS, JSON, read_body, send_bytes

Answerer = Callable[[Call], Awaitable[None]]


NOTHING = Raw(b"")


class _Options(msgspec.Struct, gc=False):
    include_usage: bool | None = None


class _Peek(msgspec.Struct, gc=False):
    """What is looked at; the prompt's parts stay bytes."""

    model: str | None = None
    stream: bool | None = None
    stream_options: _Options | None = None
    max_tokens: int | None = None
    max_completion_tokens: int | None = None
    priority: int | None = None
    cache_salt: str | None = None
    slo: SloBody | None = None
    program: str | None = None
    tools: Raw = NOTHING
    messages: Raw = NOTHING
    prompt: Raw = NOTHING
    input: Raw = NOTHING
    query: Raw = NOTHING
    documents: Raw = NOTHING
    text_1: Raw = NOTHING
    text_2: Raw = NOTHING

    def texts(self) -> list[bytes]:
        """In the order in which a prompt is made of them."""
        chat = (self.tools, self.messages)
        others = (self.prompt, self.input, self.query, self.documents, self.text_1, self.text_2)
        return [bytes(part) for part in (*chat, *others)]


class _Chat(msgspec.Struct, gc=False):
    """What a chat's prompt is made of, where it is laid out here to be compared."""

    messages: list[ChatMessage]
    tools: list[dict[str, Any]] | None = None
    add_generation_prompt: bool = True
    chat_template_kwargs: dict[str, Any] | None = None


_chat = msgspec.json.Decoder(_Chat).decode
_peek = msgspec.json.Decoder(_Peek).decode


class Forwards:
    """`foreign`: the names that are passed on. Everything else is for `calls`."""

    def __init__(
        self,
        service: StartService,
        foreign: Collection[str],
        calls: Calls,
        config: GatewayConfig,
        meter: Meter,
    ) -> None:
        self._service = service
        self._foreign = frozenset(foreign)
        self._only = next(iter(self._foreign)) if len(self._foreign) == 1 else None
        self._calls, self._hash_key, texts = calls, calls.hash_key, calls.texts
        self._texts = {name: texts[name] for name in self._foreign if name in texts}
        self._config, self._meter = config, meter
        self._prefix = config.request_prefix or secrets.token_hex(5)
        self._numbers = itertools.count()

    def behind(self, path: str, ours: Answerer) -> Answerer:
        """Answers a path: `ours` where the model is."""

        async def answer(call: Call) -> None:
            body = await read_body(call.headers, call.receive, self._config.max_body_bytes)
            told = _look(body)
            model = self._name(told)
            if model is None:
                await ours(dataclasses.replace(call, receive=_again(body, call.receive)))
            else:
                ids = await self._ids(body, told, model) if model in self._texts else None
                await self._pass(call, self._request(call, path, body, told, model, ids))

        return answer

    def _name(self, told: _Peek) -> str | None:
        """The foreign model that is meant; None: one of ours, or one that nobody has."""
        if told.model in self._foreign:
            return told.model
        served = self._service.models()
        if told.model is None and self._only is not None and len(served) == 1:
            return self._only
        if self._foreign.issuperset(served):
            if told.model is None:
                raise BadRequest("the required field 'model' is missing", param="model")
            raise UnknownModel(
                f"the model {told.model!r} does not exist here",
                hint=f"served: {', '.join(served)}",
                param="model",
            )
        return None

    async def _ids(self, body: bytes, told: _Peek, model: str) -> list[int] | None:
        """The prompt's tokens, as far as they can be told from here; what is wrong with it the server says."""
        text = self._texts[model]
        try:
            if bytes(told.messages):
                chat = _chat(body)
                words = text.render(
                    plain_messages(chat.messages),
                    add_generation_prompt=chat.add_generation_prompt,
                    tools=chat.tools,
                    extras=chat.chat_template_kwargs,
                )
                return await self._calls.encode(text, words, add_special=False)
            words = msgspec.json.decode(told.prompt, type=str)
            return await self._calls.encode(text, words, add_special=True)
        except (BadRequest, msgspec.DecodeError):
            return None

    def _request(  # noqa: PLR0913
        self, call: Call, path: str, body: bytes, told: _Peek, model: str, ids: list[int] | None
    ) -> Request:
        salt = told.cache_salt or ""
        isolates = self._config.isolate_tenants
        if isolates:
            salt = f"{call.tenant}\0{salt}"
        options = told.stream_options
        forward = Forward(
            path=path,
            body=body,
            model=told.model,
            is_stream=bool(told.stream),
            takes_usage=options is not None and bool(options.include_usage),
            has_options=options is not None,
            has_ours=told.slo is not None or told.program is not None,
            salt=salt if isolates else None,
        )
        limit = told.max_completion_tokens or told.max_tokens
        return Request(
            id=RequestId(f"fwd-{self._prefix}{next(self._numbers):x}"),
            model=model,
            prompt=ForwardedPrompt(forward, told.texts(), key=self._hash_key, salt=salt, ids=ids),
            sampling=Sampling() if limit is None or limit < 1 else Sampling(max_tokens=limit),
            slo=slo_of(told.slo),
            tenant=call.tenant,
            priority=told.priority or 0,
            program=ProgramId(told.program) if told.program else None,
        )

    async def _pass(self, call: Call, request: Request) -> None:
        meter = self._meter.of(request.model)
        prompt = request.prompt
        assert isinstance(prompt, ForwardedPrompt)
        with self._calls.inside(1, 1, meter):
            async with Passing(self._service, request, call.receive) as passing:
                if prompt.forward.is_stream:
                    await self._stream(call, passing)
                else:
                    await self._whole(call, passing)
            measure(meter, passing, prompt.forward)

    async def _whole(self, call: Call, passing: Passing) -> None:
        data = b""
        while (piece := await passing.take()) is not None:
            data += piece
        passing.finish()
        await send_bytes(call.send, 200, data, [*JSON, *call.extra])

    async def _stream(self, call: Call, passing: Passing) -> None:
        writer = Writer(call.send, [*EVENTS, *call.extra], self._config.stall_timeout_s)
        try:
            is_over = False
            while (piece := await passing.take()) is not None:
                is_over = passing.is_over
                if is_over:
                    passing.finish()
                await writer.write(piece, is_last=is_over)
            if not is_over:
                await writer.write(b"", is_last=True)
        except PenstockError as error:
            if writer.has_begun:
                passing.finish()
                await writer.write(error_event(error), is_last=True)
            raise
        finally:
            writer.close()


def _look(body: bytes) -> _Peek:
    try:
        return _peek(body)
    except msgspec.ValidationError as error:
        raise BadRequest(f"the request body does not fit: {error}") from None
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError) as error:
        raise BadRequest(f"the request body is not valid JSON: {error}") from None


def _again(body: bytes, receive: Receive) -> Receive:
    """A `receive` that gives a body that was read already, and then goes on."""
    given = False

    async def again() -> Message:
        nonlocal given
        if given:
            return await receive()
        given = True
        return {"type": "http.request", "body": body, "more_body": False}

    return again
