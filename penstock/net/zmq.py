"""A channel between two processes of one user: a ZeroMQ PAIR over ipc:// (or tcp://127.0.0.1).

Whole frames, in order, from one peer; a second peer is turned away by the socket type. Who may connect is decided by
the file system: ipc endpoints live in a folder that only this user may enter (`private_endpoint`), so there is no
handshake of our own. tcp is for tests and for one trusted host.

Memory: `MAX_QUEUED` messages wait at each end, then `send` waits; a frame over `MAX_BYTES` is refused by the
receiver.

Death: when the peer's process ends the kernel closes the connection; when it stands still ZeroMQ's heartbeats run
out after `DEAD_AFTER_S`. Either way whoever watches hears of it once, after the messages that had come before, and
the channel is never reconnected: what was lost in between could not be told.

The descriptors of both sockets are edge-triggered: events are asked once at first and again after every call.
"""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import Callable
from pathlib import Path

import zmq
from zmq.utils.monitor import parse_monitor_message

from penstock.core.errors import PenstockError, ReplicaLost
from penstock.net.codec import Codec

MAX_QUEUED = 1000
MAX_BYTES = 256 << 20
HEARTBEAT_S = 1.0
DEAD_AFTER_S = 10.0
LINGER_S = 1.0
BUDGET = 64  # frames taken in one turn of the loop, so that nobody else starves
GONE = zmq.EVENT_DISCONNECTED | zmq.EVENT_CLOSED | zmq.EVENT_HANDSHAKE_FAILED_NO_DETAIL


def private_endpoint() -> tuple[str, Path]:
    """A fresh ipc:// endpoint in a folder that only this user may enter; the caller removes the folder."""
    folder = Path(tempfile.mkdtemp(prefix="penstock-"))  # mode 0700
    return f"ipc://{folder}/engine", folder


class ZmqChannel:
    """One end. Make it with `bind` (before the peer starts) or `connect`, inside a running loop."""

    def __init__(self, socket: zmq.Socket[bytes], codec: Codec) -> None:
        self._socket = socket
        self._codec = codec
        self._loop = asyncio.get_running_loop()
        self._on_message: Callable[[object], None] | None = None
        self._on_closed: Callable[[str], None] | None = None
        self._end: str | None = None
        self._room: asyncio.Future[None] | None = None
        self._is_due = False
        self._monitor = socket.get_monitor_socket(GONE)
        self._loop.add_reader(_number(self._monitor, zmq.FD), self._look)
        self._loop.add_reader(_number(socket, zmq.FD), self._pump)
        self._loop.call_soon(self._look)

    @classmethod
    def bind(cls, endpoint: str, codec: Codec) -> ZmqChannel:
        socket = _socket()
        socket.bind(endpoint)
        return cls(socket, codec)

    @classmethod
    def connect(cls, endpoint: str, codec: Codec) -> ZmqChannel:
        socket = _socket()
        channel = cls(socket, codec)
        socket.connect(endpoint)
        return channel

    @property
    def endpoint(self) -> str:
        """Where the bound end can be reached (tells the port when tcp chose one)."""
        return self._socket.getsockopt_string(zmq.LAST_ENDPOINT)

    async def send(self, message: object, num_bytes: int = 0) -> None:
        frame = self._codec.encode(message)
        while not self._send(frame):
            if self._room is None or self._room.done():
                self._room = self._loop.create_future()
            await asyncio.shield(self._room)

    def offer(self, message: object, num_bytes: int = 0) -> bool:
        return self._send(self._codec.encode(message))

    def _send(self, frame: bytes) -> bool:
        if self._end is not None:
            raise ReplicaLost(f"the channel is closed: {self._end}")
        try:
            self._socket.send(frame, zmq.NOBLOCK)
        except zmq.Again:
            return False
        self._pump_soon()
        return True

    def listen(self, on_message: Callable[[object], None]) -> None:
        self._on_message = on_message
        self._pump_soon()

    def watch(self, on_closed: Callable[[str], None]) -> None:
        self._on_closed = on_closed
        self._pump_soon()

    async def close(self) -> None:
        self._on_closed = self._on_message = None
        self._shut("this end closed it")

    def _pump_soon(self) -> None:
        if not self._is_due and not self._socket.closed:
            self._is_due = True
            self._loop.call_soon(self._pump_due)

    def _pump_due(self) -> None:
        self._is_due = False
        self._pump()

    def _pump(self) -> None:
        """Take what has come, wake a sender when there is room, and look again if more may be there."""
        if self._socket.closed or self._on_message is None:
            return
        for _ in range(BUDGET):
            try:
                frame = self._socket.recv(zmq.NOBLOCK)
            except zmq.Again:
                break
            try:
                if not self._hand_over(frame):
                    return
            except BaseException:
                self._pump_soon()  # whoever listens broke; what came behind it is still to be told
                raise
        events = _number(self._socket, zmq.EVENTS)
        if events & zmq.POLLOUT and self._room is not None and not self._room.done():
            self._room.set_result(None)
        if events & zmq.POLLIN:
            self._pump_soon()
        elif self._end is not None:
            self._tell()

    def _hand_over(self, frame: bytes) -> bool:
        assert self._on_message is not None
        try:
            message = self._codec.decode(frame)
        except PenstockError as error:
            self._end = f"the peer sent {error.message}"
            self._tell()
            return False
        self._on_message(message)
        return not self._socket.closed and self._on_message is not None

    def _look(self) -> None:
        """Read the monitor: the peer is gone."""
        if self._socket.closed:
            return
        while _number(self._monitor, zmq.EVENTS) & zmq.POLLIN:
            event = parse_monitor_message(self._monitor.recv_multipart(zmq.NOBLOCK))["event"]
            if event & GONE and self._end is None:
                self._end = "the peer is gone"
                if self._room is not None and not self._room.done():
                    self._room.set_result(None)
        self._pump_soon()

    def _tell(self) -> None:
        if self._on_closed is not None:
            assert self._end is not None
            on_closed, self._on_closed = self._on_closed, None
            self._shut(self._end)
            on_closed(self._end)

    def _shut(self, why: str) -> None:
        self._end = self._end or why
        if self._room is not None and not self._room.done():
            self._room.set_result(None)
        if self._socket.closed:
            return
        self._loop.remove_reader(_number(self._socket, zmq.FD))
        self._loop.remove_reader(_number(self._monitor, zmq.FD))
        self._socket.disable_monitor()
        self._monitor.close(linger=0)
        self._socket.close(linger=int(LINGER_S * 1000))


def flush_closed() -> None:
    """Wait until what closed channels still hold is sent, LINGER_S at most: a process that ends drops it otherwise.

    For the end of a process: no channel may be open, and none can be opened afterwards.
    """
    zmq.Context.instance().term()


def _number(socket: zmq.Socket[bytes], option: zmq.SocketOption) -> int:
    value = socket.getsockopt(option)
    assert isinstance(value, int)
    return value


def _socket() -> zmq.Socket[bytes]:
    socket: zmq.Socket[bytes] = zmq.Context.instance().socket(zmq.PAIR)
    options = {
        zmq.SNDHWM: MAX_QUEUED,
        zmq.RCVHWM: MAX_QUEUED,
        zmq.MAXMSGSIZE: MAX_BYTES,
        zmq.RECONNECT_IVL: -1,
        zmq.HEARTBEAT_IVL: int(HEARTBEAT_S * 1000),
        zmq.HEARTBEAT_TIMEOUT: int(DEAD_AFTER_S * 1000),
        zmq.HEARTBEAT_TTL: int(DEAD_AFTER_S * 1000),
        zmq.LINGER: int(LINGER_S * 1000),
    }
    for option, value in options.items():
        socket.setsockopt(option, value)
    return socket
