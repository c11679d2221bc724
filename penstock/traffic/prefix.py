"""What prompts share: system prompts by popularity, and conversations that grow.

Nobody needs the text, only which prompts begin alike. A `Chain` stands for a prompt's content as a row of segments,
each with a name and a length; equal names are equal text. It is hashed in runs of `block_tokens`: `ids[i]` names all
content up to the end of the i-th full run, so equal ids mean equal prefixes and a longer prompt that continues a
shorter one extends its ids. A run that is not full has no id: it is shared with nobody, as in an engine whose blocks
are of that size. Blocks of the served engine must divide `block_tokens` or be a multiple of it.

`[prefix]` draws each prompt's beginning by Zipf popularity: rank k in proportion to 1/k^zipf. Deeper levels make a
tree, as of a product's prompt, then a tenant's tools, then a document: Mooncake's traces look like that.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

from penstock.core.rng import stream
from penstock.traffic.draws import Drawn, draw_of, whole, zipf_weights

BLOCK_TOKENS = 64
ID_BITS = 63
STRIDE = 0x1E3779B97F4A7C15  # odd: the ids of one segment's runs do not repeat


class Chain:
    """Content of a prompt so far. Immutable: `extend` gives another, so that branches share what they share."""

    __slots__ = ("size", "num_tokens", "ids", "_tail")

    def __init__(self, size: int = BLOCK_TOKENS) -> None:
        self.size, self.num_tokens = size, 0
        self.ids: tuple[int, ...] = ()
        self._tail: tuple[tuple[str, int, int], ...] = ()  # (segment, from, tokens) in the open run

    def extend(self, segment: str, tokens: int) -> Chain:
        """This content and `tokens` of the segment, from its beginning."""
        longer = Chain(self.size)
        longer.num_tokens = self.num_tokens + tokens
        room = self.size - self.num_tokens % self.size
        if tokens < room:
            part = ((segment, 0, tokens),) if tokens else ()
            longer.ids, longer._tail = self.ids, (*self._tail, *part)
            return longer
        first = self._hash((*self._tail, (segment, 0, room)))
        num_full = 1 + (tokens - room) // self.size
        ids = ((first + place * STRIDE) % (1 << ID_BITS) for place in range(num_full))
        longer.ids = (*self.ids, *ids)
        left = (tokens - room) % self.size
        longer._tail = ((segment, tokens - left, left),) if left else ()
        return longer

    def _hash(self, parts: tuple[tuple[str, int, int], ...]) -> int:
        told = repr((self.size, self.ids[-1] if self.ids else None, parts)).encode()
        digest = hashlib.blake2b(told, digest_size=8, person=b"chain").digest()
        return int.from_bytes(digest, "big") >> (64 - ID_BITS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Level:
    """`number` different texts, each of `tokens` (drawn once for each)."""

    number: int = 1
    tokens: Drawn = 0.0
    zipf: float = 1.0

    def __post_init__(self) -> None:
        if self.number < 1 or self.zipf < 0:
            raise ValueError("a level needs number >= 1 and zipf >= 0")


@dataclass(frozen=True, slots=True, kw_only=True)
class Prefix(Level):
    """`share` of the callers begin with one of the texts, deeper levels after it.

    counts: "within" leaves prompt lengths as drawn and takes the prefix out of them (at least one token is the caller's
    own); "added" puts it on top. Every tenant has texts of its own unless they are the same `across_tenants`.
    """

    share: float = 1.0
    counts: Literal["within", "added"] = "within"
    across_tenants: bool = False
    block_tokens: int = BLOCK_TOKENS
    deeper: tuple[Level, ...] = ()

    def __post_init__(self) -> None:
        super(Prefix, self).__post_init__()
        if not 0 <= self.share <= 1:
            raise ValueError(f"share must be from 0 to 1, got {self.share}")
        if self.block_tokens < 1:
            raise ValueError(f"block_tokens must be at least 1, got {self.block_tokens}")


class Prefixes:
    """Draws beginnings. The texts and their lengths are functions of the seed; `owner` keeps sources apart."""

    def __init__(self, prefix: Prefix | None, *, seed: int, owner: str, where: str) -> None:
        self._prefix, self._seed, self._owner = prefix, seed, owner
        self._levels: Sequence[Level] = () if prefix is None else (prefix, *prefix.deeper)
        self._weights = [zipf_weights(level.number, level.zipf) for level in self._levels]
        self._draws = [draw_of(level.tokens, f"{where}.tokens") for level in self._levels]
        self._chance = stream(seed, "traffic", "prefix", owner)
        self._known: dict[str, int] = {}
        self.is_added = prefix is not None and prefix.counts == "added"
        self.size = BLOCK_TOKENS if prefix is None else prefix.block_tokens

    def draw(self, num_prompt: int, tenant: str = "") -> Chain:
        """The beginning of a tenant's prompt of drawn length `num_prompt`: empty for one that shares nothing."""
        chain = Chain(self.size)
        if self._prefix is None or self._chance.random() >= self._prefix.share:
            return chain
        name = self._owner if self._prefix.across_tenants else f"{self._owner}/{tenant}"
        for place, weights in enumerate(self._weights):
            rank = self._chance.choices(range(len(weights)), cum_weights=weights)[0]
            name = f"{name}/prefix{rank}"
            tokens = self._tokens(name, place)
            if not self.is_added:
                tokens = min(tokens, num_prompt - 1 - chain.num_tokens)
            chain = chain.extend(name, tokens)
        return chain

    def _tokens(self, name: str, place: int) -> int:
        """The length of the text: drawn once, from a stream of its own."""
        known = self._known.get(name)
        if known is None:
            chance = stream(self._seed, "traffic", "prefix", name)
            known = self._known[name] = whole(self._draws[place], chance, 0)
        return known
