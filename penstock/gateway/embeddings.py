"""`/v1/embeddings`, and `/v1/rerank` and `/v1/score` of models that judge pairs of texts.

A text is one request of kind "embed", so texts of one call and of others share steps. What ends it is its vector,
which the engine pools and brings to length one as the model is packaged; here it is shortened where the caller asks,
and spelt as numbers or as base64 of little-endian fp32.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import math
import secrets
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from penstock.core.clock import wall_anchor
from penstock.core.errors import BadRequest, StepFailed
from penstock.core.ports import Service
from penstock.core.prompt import TokenPrompt
from penstock.core.types import Request, RequestId, Sampling
from penstock.gateway.ask import slo_of
from penstock.gateway.bodies import EmbeddingBody, RerankBody, ScoreBody, WholeBody, decode
from penstock.gateway.calls import Call, Calls
from penstock.gateway.config import GatewayConfig
from penstock.gateway.errors import Unsupported
from penstock.gateway.exchange import Exchange
from penstock.gateway.metrics import Meter, ModelMeter
from penstock.gateway.text import TextModel
from penstock.gateway.vectors import (
    Pair,
    Vectors,
    check_room,
    cut_pair,
    cut_text,
    limit_of,
)
from penstock.gateway.wire import JSON, read_body, send_json

Told = Callable[[Sequence[bytes]], dict[str, Any]]


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """One call, understood. `told` makes the answer of the vectors."""

    id: str
    model: str
    prompts: Sequence[Pair]
    body: WholeBody
    told: Told

    @property
    def num_tokens(self) -> int:
        return sum(len(prompt.ids) for prompt in self.prompts)

    @property
    def usage(self) -> dict[str, int]:
        return {"prompt_tokens": self.num_tokens, "total_tokens": self.num_tokens}


class Embeddings:
    """See the module's text."""

    def __init__(
        self,
        calls: Calls,
        service: Service,
        config: GatewayConfig,
        meter: Meter,
        hash_key: bytes,
    ) -> None:
        self._calls, self._service, self._config = calls, service, config
        self._meter, self._hash_key = meter, hash_key
        self._prefix = config.request_prefix or secrets.token_hex(5)
        self._numbers = itertools.count()

    # ------------------------------------------------------------------ embeddings

    async def embeddings(self, call: Call) -> None:
        body = decode(EmbeddingBody, await self._body(call))
        model, text = self._calls.find(body.model)
        vectors = _of(text, model)
        if vectors.labels is not None:
            raise Unsupported(
                f"the model {model!r} judges pairs of texts", hint="use /v1/rerank", param="model"
            )
        if body.dimensions is not None and body.dimensions > vectors.width:
            raise BadRequest(
                f"dimensions: this model's vectors have {vectors.width} numbers", param="dimensions"
            )
        prompts = await self._in_thread(
            _size(body.input), lambda: self._inputs(body, text, vectors)
        )

        def told(found: Sequence[bytes]) -> dict[str, Any]:
            return {
                "object": "list",
                "data": [
                    {"object": "embedding", "index": place, "embedding": _spelt(one, body, vectors)}
                    for place, one in enumerate(found)
                ],
                "model": model,
                "usage": asked.usage,
            }

        asked = Asked(id=self._name("embd"), model=model, prompts=prompts, body=body, told=told)
        await self._answer(call, asked)

    def _inputs(self, body: EmbeddingBody, text: TextModel, vectors: Vectors) -> list[Pair]:
        """One text, several, one list of ids, or several."""
        several: list[Any] = [body.input] if isinstance(body.input, str) else list(body.input)
        if several and all(isinstance(item, int) for item in several):
            several = [several]
        if len({type(item) for item in several}) != 1 or isinstance(several[0], int):
            raise BadRequest(
                "input must be a string, a list of strings, a list of token ids or a list of such lists; "
                "it may not be empty or mixed",
                param="input",
            )
        self._check_count(len(several), "input")
        before = vectors.package.prompt(body.prompt_name)
        if before is None:
            known = ", ".join(vectors.package.prompts) or "none"
            raise BadRequest(
                f"prompt_name: this model has no prompt {body.prompt_name!r}; it has {known}",
                param="prompt_name",
            )
        limit = limit_of(text, body.truncate_prompt_tokens)
        found = []
        for item in several:
            if isinstance(item, str):
                words = before + item
                words = words.lower() if vectors.package.lowers else words
                ids = cut_text(text, words, limit, add_special=body.add_special_tokens)
            else:
                ids = _checked(item, text)[:limit]
            check_room(text, len(ids), "input")
            found.append(Pair(ids, None))
        return found

    # ------------------------------------------------------------------ pairs

    async def rerank(self, call: Call) -> None:
        body = decode(RerankBody, await self._body(call))
        model, text = self._calls.find(body.model)
        vectors = _ranker(text, model)
        documents = [one if isinstance(one, str) else one.text for one in body.documents]
        pairs = [(body.query, document) for document in documents]
        prompts = await self._pairs(body, text, pairs, "documents")

        def told(found: Sequence[bytes]) -> dict[str, Any]:
            scores = [_score(one, vectors) for one in found]
            order = sorted(range(len(scores)), key=lambda at: -scores[at])[: body.top_n]
            results = [
                {
                    "index": at,
                    "relevance_score": scores[at],
                    **({"document": {"text": documents[at]}} if body.return_documents else {}),
                }
                for at in order
            ]
            return {"id": asked.id, "model": model, "usage": asked.usage, "results": results}

        asked = Asked(id=self._name("rerank"), model=model, prompts=prompts, body=body, told=told)
        await self._answer(call, asked)

    async def score(self, call: Call) -> None:
        body = decode(ScoreBody, await self._body(call))
        model, text = self._calls.find(body.model)
        vectors = _ranker(text, model)
        first = [body.text_1] if isinstance(body.text_1, str) else body.text_1
        second = [body.text_2] if isinstance(body.text_2, str) else body.text_2
        first = first * len(second) if len(first) == 1 else first
        if len(first) != len(second):
            raise BadRequest(
                f"text_1 has {len(first)} texts and text_2 {len(second)}: give as many, or one text_1",
                param="text_2",
            )
        pairs = list(zip(first, second, strict=True))
        prompts = await self._pairs(body, text, pairs, "text_2")

        def told(found: Sequence[bytes]) -> dict[str, Any]:
            data = [
                {"index": at, "object": "score", "score": _score(one, vectors)}
                for at, one in enumerate(found)
            ]
            return {
                "id": asked.id,
                "object": "list",
                "created": int(wall_anchor()[1]),
                "model": model,
                "data": data,
                "usage": asked.usage,
            }

        asked = Asked(id=self._name("score"), model=model, prompts=prompts, body=body, told=told)
        await self._answer(call, asked)

    async def _pairs(
        self, body: WholeBody, text: TextModel, pairs: Sequence[tuple[str, str]], param: str
    ) -> list[Pair]:
        self._check_count(len(pairs), param)
        limit = limit_of(text, body.truncate_prompt_tokens)

        def cut() -> list[Pair]:
            found = [cut_pair(text, first, second, limit) for first, second in pairs]
            for pair in found:
                check_room(text, len(pair.ids), param)
            return found

        return await self._in_thread(sum(len(one) + len(two) for one, two in pairs), cut)

    # ------------------------------------------------------------------ all of them

    def _name(self, kind: str) -> str:
        return f"{kind}-{self._prefix}{next(self._numbers):x}"

    async def _body(self, call: Call) -> bytes:
        return await read_body(call.headers, call.receive, self._config.max_body_bytes)

    def _check_count(self, count: int, param: str) -> None:
        if not 1 <= count <= self._config.max_prompts:
            raise BadRequest(
                f"{param}: 1 to {self._config.max_prompts} texts are allowed", param=param
            )

    async def _in_thread(self, num_chars: int, cut: Callable[[], list[Pair]]) -> list[Pair]:
        """Where it would hold up others."""
        limit = self._config.thread_above_chars
        if limit is not None and num_chars > limit:
            return await asyncio.to_thread(cut)
        return cut()

    def _requests(self, call: Call, asked: Asked) -> list[Request]:
        slo, alone = slo_of(asked.body.slo), len(asked.prompts) == 1
        model, adapter = self._calls.adapters.split(asked.model)
        return [
            Request(
                id=RequestId(asked.id if alone else f"{asked.id}-{place}"),
                model=model,
                prompt=TokenPrompt(prompt.ids, key=self._hash_key, adapter=adapter),
                adapter=adapter,
                sampling=Sampling(max_tokens=1),
                slo=slo,
                tenant=call.tenant,
                priority=asked.body.priority or 0,
                kind="embed",
                second_at=prompt.second_at,
            )
            for place, prompt in enumerate(asked.prompts)
        ]

    async def _answer(self, call: Call, asked: Asked) -> None:
        requests, meter = self._requests(call, asked), self._meter.of(asked.model)
        with self._calls.inside(len(requests), 1, meter):
            async with Exchange(self._service, requests, call.receive) as exchange:
                found: dict[int, bytes] = {}
                while (heard := await exchange.take()) is not None:
                    found.update({place: told.vector for place, told in heard if told.vector})
                if len(found) < len(requests):
                    raise StepFailed("the model stopped before it had read all texts")
                _measure(meter, requests, exchange.elapsed_s)
                exchange.finish()
                body = asked.told([found[place] for place in range(len(requests))])
                await send_json(call.send, body, [*JSON, *call.extra])


def _measure(meter: ModelMeter, requests: Sequence[Request], took_s: float) -> None:
    for request in requests:
        meter.prompt_tokens.inc(request.prompt.num_tokens)
        meter.prompt_sizes.observe(request.prompt.num_tokens)
    meter.finished("stop").inc(len(requests))
    meter.latency.observe(took_s)


def _of(text: TextModel, model: str) -> Vectors:
    if text.vectors is None:
        raise Unsupported(f"the model {model!r} gives no vectors", param="model")
    return text.vectors


def _ranker(text: TextModel, model: str) -> Vectors:
    found = _of(text, model)
    if found.labels != 1:
        raise Unsupported(
            f"the model {model!r} does not judge pairs of texts",
            hint="serve a cross-encoder with one label, such as a reranker",
            param="model",
        )
    return found


def _size(told: str | Sequence[Any]) -> int:
    return (
        len(told)
        if isinstance(told, str)
        else sum(len(one) for one in told if isinstance(one, str))
    )


def _checked(ids: list[int], text: TextModel) -> list[int]:
    if any(not 0 <= id < text.num_vocabulary for id in ids):
        raise BadRequest(
            f"input: token ids of this model lie between 0 and {text.num_vocabulary - 1}",
            param="input",
        )
    return ids


def _spelt(vector: bytes, body: EmbeddingBody, vectors: Vectors) -> str | list[float]:
    """Shortened to the first `dimensions`, and then of length one again if the model's are."""
    if body.dimensions is not None:
        short = np.frombuffer(vector, "<f4")[: body.dimensions]
        if vectors.package.is_normed:
            short = short / max(float(np.linalg.norm(short)), 1e-12)
        vector = short.astype("<f4").tobytes()
    if body.encoding_format == "base64":
        return base64.b64encode(vector).decode()
    told: list[float] = np.frombuffer(vector, "<f4").tolist()
    return told


def _score(vector: bytes, vectors: Vectors) -> float:
    [raw] = np.frombuffer(vector, "<f4").tolist()
    return 1 / (1 + math.exp(-raw)) if vectors.is_chance else raw
