"""Blocks between hosts: the source serves its KV memory on a socket, the target asks for blocks by number.

    target -> source   token (16 bytes) | count (4) | count block numbers (4 each)
    source -> target   the blocks, packed: pieces after pieces, as in net.blocks

A pull asks for groups of GROUP_BYTES, one after the other on one connection, so that neither side holds more than
that beside its memory: a group comes packed, and is scattered where it arrives. The connection is kept for the next
pull from the same source. Both sides work in threads of their own, beside the steps and the loop. Who does not know the
token, which travels with the card, is cut off. Plain bytes: for hosts that trust the network between them.

A peer that says nothing for STALL_S counts as lost.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import struct
import threading
from abc import ABC, abstractmethod
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress

import numpy as np

from penstock.core.errors import BadConfig, ReplicaLost
from penstock.core.moving import KvCard
from penstock.net.blocks import (
    Memory,
    Readable,
    Region,
    Runs,
    block_bytes,
    blocks_here,
    blocks_there,
    scatter,
)
from penstock.net.kv_link import KvLink

SCHEME = "tcp:"
HEAD = struct.Struct("!16sI")
GROUP_BYTES = 4 << 20
CONNECT_S = 5.0
STALL_S = 10.0
PULLS_AT_ONCE = 4


class Served(ABC):
    """The side that is read from: a port, on which whoever knows the token is answered. Raises BadConfig when no port
    is to be had.
    """

    scheme = SCHEME

    def __init__(
        self, memory: Region | Memory, *, layout: str, block_size: int, link: KvLink | None = None
    ) -> None:
        link = link or KvLink()
        host = link.host or "127.0.0.1"
        self._listener = listen(link)
        port = self._listener.getsockname()[1]
        self._token, self.num_blocks = secrets.token_bytes(16), memory.shape[1]
        self._card = KvCard(
            layout=layout,
            address=f"{self.scheme}{host}:{port}:{self._token.hex()}",
            block_size=block_size,
            block_bytes=block_bytes(memory),
        )
        self._served: set[socket.socket] = set()

    @property
    def card(self) -> KvCard:
        return self._card

    @abstractmethod
    def answer(self, peer: socket.socket, blocks: list[int]) -> None:
        """On a thread of the peer's. Raises OSError, ReplicaLost."""

    def begin(self) -> None:
        threading.Thread(target=self._accept, name="penstock-serves-blocks", daemon=True).start()

    def end(self) -> None:
        for one in (self._listener, *self._served):
            with suppress(OSError):  # it may be closed at the other end
                one.shutdown(socket.SHUT_RDWR)
            one.close()

    def _accept(self) -> None:
        while True:
            try:
                peer, _ = self._listener.accept()
            except OSError:
                return  # it was closed
            self._served.add(peer)
            threading.Thread(target=self._serve, args=(peer,), daemon=True).start()

    def _serve(self, peer: socket.socket) -> None:
        try:
            peer.settimeout(STALL_S)  # until it has shown the token once
            prepare(peer)
            while True:
                token, count = HEAD.unpack(read_exactly(peer, HEAD.size))
                most = self.num_blocks
                if not secrets.compare_digest(token, self._token) or not 0 < count <= most:
                    return
                peer.settimeout(None)
                numbers = np.frombuffer(read_exactly(peer, 4 * count), ">u4")
                if numbers.max() >= most:
                    return
                self.answer(peer, numbers.astype(np.int64).tolist())
        except (OSError, ReplicaLost):
            return  # the peer has gone, this side ends, or cannot copy
        finally:
            self._served.discard(peer)
            peer.close()


class TcpTransport(Served):
    """A core.transport.Transport. It serves as soon as it is made."""

    def __init__(
        self, region: Region, *, layout: str, block_size: int, link: KvLink | None = None
    ) -> None:
        super().__init__(region, layout=layout, block_size=block_size, link=link)
        self._region, self._own = region, Readable(region)
        self._sources: dict[str, Source] = {}
        self._workers = ThreadPoolExecutor(PULLS_AT_ONCE, thread_name_prefix="penstock-blocks")
        self.begin()

    @property
    def behind(self) -> int | None:
        return None if len(self._own.regions) == 1 else int(self._region.shape[1])

    def add(self, region: Region) -> None:
        """Peers read this region too, behind the other one; before anybody has been told of the card."""
        self._own = Readable(self._region, region)
        self.num_blocks = self._own.num_blocks

    async def sums(self, blocks: Sequence[int]) -> tuple[int, ...]:
        loop = asyncio.get_running_loop()
        return await loop.run_in_executor(self._workers, self._own.sums, blocks)

    async def pull(self, address: str, runs: Runs) -> None:
        address = address.rpartition("|")[2]  # the last part of net.kv_either's
        if not address.startswith(SCHEME):
            raise ReplicaLost("its blocks are not to be had over TCP")
        source = self._sources.get(address)
        if source is None:
            source = self._sources[address] = Source(address)
        there, here = blocks_there(runs), blocks_here(runs)
        loop = asyncio.get_running_loop()
        await loop.run_in_executor(self._workers, source.pull, self._region, there, here)

    async def close(self) -> None:
        self.end()
        for source in self._sources.values():
            source.close()
        self._workers.shutdown(wait=True)

    def answer(self, peer: socket.socket, blocks: list[int]) -> None:
        peer.sendall(self._own.pack(blocks).data)


class Source:
    """A connection to a peer that is read from. Its methods run on workers' threads."""

    def __init__(self, address: str) -> None:
        host, port, token = address.removeprefix(SCHEME).rsplit(":", 2)
        self._place, self._token = (host, int(port)), bytes.fromhex(token)
        self._socket: socket.socket | None = None
        self._turn = threading.Lock()

    def pull(self, region: Region, there: Sequence[int], here: Sequence[int]) -> None:
        """Raises ReplicaLost."""
        step = max(1, GROUP_BYTES // block_bytes(region))
        with self._turn:
            for start in range(0, len(there), step):
                part = slice(start, start + step)
                self._pull_group(region, there[part], here[part])

    def close(self) -> None:
        kept = self._socket
        if kept is not None:
            with suppress(OSError):
                kept.shutdown(socket.SHUT_RDWR)

    def _pull_group(self, region: Region, there: Sequence[int], here: Sequence[int]) -> None:
        is_kept = self._socket is not None
        try:
            try:
                told = self._ask(region, there)
            except OSError:
                if not is_kept:
                    raise
                told = self._ask(region, there)  # what was kept may have been closed long ago
        except OSError as error:
            host, port = self._place
            raise ReplicaLost(f"blocks of {host}:{port} did not come: {error}") from None
        scatter(region, here, told)

    def _ask(self, region: Region, blocks: Sequence[int]) -> Region:
        pieces, _, size = region.shape
        try:
            if self._socket is None:
                self._socket = socket.create_connection(self._place, timeout=CONNECT_S)
                self._socket.settimeout(STALL_S)
                prepare(self._socket)
            head = HEAD.pack(self._token, len(blocks))
            self._socket.sendall(head + np.array(blocks, ">u4").tobytes())
            told = read_exactly(self._socket, pieces * len(blocks) * size)
        except BaseException:
            kept, self._socket = self._socket, None  # what is still to come on it is of no use
            if kept is not None:
                kept.close()
            raise
        return np.frombuffer(told, np.uint8).reshape(pieces, len(blocks), size)


def listen(link: KvLink) -> socket.socket:
    """On the first port that is free. Raises BadConfig."""
    first, last = (0, 0) if link.ports is None else link.ports
    why: OSError | None = None
    for port in range(first, last + 1):
        try:
            return socket.create_server((link.host or "127.0.0.1", port), backlog=64)
        except OSError as error:
            why = error
    raise BadConfig(
        f"blocks cannot be served on {link.host or '127.0.0.1'}, ports {first} to {last}: {why}",
        hint="net.kv.host must be an address of this machine, and net.kv.ports a range with a port for each replica",
    )


def prepare(one: socket.socket) -> None:
    one.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
    one.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)


def read_exactly(one: socket.socket, count: int) -> bytearray:
    """Raises OSError."""
    told = bytearray(count)
    read_into(one, memoryview(told))
    return told


def read_into(one: socket.socket, view: memoryview) -> None:
    """Until it is full. Raises OSError."""
    at = 0
    while at < len(view):
        got = one.recv_into(view[at:])
        if not got:
            raise ConnectionResetError("the peer closed the connection")
        at += got
