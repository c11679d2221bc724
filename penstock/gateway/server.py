"""uvicorn around the gateway: listening, and stopping in two steps.

The first SIGTERM or SIGINT drains: /health turns 503, new requests are refused with 503, running ones are finished,
then the sockets close. The second one closes at once; requests inside are cancelled with their connections.
"""

from __future__ import annotations

import asyncio
import logging
import signal
import socket
from collections.abc import Callable

import uvicorn

from penstock.core.errors import BadConfig
from penstock.gateway.app import Gateway

BACKLOG = 4096
GRACE_S = 5  # for connections that are still open once nothing runs


def listen(host: str, port: int) -> socket.socket:
    """A listening socket. Raises BadConfig when the address cannot be had."""
    try:
        family = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0][0]
        return socket.create_server((host, port), family=family, backlog=BACKLOG)
    except OSError as error:
        told, _, _ = str(error.strerror or error).partition(" (while")  # the address once more
        raise BadConfig(
            f"cannot listen on {host}:{port}: {told}",
            hint="choose another one with --port, or stop what uses it",
        ) from None


def _is_news(record: logging.LogRecord) -> bool:
    """Not what uvicorn says of an answer that was dropped: whoever dropped it has said why."""
    return not record.getMessage().startswith("ASGI callable returned without")


class Server(uvicorn.Server):
    """A uvicorn server whose signals belong to us."""

    def __init__(self, gateway: Gateway) -> None:
        super().__init__(
            uvicorn.Config(
                gateway,
                loop="none",
                http="httptools",
                ws="none",
                lifespan="off",  # the gateway needs none, and a cancelled one is logged as an error
                proxy_headers=False,
                log_config=None,
                access_log=False,
                server_header=False,
                timeout_keep_alive=75,
                timeout_graceful_shutdown=GRACE_S,
            )
        )
        logging.getLogger("uvicorn.error").addFilter(_is_news)
        self._gateway = gateway
        self._draining: asyncio.Task[None] | None = None

    def stop(self) -> None:
        """Once: drain, then close. Twice: close now."""
        if self._draining is None:
            self._draining = asyncio.get_running_loop().create_task(self._drain())
            return
        self._draining.cancel()
        self.should_exit = self.force_exit = True
        for connection in list(self.server_state.connections):
            connection.transport.abort()

    async def _drain(self) -> None:
        await self._gateway.drain()
        self.should_exit = True


def url_of(listener: socket.socket) -> str:
    host, port = listener.getsockname()[:2]
    return f"http://[{host}]:{port}" if ":" in host else f"http://{host}:{port}"


async def serve(
    gateway: Gateway,
    *,
    on_ready: Callable[[str], None] | None = None,
    handle_signals: bool = True,
) -> None:
    """Serve until told to stop; `on_ready` hears the URL. Raises BadConfig when the port is taken."""
    listener = listen(gateway.config.host, gateway.config.port)
    server = Server(gateway)
    loop = asyncio.get_running_loop()
    caught = (signal.SIGTERM, signal.SIGINT) if handle_signals else ()
    for number in caught:
        loop.add_signal_handler(number, server.stop)
    try:
        if on_ready is not None:
            on_ready(url_of(listener))
        await server._serve([listener])
    finally:
        listener.close()
        for number in caught:
            loop.remove_signal_handler(number)
