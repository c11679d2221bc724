"""Routes that carry no token streams: models, health, metrics, tokenising, the playground."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
from starlette.applications import Starlette
from starlette.exceptions import HTTPException
from starlette.requests import Request as HttpRequest
from starlette.responses import Response
from starlette.routing import Route

import penstock
from penstock.core.errors import BadRequest, PenstockError
from penstock.core.ports import Service
from penstock.gateway.adapters import LOAD, UNLOAD
from penstock.gateway.bodies import DetokenizeBody, TokenizeBody, decode
from penstock.gateway.calls import Calls
from penstock.gateway.config import GatewayConfig
from penstock.gateway.devices import RESHAPE, reshape
from penstock.gateway.errors import (
    BodyTooLarge,
    NoSuchPath,
    WrongMethod,
    error_body,
    error_headers,
    face,
)
from penstock.gateway.messages import plain_messages
from penstock.gateway.state import PATH as STATE
from penstock.gateway.state import State
from penstock.gateway.text import TextModel
from penstock.gateway.wire import read_body

UI = Path(__file__).parent / "ui"
OPEN_PATHS = frozenset(("/", "/health", "/metrics", "/version"))
METRICS_TYPE = "text/plain; version=0.0.4; charset=utf-8"


class Cold:
    """The handlers; `app()` is a Starlette application over them."""

    def __init__(
        self,
        service: Service,
        texts: Mapping[str, TextModel],
        config: GatewayConfig,
        calls: Calls,
        shown: State,
        started_at: Callable[[], int],
    ) -> None:
        self._service = service
        self._texts = texts
        self._config = config
        self._calls = calls
        self._shown = shown
        self._started_at = started_at

    def app(self) -> Starlette:
        get, post = ["GET"], ["POST"]
        return Starlette(
            routes=[
                Route("/", self.playground, methods=get),
                Route("/v1/models", self.models, methods=get),
                Route("/v1/models/{name:path}", self.model, methods=get),
                Route("/health", self.health, methods=get),
                Route("/version", self.version, methods=get),
                Route("/metrics", self.metrics, methods=get),
                Route(STATE, self.state, methods=get),
                Route("/tokenize", self.tokenize, methods=post),
                Route("/detokenize", self.detokenize, methods=post),
                Route(LOAD, self.load_adapter, methods=post),
                Route(UNLOAD, self.unload_adapter, methods=post),
                Route(RESHAPE, self.reshape, methods=post),
            ],
            exception_handlers={
                HTTPException: _http_error,
                PenstockError: self._penstock_error,
            },
        )

    async def playground(self, _: HttpRequest) -> Response:
        return Response((UI / "index.html").read_bytes(), media_type="text/html")

    async def models(self, _: HttpRequest) -> Response:
        names = [*self._service.models(), *self._calls.adapters.all()]
        return _json({"object": "list", "data": [self._model(name) for name in names]})

    async def model(self, http: HttpRequest) -> Response:
        name = http.path_params["name"]
        if name not in self._calls.foreign:
            name, _ = self._calls.find(name)
        return _json(self._model(name))

    def _model(self, name: str) -> dict[str, Any]:
        adapter = self._calls.adapters.named(name)
        text = self._texts.get(name if adapter is None else adapter.model)
        return {
            "id": name,
            "object": "model",
            "created": self._started_at(),
            "owned_by": "penstock",
            "parent": None if adapter is None else adapter.model,
            "max_model_len": None if text is None else text.context_tokens,
        }

    async def health(self, _: HttpRequest) -> Response:
        """200 while a new request would be taken."""
        reports = list(self._service.reports())
        able = [report for report in reports if report.is_alive and not report.is_draining]
        if self._shown.is_draining:
            return _json({"status": "draining"}, 503)
        if reports and not able:
            return _json({"status": "no replica is ready"}, 503)
        return _json({"status": "ok"})

    async def version(self, _: HttpRequest) -> Response:
        return _json({"version": penstock.__version__})

    async def metrics(self, _: HttpRequest) -> Response:
        return Response(self._shown.meter.text(), headers={"content-type": METRICS_TYPE})

    async def state(self, _: HttpRequest) -> Response:
        return _json(self._shown.snapshot())

    async def tokenize(self, http: HttpRequest) -> Response:
        body = decode(TokenizeBody, await self._body(http))
        _, text = self._calls.find(body.model)
        if (body.prompt is None) == (body.messages is None):
            raise BadRequest("give either prompt or messages", param="prompt")
        if body.messages is not None:
            words = text.render(
                plain_messages(body.messages),
                add_generation_prompt=body.add_generation_prompt,
                extras=body.chat_template_kwargs,
            )
        else:
            words = body.prompt or ""
        special = body.add_special_tokens and body.messages is None
        ids = await self._calls.encode(text, words, add_special=special)
        return _json({"count": len(ids), "max_model_len": text.context_tokens, "tokens": ids})

    async def detokenize(self, http: HttpRequest) -> Response:
        body = decode(DetokenizeBody, await self._body(http))
        _, text = self._calls.find(body.model)
        return _json({"prompt": text.decode(body.tokens)})

    async def load_adapter(self, http: HttpRequest) -> Response:
        return Response(await self._calls.adapters.load(await self._body(http)) + "\n")

    async def unload_adapter(self, http: HttpRequest) -> Response:
        return Response(await self._calls.adapters.unload(await self._body(http)) + "\n")

    async def reshape(self, http: HttpRequest) -> Response:
        may_change, raw = self._config.runtime_devices, await self._body(http)
        return _json(await reshape(self._service, raw, may_change=may_change))

    async def _body(self, http: HttpRequest) -> bytes:
        headers = dict(http.scope["headers"])
        return await read_body(headers, http.receive, self._config.max_body_bytes)

    async def _penstock_error(self, _: HttpRequest, error: Exception) -> Response:
        assert isinstance(error, PenstockError)
        return error_response(error, self._config.retry_after_s)


def _json(value: object, status: int = 200) -> Response:
    return Response(msgspec.json.encode(value), status, media_type="application/json")


def error_response(error: PenstockError, retry_after_s: float) -> Response:
    headers = {k.decode(): v.decode() for k, v in error_headers(error, retry_after_s)}
    return Response(msgspec.json.encode(error_body(error)), face(error).status, headers)


async def _http_error(http: HttpRequest, error: Exception) -> Response:
    """The router's own refusals, in the shape of all others."""
    assert isinstance(error, HTTPException)
    path = http.url.path
    told: PenstockError
    if error.status_code == 405:
        told = WrongMethod(f"{http.method} is not allowed on {path}")
    elif error.status_code == 413:
        told = BodyTooLarge("the request body is too large")
    else:
        told = NoSuchPath(f"there is nothing at {path}")
    response = error_response(told, 1.0)
    response.headers.update(error.headers or {})
    return response
