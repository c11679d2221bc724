"""Blocks of cards: each replica copies its own from and to host memory; in between there is shared memory or TCP.

    target -> source   token | count | block numbers, as in net.kv_tcp | offset (8) | length of a name (2) | the name
    source -> target   one byte: IN_WINDOW, they lie in the target's window from that offset on, packed
                                 AS_BYTES, they follow

A target has a window, host memory that others of its machine can map, and tells its name: a source that can map it
copies from its card straight into it, one that cannot (another machine, another container) sends the same bytes. So
the source takes part, but each byte is copied twice by the cards' own copy engines and by nobody else. The window has
two halves: while one is emptied to the target's card, the source fills the other.

A peer that dies harms nobody: the window lives as long as somebody maps it. One that is waited for too long may still
write into the window when it goes on, so behind each copy that failed the target takes another window. Threads, token
and losses are those of net.kv_tcp.
"""

from __future__ import annotations

import asyncio
import logging
import socket
import struct
import threading
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path

import numpy as np

from penstock.core.errors import ReplicaLost
from penstock.net.blocks import (
    Memory,
    Readable,
    Region,
    Runs,
    block_bytes,
    blocks_here,
    blocks_there,
)
from penstock.net.kv_link import KvLink
from penstock.net.kv_shared import SharedFile, is_offered, opened, process_of
from penstock.net.kv_tcp import (
    CONNECT_S,
    HEAD,
    STALL_S,
    Served,
    prepare,
    read_exactly,
    read_into,
)

SCHEME = "staged:"
WHERE = struct.Struct("!QH")
IN_WINDOW, AS_BYTES = b"w", b"b"
HALF_BYTES = 32 << 20
logger = logging.getLogger(__name__)


class Window:
    """Two halves of host memory, and the name by which others can map it: empty where nobody can, or shall."""

    def __init__(self, half_bytes: int, pinned: Memory, *, is_shared: bool) -> None:
        """`pinned`: by which the card can copy to and from it."""
        self.half_bytes, self.name, self._pinned = half_bytes, "", pinned
        self.memory: Region = np.zeros(0, np.uint8)
        self._file: SharedFile | None = None
        if is_shared and is_offered():
            self._share()
        if self._file is None:
            self.memory = np.zeros(2 * half_bytes, np.uint8)
        pinned.pin(self.memory)

    def _share(self) -> None:
        num_bytes = 2 * self.half_bytes
        try:
            self._file = SharedFile(num_bytes)  # kept open: others find it through us
        except OSError as error:  # a limit on files, a sandbox
            logger.warning("blocks go over sockets, as no memory can be shared: %s", error)
            return
        self.memory = np.frombuffer(self._file.memory, np.uint8)
        self.name = self._file.address((num_bytes,))

    def leave(self) -> None:
        """Whoever was told of it may still write into what it was, and into nothing that is read."""
        if self._file is None:  # nobody else can
            return
        self._pinned.unpin(self.memory)
        self._file.close()
        self._file, self.name = None, ""
        self._share()
        if self._file is None:
            self.memory = np.zeros(2 * self.half_bytes, np.uint8)
        self._pinned.pin(self.memory)

    def part(self, offset: int, shape: tuple[int, int, int]) -> Region:
        return self.memory[offset : offset + int(np.prod(shape))].reshape(shape)


class StagedTransport(Served):
    """A core.transport.Transport of a card's memory. It serves as soon as it is made."""

    scheme = SCHEME

    def __init__(
        self, memory: Memory, *, layout: str, block_size: int, link: KvLink | None = None
    ) -> None:
        super().__init__(memory, layout=layout, block_size=block_size, link=link)
        half = max(HALF_BYTES, block_bytes(memory))
        is_shared = link is None or link.kind != "tcp"
        self._memory, self._window = memory, Window(half, memory, is_shared=is_shared)
        self._theirs: dict[str, Region | None] = {}  # windows that were mapped; None: it cannot be
        self._mapping = threading.Lock()
        self._sources: dict[str, StagedSource] = {}
        self._worker = ThreadPoolExecutor(1, thread_name_prefix="penstock-blocks")
        self.begin()

    async def pull(self, address: str, runs: Runs) -> None:
        if not address.startswith(SCHEME):
            raise ReplicaLost("its blocks are not those of a card")
        source = self._sources.get(address)
        if source is None:
            source = self._sources[address] = StagedSource(address, self._memory, self._window)
        there, here = blocks_there(runs), blocks_here(runs)
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._worker, source.pull, there, here)

    @property
    def behind(self) -> int | None:
        return None  # host memory behind a card is not served

    async def sums(self, blocks: Sequence[int]) -> tuple[int, ...]:
        if not blocks:
            return ()
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._worker, self._sums, blocks)

    def _sums(self, blocks: Sequence[int]) -> tuple[int, ...]:
        told = np.empty((self._memory.shape[0], len(blocks), self._memory.shape[2]), np.uint8)
        self._memory.fetch(blocks, told)
        return Readable(told).sums(range(len(blocks)))

    async def close(self) -> None:
        self.end()
        for source in self._sources.values():
            source.close()
        self._worker.shutdown(wait=True)
        with self._mapping:
            for window in (self._window.memory, *self._theirs.values()):
                if window is not None:
                    self._memory.unpin(window)
            self._theirs.clear()

    # ---------------------------------------------------------------- as source; on threads of peers

    def answer(self, peer: socket.socket, blocks: list[int]) -> None:
        offset, length = WHERE.unpack(read_exactly(peer, WHERE.size))
        name = read_exactly(peer, length).decode() if length else ""
        shape = (self._memory.shape[0], len(blocks), self._memory.shape[2])
        size = int(np.prod(shape))
        window = self._window_of(name) if name else None
        if window is not None and offset + size <= len(window):
            self._memory.fetch(blocks, window[offset : offset + size].reshape(shape))
            peer.sendall(IN_WINDOW)
            return
        told = np.empty(shape, np.uint8)
        self._memory.fetch(blocks, told)
        peer.sendall(AS_BYTES)
        peer.sendall(told.reshape(-1).data)

    def _window_of(self, name: str) -> Region | None:
        with self._mapping:
            if name not in self._theirs:
                self._forget_the_dead()
                try:
                    window = opened(name, is_written=True)
                    self._memory.pin(window)
                except ReplicaLost as error:
                    logger.info("blocks go to a peer over its socket: %s", error.message)
                    window = None
                self._theirs[name] = window
            return self._theirs[name]

    def _forget_the_dead(self) -> None:
        for name, window in list(self._theirs.items()):
            if not Path(f"/proc/{process_of(name)}").exists():
                del self._theirs[name]
                if window is not None:
                    self._memory.unpin(window)


class StagedSource:
    """A connection to a peer that is read from. On the puller's thread."""

    def __init__(self, address: str, memory: Memory, window: Window) -> None:
        host, port, token = address.removeprefix(SCHEME).rsplit(":", 2)
        self._place, self._token = (host, int(port)), bytes.fromhex(token)
        self._memory, self._window = memory, window
        self._socket: socket.socket | None = None

    def pull(self, there: Sequence[int], here: Sequence[int]) -> None:
        """Raises ReplicaLost."""
        is_kept = self._socket is not None
        try:
            try:
                self._pull(there, here)
            except OSError:
                if not is_kept:
                    raise
                self._pull(there, here)  # what was kept may have been closed long ago
        except OSError as error:
            host, port = self._place
            raise ReplicaLost(f"blocks of {host}:{port} did not come: {error}") from None

    def close(self) -> None:
        kept = self._socket
        if kept is not None:
            with suppress(OSError):
                kept.shutdown(socket.SHUT_RDWR)

    def _pull(self, there: Sequence[int], here: Sequence[int]) -> None:
        step = self._window.half_bytes // block_bytes(self._memory)
        groups = [slice(at, at + step) for at in range(0, len(there), step)]
        try:
            link = self._connected()
            self._ask(link, there[groups[0]], 0)
            for place, group in enumerate(groups):
                if place + 1 < len(groups):
                    self._ask(link, there[groups[place + 1]], (place + 1) % 2)
                packed = self._hear(link, len(there[group]), place % 2)
                self._memory.store(here[group], packed)
        except BaseException:
            kept, self._socket = self._socket, None  # what is still to come on it is of no use
            if kept is not None:
                kept.close()
                self._window.leave()
            raise

    def _connected(self) -> socket.socket:
        if self._socket is None:
            self._socket = socket.create_connection(self._place, timeout=CONNECT_S)
            self._socket.settimeout(STALL_S)
            prepare(self._socket)
        return self._socket

    def _ask(self, link: socket.socket, blocks: Sequence[int], half: int) -> None:
        name, numbers = self._window.name.encode(), np.array(blocks, ">u4").tobytes()
        where = WHERE.pack(half * self._window.half_bytes, len(name))
        link.sendall(HEAD.pack(self._token, len(blocks)) + numbers + where + name)

    def _hear(self, link: socket.socket, count: int, half: int) -> Region:
        shape = (self._memory.shape[0], count, self._memory.shape[2])
        packed = self._window.part(half * self._window.half_bytes, shape)
        if read_exactly(link, 1) == AS_BYTES:
            read_into(link, packed.reshape(-1).data)
        return packed
