"""Questions and answers between two processes of one machine, in microseconds: for threads that may wait.

A frame is a kind, a length and so many bytes; either end may send any number of them. The listener's name lies in the
abstract space of Unix sockets, which has no files and no permissions, so the kernel is asked whose process calls: only
this user's own are let in. A peer that dies ends the line at once, and one that says nothing for `patience_s` while
it is waited for counts as lost: nobody hangs.
"""

from __future__ import annotations

import os
import secrets
import socket
import struct
import threading
from collections.abc import Callable

from penstock.core.errors import ReplicaLost

SCHEME = "line:"
PATIENCE_S = 30.0
_HEAD = struct.Struct("<II")  # kind, bytes
_PEER = struct.Struct("3i")  # process, user, group
Body = bytes | memoryview


class Line:
    """One end. `patience_s` None: waits for as long as it takes, as those do who answer."""

    def __init__(self, link: socket.socket, *, patience_s: float | None = None) -> None:
        self._link = link
        self._head = bytearray(_HEAD.size)
        self._body = bytearray(1 << 16)
        link.settimeout(patience_s)

    def send(self, kind: int, *bodies: Body) -> None:
        """Raises ReplicaLost."""
        parts = [memoryview(each).cast("B") for each in bodies if len(each)]
        parts.insert(0, memoryview(_HEAD.pack(kind, sum(map(len, parts)))))
        try:
            while parts:  # all at once: whoever waits wakes up once
                sent = self._link.sendmsg(parts)
                while parts and sent >= len(parts[0]):
                    sent -= len(parts.pop(0))
                if sent:
                    parts[0] = parts[0][sent:]
        except OSError as error:
            raise _lost(error) from None

    def hear(self) -> tuple[int, memoryview]:
        """The next frame, which is good until the one behind it is heard. Raises ReplicaLost."""
        try:
            self._fill(memoryview(self._head))
            kind, num_bytes = _HEAD.unpack(self._head)
            if num_bytes > len(self._body):
                self._body = bytearray(num_bytes)
            body = memoryview(self._body)[:num_bytes]
            self._fill(body)
        except OSError as error:
            raise _lost(error) from None
        return kind, body

    def _fill(self, place: memoryview) -> None:
        while place:
            count = self._link.recv_into(place)
            if not count:
                raise ConnectionResetError("the other process is gone")
            place = place[count:]

    def close(self) -> None:
        """Whoever waits at either end hears of it."""
        try:
            self._link.shutdown(socket.SHUT_RDWR)
        except OSError:
            pass  # the other end was faster
        self._link.close()


class Listener:
    """Has `on_line` called with each new line, in a thread of its own, until it returns."""

    def __init__(self, on_line: Callable[[Line], None]) -> None:
        self._on_line = on_line
        self._lines: set[Line] = set()
        self._token = f"penstock-{secrets.token_hex(12)}"
        self._door = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        self._door.bind(f"\0{self._token}")
        self._door.listen()
        threading.Thread(target=self._main, name="penstock-door", daemon=True).start()

    @property
    def address(self) -> str:
        return f"{SCHEME}{self._token}"

    def _main(self) -> None:
        while True:
            try:
                link, _ = self._door.accept()
            except OSError:  # closed
                return
            told = link.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, _PEER.size)
            if _PEER.unpack(told)[1] != os.getuid():
                link.close()
                continue
            line = Line(link)
            self._lines.add(line)
            threading.Thread(
                target=self._serve, args=(line,), name="penstock-line", daemon=True
            ).start()

    def _serve(self, line: Line) -> None:
        try:
            self._on_line(line)
        except ReplicaLost:
            pass  # it hung up
        finally:
            self._lines.discard(line)
            line.close()

    def close(self) -> None:
        try:
            self._door.shutdown(socket.SHUT_RDWR)  # wakes whoever accepts
        except OSError:
            pass
        self._door.close()
        for line in list(self._lines):
            line.close()


def call(address: str, *, patience_s: float = PATIENCE_S) -> Line:
    """Raises ReplicaLost when nobody is there."""
    link = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        link.connect(f"\0{address.removeprefix(SCHEME)}")
    except OSError as error:
        link.close()
        raise _lost(error) from None
    return Line(link, patience_s=patience_s)


def _lost(error: OSError) -> ReplicaLost:
    told = "it says nothing" if isinstance(error, TimeoutError) else error.strerror or str(error)
    return ReplicaLost(f"another replica cannot be reached: {told}")
