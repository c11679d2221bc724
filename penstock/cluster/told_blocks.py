"""A foreign server's own word on what its blocks hold, in our hashes, so that the fleet's block index can use it.

The server names a block by a hash of its making, and tells the tokens when it stores one. Our hash of them, chained
from our hash of its parent, is what prompts are looked up by (core.prompt); the table between the two is kept for as
long as the server keeps the block. Blocks of adapters, blocks in other memory than the device's, and those whose
parent is not known are left out. A salted prompt is told without its salt, so it is never found by what was told.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from penstock.core.messages import BlockNews
from penstock.core.prompt import hash_block, seed_hash
from penstock.core.types import BlockHash
from penstock.net.kv_events import Cleared, Hash, KvEvent, KvEvents, Stored

DEVICE = (None, "GPU")


class ToldBlocks:
    """One server's blocks. `hash_key` is the secret that keys our hashes."""

    def __init__(self, endpoint: str, hash_key: bytes) -> None:
        self._endpoint = endpoint
        self._seed = seed_hash(hash_key, None, "")
        self._ours: dict[Hash, BlockHash] = {}
        self._on_news: Callable[[BlockNews], None] | None = None
        self._events: KvEvents | None = None

    def start(self, on_news: Callable[[BlockNews], None]) -> None:
        self._on_news = on_news
        self._events = KvEvents(self._endpoint, self.hear, self._lose_all)

    def close(self) -> None:
        if self._events is not None:
            self._events.close()
            self._events = None

    def forget(self) -> None:
        """The server is down: what it held is gone, and who heard of it knows."""
        self._ours.clear()

    def hear(self, events: Sequence[KvEvent]) -> None:
        """The news in events, told in their order."""
        for event in events:
            if isinstance(event, Stored):
                self._tell(stored=self._take(event))
            elif isinstance(event, Cleared):
                self._lose_all()
            elif event.medium in DEVICE:
                gone = [self._ours.pop(each, None) for each in event.block_hashes]
                self._tell(removed=[each for each in gone if each is not None])

    def _take(self, event: Stored) -> list[BlockHash]:
        parent = (
            self._seed
            if event.parent_block_hash is None
            else self._ours.get(event.parent_block_hash)
        )
        size, fresh = event.block_size, []
        if parent is None or size < 1 or event.lora_id is not None or event.medium not in DEVICE:
            return []
        for place, theirs in enumerate(event.block_hashes):
            ids = event.token_ids[place * size : (place + 1) * size]
            if len(ids) < size:
                break
            parent = self._ours[theirs] = hash_block(parent, ids)
            fresh.append(parent)
        return fresh

    def _lose_all(self) -> None:
        gone = list(self._ours.values())
        self._ours.clear()
        self._tell(removed=gone)

    def _tell(self, *, stored: Sequence[BlockHash] = (), removed: Sequence[BlockHash] = ()) -> None:
        if self._on_news is not None and (stored or removed):
            self._on_news(BlockNews(tuple(stored), tuple(removed)))
