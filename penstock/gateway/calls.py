"""The two calls that carry tokens, from raw body to last byte."""

from __future__ import annotations

import asyncio
import functools
import itertools
import secrets
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

from starlette.types import Receive, Send

from penstock.core.clock import wall_anchor
from penstock.core.errors import BadRequest, ContextTooLong, Overloaded, PenstockError, UnknownModel
from penstock.core.ports import Service
from penstock.core.types import Request
from penstock.gateway.adapters import Adapters
from penstock.gateway.ask import (
    Ask,
    Given,
    Origin,
    ask_chat,
    ask_completion,
    lay_out,
    make_requests,
)
from penstock.gateway.bodies import ChatBody, CompletionBody, SharedBody, decode
from penstock.gateway.chat import ChatShape
from penstock.gateway.completions import CompletionShape
from penstock.gateway.config import GatewayConfig
from penstock.gateway.errors import Unsupported, error_event, face
from penstock.gateway.exchange import Exchange, Heard, Writer
from penstock.gateway.metrics import Meter, ModelMeter
from penstock.gateway.reading import Reading
from penstock.gateway.shapes import DONE, Choice, Piece, Shape
from penstock.gateway.structured import check_grammar
from penstock.gateway.text import TextModel
from penstock.gateway.vectors import must_write
from penstock.gateway.wire import EVENTS, JSON, ClientGone, Headers, read_body, send_json


@dataclass(frozen=True, slots=True)
class Call:
    """One HTTP call that passed the door."""

    headers: Mapping[bytes, bytes]
    receive: Receive
    send: Send
    tenant: str
    extra: Headers  # headers that every answer to it carries


class Calls:
    """Answers `/v1/completions` and `/v1/chat/completions`."""

    def __init__(
        self,
        service: Service,
        texts: Mapping[str, TextModel],
        config: GatewayConfig,
        meter: Meter,
        hash_key: bytes,
    ) -> None:
        self._service = service
        self.texts = texts
        self._config = config
        self._meter = meter
        self.hash_key = hash_key
        self.foreign: frozenset[str] = frozenset()  # names that other servers serve; see forward
        self.adapters = Adapters(service, may_change=config.runtime_adapters)
        self._prefix = config.request_prefix or secrets.token_hex(5)
        self._numbers = itertools.count()
        self._num_inside = 0

    async def completions(self, call: Call) -> None:
        body = decode(CompletionBody, await self._body(call))
        body.model, text = self.find(body.model)
        must_write(text, body.model)
        adapter = self.adapters.asked(body)
        prompts = await self._prompts(body.prompt, text)
        ask = ask_completion(body, text, prompts, self._config)
        ask.adapter = adapter
        ask.id = f"cmpl-{self._prefix}{next(self._numbers):x}"
        await self._answer(call, ask, body, CompletionShape(ask, int(wall_anchor()[1])))

    async def chat(self, call: Call) -> None:
        body = decode(ChatBody, await self._body(call))
        body.model, text = self.find(body.model)
        must_write(text, body.model)
        adapter = self.adapters.asked(body)
        laid = lay_out(body, text, self._config)
        ids = await self.encode(text, laid.words, add_special=False, param="messages")
        ask = ask_chat(body, text, ids, laid, self._config)
        ask.adapter = adapter
        ask.id = f"chatcmpl-{self._prefix}{next(self._numbers):x}"
        await self._answer(call, ask, body, ChatShape(ask, int(wall_anchor()[1])))

    async def _body(self, call: Call) -> bytes:
        return await read_body(call.headers, call.receive, self._config.max_body_bytes)

    def find(self, model: str | None) -> tuple[str, TextModel]:
        """The model by name; the only one there is when no name is given. Raises UnknownModel."""
        names = [name for name in self._service.models() if name not in self.foreign]
        if model in self.foreign:
            raise Unsupported(
                f"{model!r} is served by another server, which is not asked this from here",
                hint="ask that server itself",
                param="model",
            )
        if model is None:
            if len(set(map(id, self.texts.values()))) == 1 and names:
                model = names[0]
            else:
                raise BadRequest("the required field 'model' is missing", param="model")
        adapter = self.adapters.named(model)
        base = model if adapter is None else adapter.model
        text = self.texts.get(base) if base in names else None
        if text is None:
            served = ", ".join([*self._service.models(), *self.adapters.all()]) or "none"
            raise UnknownModel(
                f"the model {model!r} does not exist here", hint=f"served: {served}", param="model"
            )
        return model, text

    async def encode(
        self, text: TextModel, words: str, *, add_special: bool, param: str = "prompt"
    ) -> list[int]:
        """Token ids, in a thread where that would hold up others. Raises ContextTooLong for hopeless lengths."""
        if text.is_surely_longer(words, text.context_tokens):
            raise ContextTooLong(
                f"this model's maximum context length is {text.context_tokens} tokens; a text of "
                f"{len(words)} characters cannot fit",
                hint="shorten the prompt",
                param=param,
            )
        limit = self._config.thread_above_chars
        if limit is not None and len(words) > limit:
            return await asyncio.to_thread(text.encode, words, add_special=add_special)
        return text.encode(words, add_special=add_special)

    async def _prompts(
        self, told: str | Sequence[str | int | list[int]] | None, text: TextModel
    ) -> list[Given]:
        """One text, several, one list of ids, or several."""
        if told is None:
            raise BadRequest("the required field 'prompt' is missing", param="prompt")
        several: list[str | int | list[int]] = [told] if isinstance(told, str) else list(told)
        if several and all(isinstance(item, int) for item in several):
            several = [[item for item in several if isinstance(item, int)]]
        if len({type(item) for item in several}) != 1 or isinstance(several[0], int):
            raise BadRequest(
                "prompt must be a string, a list of strings, a list of token ids or a list of such lists; "
                "it may not be empty or mixed",
                param="prompt",
            )
        if len(several) > self._config.max_prompts:
            raise BadRequest(
                f"prompt: at most {self._config.max_prompts} prompts are allowed", param="prompt"
            )
        return [await self._given(item, text) for item in several]

    async def _given(self, item: str | int | list[int], text: TextModel) -> Given:
        if isinstance(item, str):
            ids = await self.encode(text, item, add_special=True)
            given = Given(ids=ids, text=item)
        else:
            assert isinstance(item, list)
            given = Given(ids=item)
            if any(not 0 <= id < text.num_vocabulary for id in item):
                raise BadRequest(
                    f"prompt: token ids of this model lie between 0 and {text.num_vocabulary - 1}",
                    param="prompt",
                )
        if not given.ids:
            raise BadRequest("prompt: it needs at least one token", param="prompt")
        return given

    async def _answer(self, call: Call, ask: Ask, body: SharedBody, shape: Shape) -> None:
        origin = Origin(
            tenant=call.tenant, hash_key=self.hash_key, isolate=self._config.isolate_tenants
        )
        requests = make_requests(ask, body, origin)
        await self._check_grammar(ask)
        meter = self._meter.of(ask.model)
        with self.inside(len(requests), ask.n, meter):
            await self._run(call, ask, requests, shape)

    async def _check_grammar(self, ask: Ask) -> None:
        """In a thread, as the first one has the vocabulary read. Raises BadRequest."""
        chosen = ask.sampling
        if chosen.grammar is None:
            return
        check = functools.partial(
            check_grammar,
            chosen.grammar,
            ask.text,
            min_tokens=chosen.min_tokens,
            ignore_eos=chosen.ignore_eos,
        )
        if self._config.thread_above_chars is None:
            check()
        else:
            await asyncio.to_thread(check)

    @contextmanager
    def inside(self, num_requests: int, n: int, meter: ModelMeter) -> Iterator[None]:
        """A place inside for each answer; how it went wrong is counted."""
        try:
            with self._place(num_requests, n, meter):
                yield
        except PenstockError as error:
            meter.refused(face(error).code or "error").inc(num_requests)
            raise
        except ClientGone:
            meter.finished("abort").inc(num_requests * n)
            raise

    @contextmanager
    def _place(self, num_requests: int, n: int, meter: ModelMeter) -> Iterator[None]:
        """A place inside for each answer. Raises Overloaded when too few are free, BadRequest when there never are."""
        num_answers, limit = num_requests * n, self._config.max_queue
        if num_answers > limit:
            raise BadRequest(
                f"{num_requests} prompts with {n} answers each are more than the {limit} answers that "
                "this server holds at once",
                hint="send them in several requests",
                param="n" if n > 1 else "prompt",
            )
        if self._num_inside + num_answers > limit:
            raise Overloaded(
                f"the server already holds {self._num_inside} answers, its limit is {limit}",
                hint="try again later",
                retry_after_s=self._config.retry_after_s,
            )
        self._num_inside += num_answers
        meter.in_flight.inc(num_requests)
        try:
            yield
        finally:
            self._num_inside -= num_answers
            meter.in_flight.dec(num_requests)

    async def _run(self, call: Call, ask: Ask, requests: Sequence[Request], shape: Shape) -> None:
        meter = self._meter.of(ask.model)
        async with Exchange(self._service, requests, call.receive) as exchange:
            reading = Reading(ask, exchange, meter)
            if ask.stream:
                await self._stream(call, ask, exchange, reading, shape)
            else:
                await self._whole(call, exchange, reading, shape)
        _measure(meter, exchange, reading, requests)

    async def _whole(self, call: Call, exchange: Exchange, reading: Reading, shape: Shape) -> None:
        pieces: list[list[Piece]] = [[] for _ in reading.answers]
        while not reading.is_over:
            heard = await exchange.take()
            if heard is None:
                break
            for piece in reading.read(heard):
                pieces[piece.choice].append(piece)
        reading.check_ended()
        exchange.finish()
        choices = [_choice(news) for news in pieces]
        body = shape.whole(choices, reading.prompt_logprobs, reading.usage())
        await send_json(call.send, body, [*JSON, *call.extra])

    async def _stream(
        self, call: Call, ask: Ask, exchange: Exchange, reading: Reading, shape: Shape
    ) -> None:
        writer = Writer(call.send, [*EVENTS, *call.extra], self._config.stall_timeout_s)
        opened: set[int] = set()
        try:
            while not reading.is_over:
                heard = await exchange.take()
                if heard is None:
                    break
                data = _events(reading, heard, shape, opened)
                if data and not reading.is_over:
                    await writer.write(data)
            reading.check_ended()
            exchange.finish()
            usage = shape.usage_chunk(reading.usage()) if ask.include_usage else b""
            await writer.write(data + usage + DONE, is_last=True)
        except PenstockError as error:
            if writer.has_begun:
                exchange.finish()
                await writer.write(error_event(error), is_last=True)
            raise
        finally:
            writer.close()


def _events(reading: Reading, heard: Sequence[Heard], shape: Shape, opened: set[int]) -> bytes:
    """The events that tell of `heard`; most often that is one token of one choice."""
    if len(heard) == 1:
        piece = reading.read_one(*heard[0])
        return b"" if piece is None else _event(reading, piece, shape, opened)
    return b"".join([_event(reading, piece, shape, opened) for piece in reading.read(heard)])


def _event(reading: Reading, piece: Piece, shape: Shape, opened: set[int]) -> bytes:
    has_news = piece.text or piece.finish is not None or piece.entries
    data = shape.chunk(piece) if has_news else b""
    choice = piece.choice
    if choice in opened:
        return data
    opened.add(choice)
    return shape.open(choice, reading.prompt_logprobs[choice // reading.n]) + data


def _choice(news: Sequence[Piece]) -> Choice:
    last = news[-1]
    assert last.finish is not None
    return Choice(
        "".join([piece.text for piece in news]),
        [entry for piece in news for entry in piece.entries],
        last.finish,
        last.stop_reason,
    )


def _measure(
    meter: ModelMeter, exchange: Exchange, reading: Reading, requests: Sequence[Request]
) -> None:
    """Once a call: counts and times of what the caller saw."""
    usage = reading.usage()
    meter.prompt_tokens.inc(usage.prompt_tokens)
    meter.looked_up_tokens.inc(usage.prompt_tokens)
    meter.cached_tokens.inc(usage.cached_tokens)
    for request in requests:
        meter.prompt_sizes.observe(request.prompt.num_tokens)
    for answer in reading.answers:
        meter.output_sizes.observe(answer.num_tokens)
        meter.finished(answer.finish or "stop").inc()
    first, last = exchange.first_at, exchange.last_at
    if first is None or last is None:
        return
    meter.ttft.observe(first - exchange.arrived_at)
    meter.latency.observe(last - exchange.arrived_at)
    most = max(answer.num_tokens for answer in reading.answers)
    if most > 1:
        meter.tpot.observe((last - first) / (most - 1))
