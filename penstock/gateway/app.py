"""The ASGI application: one callable, two paths through it.

Paths that carry tokens go straight to `Calls` over raw ASGI; everything else goes through Starlette. Both get the
same request id, CORS headers and errors. This is the outermost loop of a call: what nobody expected is logged with
its request id and told as a plain 500.
"""

from __future__ import annotations

import itertools
import logging
import secrets
from collections.abc import Awaitable, Callable, Collection, Mapping
from typing import cast

from starlette.types import Message, Receive, Scope, Send

from penstock.core.clock import wall_anchor
from penstock.core.errors import BadRequest, PenstockError
from penstock.core.ports import Service, StartService
from penstock.gateway.calls import Call, Calls
from penstock.gateway.cold import OPEN_PATHS, Cold
from penstock.gateway.config import GatewayConfig
from penstock.gateway.door import Door
from penstock.gateway.embeddings import Embeddings
from penstock.gateway.errors import INTERNAL, WrongMethod, error_bytes, error_headers, face
from penstock.gateway.forward import Forwards
from penstock.gateway.metrics import Meter
from penstock.gateway.state import State
from penstock.gateway.text import TextModel
from penstock.gateway.wire import ClientGone, Headers, send_bytes

logger = logging.getLogger("penstock.gateway")


class Gateway:
    """The application. `drain` makes it refuse new work and returns when what runs has ended."""

    def __init__(
        self,
        service: Service,
        texts: Mapping[str, TextModel],
        config: GatewayConfig,
        hash_key: bytes,
        foreign: Collection[str] = (),
    ) -> None:
        self.service = service
        self.config = config
        self.meter = Meter(service.reports)
        self.state = State(service, self.meter)
        self._door = Door(config)
        calls = Calls(service, texts, config, self.meter, hash_key)
        calls.foreign = frozenset(foreign)
        wholes = Embeddings(calls, service, config, self.meter, hash_key)
        self._hot: dict[str, Callable[[Call], Awaitable[None]]] = {
            "/v1/completions": calls.completions,
            "/v1/chat/completions": calls.chat,
            "/v1/embeddings": wholes.embeddings,
            "/v1/rerank": wholes.rerank,
            "/v1/score": wholes.score,
        }
        if foreign:
            forwards = Forwards(cast(StartService, service), foreign, calls, config, self.meter)
            self._hot = {path: forwards.behind(path, ours) for path, ours in self._hot.items()}
        self._started_at: int | None = None
        self._cold = Cold(service, texts, config, calls, self.state, self._start).app()
        self._prefix = config.request_prefix or secrets.token_hex(5)
        self._numbers = itertools.count()

    def _start(self) -> int:
        if self._started_at is None:
            self._started_at = int(wall_anchor()[1])
        return self._started_at

    async def drain(self) -> None:
        """From now on /health says 503 and new requests are refused by the service."""
        self.state.is_draining = True
        await self.service.drain()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "http":
            await self._http(scope, receive, send)
        elif scope["type"] == "lifespan":
            await self._lifespan(receive, send)
        else:
            await receive()
            await send({"type": "websocket.close", "code": 1003, "reason": "HTTP only"})

    async def _lifespan(self, receive: Receive, send: Send) -> None:
        await receive()
        self._start()
        await send({"type": "lifespan.startup.complete"})
        await receive()
        await send({"type": "lifespan.shutdown.complete"})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers: dict[bytes, bytes] = dict(scope["headers"])
        fresh = f"req-{self._prefix}{next(self._numbers):x}"
        request_id = self._door.request_id(headers, fresh)
        extra: Headers = [(b"x-request-id", request_id)]
        if b"origin" in headers:
            extra += self._door.cors(headers)
        watched = _Started(send)
        try:
            await self._route(scope, headers, receive, watched, extra)
        except ClientGone:
            return
        except PenstockError as error:
            await self._tell(error, watched, extra)
        except Exception:
            logger.exception("request %s failed", request_id.decode())
            await self._tell(INTERNAL, watched, extra)

    async def _tell(self, error: PenstockError, send: _Started, extra: Headers) -> None:
        if not send.has_started:
            told = error_headers(error, self.config.retry_after_s)
            await send_bytes(send, face(error).status, error_bytes(error), [*told, *extra])

    async def _route(
        self,
        scope: Scope,
        headers: Mapping[bytes, bytes],
        receive: Receive,
        send: Send,
        extra: Headers,
    ) -> None:
        path, method = scope["path"], scope["method"]
        if method == "OPTIONS" and b"access-control-request-method" in headers:
            await self._preflight(headers, send, extra)
            return
        tenant = "" if path in OPEN_PATHS else self._door.tenant(headers)
        hot = self._hot.get(path)
        if hot is None:
            await self._cold(scope, receive, _with_headers(send, extra))
        elif method != "POST":
            extra.append((b"allow", b"POST"))
            raise WrongMethod(f"{method} is not allowed on {path}", hint="use POST")
        else:
            await hot(Call(headers, receive, send, tenant, extra))

    async def _preflight(self, headers: Mapping[bytes, bytes], send: Send, extra: Headers) -> None:
        allowed = self._door.preflight(headers)
        if not allowed:
            raise BadRequest("calls from this origin are not allowed here")
        await send_bytes(send, 204, b"", [extra[0], *allowed])


class _Started:
    """`send`, and whether a response has begun."""

    __slots__ = ("_send", "has_started")

    def __init__(self, send: Send) -> None:
        self._send = send
        self.has_started = False

    def __call__(self, message: Message) -> Awaitable[None]:
        self.has_started = True
        return self._send(message)


def _with_headers(send: Send, extra: Headers) -> Send:
    async def sender(message: Message) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), *extra]
        await send(message)

    return sender


def create_app(
    service: Service,
    texts: Mapping[str, TextModel],
    config: GatewayConfig | None = None,
    *,
    hash_key: bytes = b"",
    foreign: Collection[str] = (),
) -> Gateway:
    """The gateway in front of `service`.

    `texts` holds the text model of every name in `service.models()` ; of the `foreign` ones, which other
    servers serve, it may hold some, by which prompts are compared. `hash_key` is the secret that keys the hashes of
    prompt blocks; replicas that extend these hashes must hold the same one.
    """
    return Gateway(service, texts, config or GatewayConfig(), hash_key, foreign)
