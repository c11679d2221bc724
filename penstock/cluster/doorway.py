"""The door of an engine that outlives its server, and how the next server comes in.

    engine -> server   {"version", "spec"}                       one line of JSON, to whoever connects
    server -> engine   {"endpoint": ...} | {"end": true}         be served there from now on | end

An engine is taken over only as what the next server would start: the same spec (but for the text of the whole
configuration, which says more than its own affairs) and the same version of the program. Any other is ended, and one
of this server's is started in its place.
"""

from __future__ import annotations

import asyncio
import dataclasses
import json
import logging
import os
import signal
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import penstock
from penstock.cluster.spec import ReplicaSpec
from penstock.core.messages import Message
from penstock.core.ports import Channel
from penstock.net.codec import Codec
from penstock.net.zmq import ZmqChannel

ANSWER_S = 5.0  # for a word of an engine, which says it between two turns of its loop
END_S = 5.0
LIMIT_BYTES = 16 << 20  # of a line: a spec names all policies and adapters
_log = logging.getLogger("penstock.engine")


def likeness(spec: ReplicaSpec) -> str:
    """Equal for specs that make the same engine, on whichever side of a pipe."""
    told = ReplicaSpec.from_json(spec.to_json())
    return dataclasses.replace(told, config="").to_json()


class Doorway:
    """An engine's side. `adopt` hears of a channel to serve from now on, `end` that it is to end."""

    def __init__(
        self,
        path: Path,
        spec: ReplicaSpec,
        *,
        adopt: Callable[[Channel], None],
        end: Callable[[], None],
    ) -> None:
        self._path, self._adopt, self._end = path, adopt, end
        self._hello = json.dumps({"version": penstock.__version__, "spec": likeness(spec)})
        self._server: asyncio.Server | None = None

    async def open(self) -> None:
        with suppress(FileNotFoundError):
            self._path.unlink()  # of one that is dead
        self._server = await asyncio.start_unix_server(
            self._receive, str(self._path), limit=LIMIT_BYTES
        )

    def close(self) -> None:
        if self._server is not None:
            self._server.close()
            with suppress(OSError):
                self._path.unlink()

    async def _receive(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            writer.write(self._hello.encode() + b"\n")
            await writer.drain()
            line = await asyncio.wait_for(reader.readline(), ANSWER_S)
        except (OSError, TimeoutError, ValueError):
            line = b""
        finally:
            writer.close()
        if line:
            self._obey(json.loads(line))

    def _obey(self, told: dict[str, object]) -> None:
        if told.get("end"):
            _log.info("another server has come, which has no use for this engine")
            self._end()
            return
        _log.info("another server has come")
        self._adopt(ZmqChannel.connect(str(told["endpoint"]), Codec(Message)))


class Survivor:
    """The next server's side: a process that is not its child. Its end is seen through a descriptor of it."""

    def __init__(self, pid: int, writer: asyncio.StreamWriter) -> None:
        self.pid = pid
        self.returncode: int | None = None
        self._descriptor = os.pidfd_open(pid)
        self._writer = writer
        self._ended: asyncio.Future[int] = asyncio.get_running_loop().create_future()
        asyncio.get_running_loop().add_reader(self._descriptor, self._note_end)

    async def wait(self) -> int:
        return await asyncio.shield(self._ended)

    def kill(self) -> None:
        if self.returncode is None:
            with suppress(ProcessLookupError):
                signal.pidfd_send_signal(self._descriptor, signal.SIGKILL)

    async def serve_at(self, endpoint: str) -> None:
        """Raises OSError."""
        await self._tell({"endpoint": endpoint})

    async def end(self) -> None:
        """Ask it to, and make it."""
        with suppress(OSError):
            await self._tell({"end": True})
        try:
            await asyncio.wait_for(self.wait(), END_S)
        except TimeoutError:
            self.kill()
            await self.wait()

    async def _tell(self, told: dict[str, object]) -> None:
        self._writer.write(json.dumps(told).encode() + b"\n")
        await self._writer.drain()
        self._writer.close()

    def _note_end(self) -> None:
        asyncio.get_running_loop().remove_reader(self._descriptor)
        os.close(self._descriptor)
        self.returncode = 0  # how it ended is told to its parent only
        self._ended.set_result(0)


async def find(path: Path) -> tuple[Survivor, dict[str, object]] | None:
    """The engine behind a door, and what it says of itself; None when there is none."""
    try:
        reader, writer = await asyncio.open_unix_connection(str(path), limit=LIMIT_BYTES)
    except OSError:  # nobody is there any more
        with suppress(OSError):
            path.unlink()
        return None
    pid, _, _ = struct.unpack("3i", _peer(writer))
    try:
        survivor = Survivor(pid, writer)
    except ProcessLookupError:
        writer.close()
        return None
    try:
        told = json.loads(await asyncio.wait_for(reader.readline(), ANSWER_S))
    except (OSError, TimeoutError, ValueError):  # it stands still, or dies
        survivor.kill()
        await survivor.wait()
        writer.close()
        return None
    return survivor, told


async def find_like(path: Path, spec: ReplicaSpec) -> Survivor | None:
    """The engine behind a door if it is what this spec would make; any other one is ended."""
    found = await find(path)
    if found is None:
        return None
    survivor, told = found
    if told == {"version": penstock.__version__, "spec": likeness(spec)}:
        return survivor
    _log.info("[%s] the engine of the server before is another one: it is ended", spec.name)
    await survivor.end()
    return None


async def end_behind(path: Path) -> None:
    """Nobody asks for the engine behind this door any more."""
    found = await find(path)
    if found is not None:
        await found[0].end()


def _peer(writer: asyncio.StreamWriter) -> bytes:
    """Process, user and group of the other end, as the kernel knows them."""
    end = writer.get_extra_info("socket")
    told: bytes = end.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, struct.calcsize("3i"))
    return told
