"""What vLLM tells of its blocks of keys and values: batches of events over a ZeroMQ PUB socket, in msgpack.

A message has three parts, topic, number (8 bytes, rising by one) and batch. Nobody can be asked for what was missed
here (vLLM's replay socket is not used): a number that is not the next one is told as a gap, and what was known before
it is in doubt. ZeroMQ connects again by itself when the server comes back; its numbers then begin anew, which is a
gap too.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Callable, Sequence

import msgspec
import zmq
import zmq.asyncio

Hash = int | bytes
_log = logging.getLogger("penstock.net")


class Stored(msgspec.Struct, tag="BlockStored", gc=False):
    """Full blocks, one after the other, behind `parent_block_hash` (None: the beginning).

    `extra_keys`: what else decides each block, as adapter, media and, of the first one, salt. Not set: the server is of
    a version that does not tell. `group_idx`: of layers with memory of their own, where there are several kinds.
    """

    block_hashes: list[Hash]
    parent_block_hash: Hash | None = None
    token_ids: list[int] = []
    block_size: int = 0
    lora_id: int | None = None
    medium: str | None = None
    lora_name: str | None = None
    extra_keys: list[list[object] | None] | None | msgspec.UnsetType = msgspec.UNSET
    group_idx: int | None = None


class Removed(msgspec.Struct, tag="BlockRemoved", gc=False):
    block_hashes: list[Hash]
    medium: str | None = None
    group_idx: int | None = None


class Cleared(msgspec.Struct, tag="AllBlocksCleared", gc=False):
    """Nothing is left."""


KvEvent = Stored | Removed | Cleared


class _ListedStored(Stored, array_like=True, tag="BlockStored", gc=False):
    """As versions until 2026 write it."""


class _ListedRemoved(Removed, array_like=True, tag="BlockRemoved", gc=False): ...


class _ListedCleared(Cleared, array_like=True, tag="AllBlocksCleared", gc=False): ...


class _Batch(msgspec.Struct, gc=False):
    ts: float
    events: list[msgspec.Raw]


class _ListedBatch(_Batch, array_like=True, gc=False): ...


_batch = msgspec.msgpack.Decoder(_Batch).decode
_listed_batch = msgspec.msgpack.Decoder(_ListedBatch).decode
_event = msgspec.msgpack.Decoder(KvEvent).decode
_listed_event = msgspec.msgpack.Decoder(_ListedStored | _ListedRemoved | _ListedCleared).decode


def events_of(told: bytes) -> list[KvEvent]:
    """Of one batch; it and each event are a map or, in older versions, a list. Raises msgspec.DecodeError."""
    batch = _batch(told) if _is_map(told) else _listed_batch(told)
    return [_event(raw) if _is_map(raw) else _listed_event(raw) for raw in batch.events]


def _is_map(told: bytes | msgspec.Raw) -> bool:
    first = memoryview(told)[0] if len(memoryview(told)) else 0
    return first >> 4 == 0x8 or first in (0xDE, 0xDF)


class KvEvents:
    """One server's events, from `__init__` inside a running loop to `close`."""

    def __init__(
        self,
        endpoint: str,
        on_events: Callable[[Sequence[KvEvent]], None],
        on_gap: Callable[[], None],
    ) -> None:
        self._endpoint, self._on_events, self._on_gap = endpoint, on_events, on_gap
        self._socket = zmq.asyncio.Context.instance().socket(zmq.SUB)
        self._socket.setsockopt(zmq.SUBSCRIBE, b"")
        self._socket.setsockopt(zmq.LINGER, 0)
        self._socket.connect(endpoint)
        self._next: int | None = None
        self._task = asyncio.get_running_loop().create_task(self._listen())

    def close(self) -> None:
        self._task.cancel()
        self._socket.close()

    async def _listen(self) -> None:
        while True:
            parts = await self._socket.recv_multipart()
            if len(parts) < 2:
                continue
            number = int.from_bytes(parts[-2][-8:], "big")
            if self._next is not None and number != self._next:
                self._on_gap()
            self._next = number + 1
            try:
                events = events_of(parts[-1])
            except msgspec.DecodeError as error:
                _log.warning("events of %s cannot be read: %s", self._endpoint, error)
                self._on_gap()
                continue
            self._on_events(events)
