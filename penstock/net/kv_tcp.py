"""Blocks between hosts: the source serves its KV memory on a socket, the target asks for blocks by number.

    target -> source   token (16 bytes) | count (4) | count block numbers (4 each)
    source -> target   the blocks, packed: pieces after pieces, as in net.blocks

The blocks of one pull come packed in one answer, and are scattered where they arrive. Who does not know the token,
which travels with the card, is cut off. A connection is kept for the next pull from the same source. Plain bytes: for
hosts that trust the network between them.
"""

from __future__ import annotations

import asyncio
import secrets
import socket
import struct

import numpy as np

from penstock.core.errors import ReplicaLost
from penstock.core.moving import KvCard
from penstock.net.blocks import Region, Runs, block_bytes, blocks_here, blocks_there, pack, scatter

SCHEME = "tcp:"
HEAD = struct.Struct("!16sI")
LIMIT = 1 << 22  # bytes that a stream reads ahead
Ends = tuple[asyncio.StreamReader, asyncio.StreamWriter]


class TcpTransport:
    """A core.ports.Transport. Made by `serve_blocks`."""

    def __init__(self, region: Region, server: asyncio.Server, card: KvCard, token: bytes) -> None:
        self._region, self._server, self._card, self._token = region, server, card, token
        self._peers: dict[str, Ends] = {}
        self._turns: dict[str, asyncio.Lock] = {}

    @property
    def card(self) -> KvCard:
        return self._card

    async def pull(self, address: str, runs: Runs) -> None:
        blocks = blocks_there(runs)
        async with self._turns.setdefault(address, asyncio.Lock()):
            try:
                reader, writer = await self._connect(address)
                token = bytes.fromhex(address.rpartition(":")[2])
                writer.write(HEAD.pack(token, len(blocks)) + np.array(blocks, ">u4").tobytes())
                told = await reader.readexactly(len(blocks) * block_bytes(self._region))
            except (OSError, asyncio.IncompleteReadError) as error:
                self._peers.pop(address, None)
                raise ReplicaLost(f"blocks of {address} did not come: {error}") from None
        pieces, _, size = self._region.shape
        packed = np.frombuffer(told, np.uint8).reshape(pieces, len(blocks), size)
        scatter(self._region, blocks_here(runs), packed)

    async def close(self) -> None:
        self._server.close()
        for _, writer in self._peers.values():
            writer.close()
        self._peers.clear()

    async def _connect(self, address: str) -> Ends:
        found = self._peers.get(address)
        if found is None:
            host, _, port = address.removeprefix(SCHEME).rpartition(":")[0].rpartition(":")
            found = await asyncio.open_connection(host, int(port), limit=LIMIT)
            self._peers[address] = found
        return found


async def serve_blocks(
    region: Region, *, layout: str, block_size: int, host: str = "127.0.0.1"
) -> TcpTransport:
    """Serve a region's blocks to whoever has the card. `host`: the address that peers reach this one by."""
    token = secrets.token_bytes(16)

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while True:
                told, count = HEAD.unpack(await reader.readexactly(HEAD.size))
                if not secrets.compare_digest(told, token):
                    return
                numbers = np.frombuffer(await reader.readexactly(4 * count), ">u4")
                if count and numbers.max() >= region.shape[1]:
                    return
                writer.write(pack(region, numbers.astype(np.int64).tolist()).data)
                await writer.drain()
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            return  # the peer has gone, or this side ends
        finally:
            writer.close()

    server = await asyncio.start_server(serve, host, 0, family=socket.AF_INET)
    port = server.sockets[0].getsockname()[1]
    card = KvCard(
        layout=layout,
        address=f"{SCHEME}{host}:{port}:{token.hex()}",
        block_size=block_size,
        block_bytes=block_bytes(region),
    )
    return TcpTransport(region, server, card, token)
