"""A foreign server's own word on what its blocks hold, in our hashes, so that the fleet's block index can use it.

The server names a block by a hash of its making, and tells the tokens when it stores one. Our hash of them, chained
from our hash of its parent, is what prompts are looked up by (core.prompt); the table between the two is kept for as
long as the server keeps the block.

A block is claimed for a prompt only if it is the prompt's: it is of the adapter that this model is on the server (or of
none), and a salt that the server tells with the first block begins the chain that our salted prompts have. Left out
are blocks of other adapters, of images and the like, of other memory than the device's, and those whose parent is not
known. Servers of older versions tell no salts: from the first salted request that goes to one, nothing is believed that
it says of beginnings.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from msgspec import UNSET

from penstock.core.messages import BlockNews
from penstock.core.prompt import hash_block, seed_hash
from penstock.core.types import BlockHash
from penstock.net.kv_events import Cleared, Hash, KvEvent, KvEvents, Stored

DEVICE = (None, "GPU")
FIRST_GROUP = (None, 0)  # of layers; the others hold the same prompts, or parts of them


def no_adapter() -> str | None:
    return None


class ToldBlocks:
    """One server's blocks of one model. `hash_key` is the secret that keys our hashes.

    `adapter`: which one this model is on the server; None = the model itself.
    """

    def __init__(
        self, endpoint: str, hash_key: bytes, adapter: Callable[[], str | None] = no_adapter
    ) -> None:
        self._endpoint, self._hash_key, self._adapter = endpoint, hash_key, adapter
        self._is_salted = False
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

    def note_salt(self) -> None:
        """Salted prompts go there."""
        self._is_salted = True

    def hear(self, events: Sequence[KvEvent]) -> None:
        """The news in events, told in their order."""
        for event in events:
            if isinstance(event, Stored):
                self._tell(stored=self._take(event))
            elif isinstance(event, Cleared):
                self._lose_all()
            elif event.medium in DEVICE and event.group_idx in FIRST_GROUP:
                gone = [self._ours.pop(each, None) for each in event.block_hashes]
                self._tell(removed=[each for each in gone if each is not None])

    def _take(self, event: Stored) -> list[BlockHash]:
        size, fresh = event.block_size, list[BlockHash]()
        if size < 1 or event.medium not in DEVICE or event.group_idx not in FIRST_GROUP:
            return []
        parent: BlockHash | None = None
        if event.parent_block_hash is not None:
            parent = self._ours.get(event.parent_block_hash)
            if parent is None:
                return []
        for place, theirs in enumerate(event.block_hashes):
            ids = event.token_ids[place * size : (place + 1) * size]
            salt = self._salt_of(event, place)
            if len(ids) < size or salt is None or (salt and parent is not None):
                break
            if parent is None:
                parent = seed_hash(self._hash_key, None, salt)
            parent = self._ours[theirs] = hash_block(parent, ids)
            fresh.append(parent)
        return fresh

    def _salt_of(self, event: Stored, place: int) -> str | None:
        """The salt that a block is told with, "" without one; None: it is not of prompts for this model."""
        adapter = self._adapter()
        if event.extra_keys is UNSET:
            is_start = event.parent_block_hash is None and not place
            is_known = event.lora_name == adapter and (event.lora_id is None or adapter is not None)
            return "" if is_known and not (is_start and self._is_salted) else None
        listed = event.extra_keys or ()
        keys = list(listed[place] or ()) if place < len(listed) else []
        if event.lora_name != adapter or (adapter is not None and keys[:1] != [adapter]):
            return None
        rest = keys if adapter is None else keys[1:]
        if not rest:
            return ""
        return rest[0] if len(rest) == 1 and isinstance(rest[0], str) else None

    def _lose_all(self) -> None:
        gone = list(self._ours.values())
        self._ours.clear()
        self._tell(removed=gone)

    def _tell(self, *, stored: Sequence[BlockHash] = (), removed: Sequence[BlockHash] = ()) -> None:
        if self._on_news is not None and (stored or removed):
            self._on_news(BlockNews(tuple(stored), tuple(removed)))
