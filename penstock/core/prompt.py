"""Prompts and their block hashes.

The hash of a block is a keyed BLAKE2b of (parent hash, token ids) and of what else decides its KV: adapter,
cache salt and the digests of media parts inside it. It is the same in every process that holds the same key, so
routers, replicas and logs can compare hashes and nobody can find a collision for another tenant's block without
the key. A prompt hashes lazily and remembers the result, so asking twice costs nothing.
"""

from __future__ import annotations

import functools
import hashlib
import struct
from array import array
from collections.abc import Callable, Sequence
from typing import cast

from penstock.core.types import BlockHash, Part

HASH_BYTES = 16


def seed_hash(key: bytes, adapter: str | None, salt: str) -> BlockHash:
    """The parent of every first block: equal for prompts that may share blocks."""
    told = f"{adapter or ''}\0{salt}".encode()
    return BlockHash(hashlib.blake2b(told, digest_size=HASH_BYTES, key=key).digest())


def hash_block(parent: BlockHash, ids: Sequence[int], media: Sequence[bytes] = ()) -> BlockHash:
    """Hash of one full block. `parent` is keyed, so the chain is."""
    told = array("q", ids).tobytes()
    return BlockHash(
        hashlib.blake2b(b"".join((told, *media)), digest_size=HASH_BYTES, key=parent).digest()
    )


def private_hashes(owner: str, count: int) -> tuple[BlockHash, ...]:
    """Hashes that only the answers of one request share: for prompts that carry none of their own."""
    first = hashlib.blake2b(owner.encode(), digest_size=HASH_BYTES - 4, person=b"private").digest()
    return tuple(BlockHash(first + place.to_bytes(4, "big")) for place in range(count))


class TokenPrompt:
    """A real prompt. `ids` are token ids; media parts put their digest into the blocks they touch."""

    __slots__ = ("ids", "key", "adapter", "salt", "parts", "_hashes")

    def __init__(
        self,
        ids: Sequence[int],
        *,
        key: bytes = b"",
        adapter: str | None = None,
        salt: str = "",
        parts: tuple[Part, ...] = (),
    ) -> None:
        self.ids = tuple(ids)
        self.key, self.adapter, self.salt, self.parts = key, adapter, salt, parts
        self._hashes: dict[int, tuple[BlockHash, ...]] = {}

    @property
    def num_tokens(self) -> int:
        return len(self.ids)

    def blocks(self, size: int) -> tuple[BlockHash, ...]:
        known = self._hashes.get(size)
        if known is None:
            known = self._hashes[size] = tuple(self.extend((), self.ids, size))
        return known

    def extend(self, hashes: Sequence[BlockHash], ids: Sequence[int], size: int) -> list[BlockHash]:
        """Hashes of the full blocks of `ids` beyond the `hashes` already known."""
        parent = hashes[-1] if hashes else seed_hash(self.key, self.adapter, self.salt)
        fresh: list[BlockHash] = []
        for start in range(len(hashes) * size, len(ids) - size + 1, size):
            media = [
                part.digest
                for part in self.parts
                if part.start < start + size and start < part.start + part.num_tokens
            ]
            parent = hash_block(parent, ids[start : start + size], media)
            fresh.append(parent)
        return fresh


class TracedPrompt:
    """A prompt known by its size and, where the trace tells, by the ids of its shared blocks.

    `hash_ids[i]` names the prefix up to and including the i-th run of `traced_size` tokens (Mooncake's format:
    equal ids mean equal prefixes). Smaller blocks get a hash of (id, offset); a partial last run counts only
    for the full small blocks inside it. Larger blocks, of whole runs, are named by the last run inside.
    """

    __slots__ = ("num_tokens", "hash_ids", "traced_size", "salt", "_hashes")

    def __init__(
        self,
        num_tokens: int,
        hash_ids: tuple[int, ...] = (),
        traced_size: int = 512,
        salt: str = "",
    ) -> None:
        self.num_tokens = num_tokens
        self.hash_ids, self.traced_size, self.salt = hash_ids, traced_size, salt
        self._hashes: dict[int, tuple[BlockHash, ...]] = {}

    def blocks(self, size: int) -> tuple[BlockHash, ...]:
        if not self.hash_ids:
            return ()
        known = self._hashes.get(size)
        if known is None:
            if size > self.traced_size and size % self.traced_size == 0:
                known = self._hashes[size] = self._large_blocks(size)
                return known
            if self.traced_size % size:
                raise ValueError(
                    f"block size {size} does not divide the trace's {self.traced_size}, nor is it a multiple of it"
                )
            tails, split = _tails(self.traced_size // size, self.salt)
            built: list[bytes] = []
            for one in self.hash_ids:
                built += split(one.to_bytes(8, "big").join(tails))
            del built[self.num_tokens // size :]
            known = self._hashes[size] = cast(tuple[BlockHash, ...], tuple(built))
        return known

    def _large_blocks(self, size: int) -> tuple[BlockHash, ...]:
        runs = size // self.traced_size
        count = min(self.num_tokens // size, len(self.hash_ids) // runs)
        lasts = (self.hash_ids[(place + 1) * runs - 1] for place in range(count))
        end = bytes(4) + self.salt.encode()
        return tuple(BlockHash(last.to_bytes(8, "big") + end) for last in lasts)


@functools.lru_cache(maxsize=64)
def _tails(count: int, salt: str) -> tuple[tuple[bytes, ...], Callable[[bytes], tuple[bytes, ...]]]:
    """What tells apart the `count` blocks of one run, and how to split them where the run's name has joined them.

    Nothing stands in front, so that the name is put before each of them.
    """
    ends = [place.to_bytes(4, "big") + salt.encode() for place in range(count)]
    return (b"", *ends), struct.Struct(f"{8 + len(ends[0])}s" * count).unpack


class HashedPrompt:
    """A prompt known by size and hashes at one block size: what a log or a wire without ids carries."""

    __slots__ = ("num_tokens", "hashes", "size")

    def __init__(self, num_tokens: int, hashes: tuple[BlockHash, ...] = (), size: int = 16) -> None:
        self.num_tokens, self.hashes, self.size = num_tokens, hashes, size

    def blocks(self, size: int) -> tuple[BlockHash, ...]:
        if self.hashes and size != self.size:
            raise ValueError(
                f"this prompt carries hashes of {self.size}-token blocks, asked for {size}"
            )
        return self.hashes
