"""Which replica holds which blocks, by hash: told by the replicas, and guessed from what was sent to them.

    told      a replica's news (engine.block_news): exact, up to what is on its way
    guessed   a prompt sent to a replica will be there in a moment. A guess becomes certain when it is told, and is
              forgotten after `ttl_s`. Of a replica that tells nothing (a foreign server) all is guessed, the longest
              unused beyond `most` blocks are taken for gone, leaves before what they continue

Every hash has a bit for each replica. Hashes of a prompt are chained, and a replica gives up the end of a sequence
before its beginning, so along a prompt the bits only go out; `match` looks for the places where some do by halving,
and asks about a prompt of thousands of blocks in a few dozen steps. A replica that gave up a block in the middle is
taken to hold what follows it as well, until that goes too.

Work: `match` O(log blocks) for each place where replicas drop out; news and guesses O(blocks of them).
"""

from __future__ import annotations

from collections.abc import Container, Sequence, Set
from itertools import islice

from penstock.core.messages import BlockNews
from penstock.core.types import BlockHash
from penstock.core.views import InTiers

TTL_S = 120.0
NOTHING: frozenset[BlockHash] = frozenset()
MOST_BLOCKS = 1 << 18  # guessed of one replica


class _Replica:
    """One replica: its bit, what it told, and what is guessed until when (the longest unused first)."""

    __slots__ = ("name", "bit", "told", "guessed")

    def __init__(self, name: str, bit: int) -> None:
        self.name, self.bit = name, bit
        self.told: set[BlockHash] = set()
        self.guessed: dict[BlockHash, float] = {}


class BlockIndex:
    """A core.views.BlockFinder."""

    has_tiers = False

    def __init__(self, ttl_s: float = TTL_S) -> None:
        self._ttl_s = ttl_s
        self._masks: dict[BlockHash, int] = {}
        self._replicas: dict[str, _Replica] = {}
        self._by_bit: list[_Replica | None] = []
        self._widest, self._widest_names = 0, list[str]()  # of the last match

    def match(self, hashes: Sequence[BlockHash]) -> dict[str, int]:
        """See core.views.BlockFinder."""
        holders = self._masks.get(hashes[0], 0) if hashes else 0
        if not holders:
            return {}
        if holders != self._widest:  # what nearly all prompts begin with, nearly all replicas hold
            self._widest, self._widest_names = holders, self._names(holders)
        at, end = 1, len(hashes)
        found, names = dict[str, int](), self._widest_names
        while True:
            at = self._where_fewer(hashes, holders, at, end)
            found.update(dict.fromkeys(names, at))  # those that hold more are told again
            holders &= self._masks.get(hashes[at], 0) if at < end else 0
            if not holders:
                return found
            names = self._names(holders)
            at += 1

    def tiers(self, hashes: Sequence[BlockHash]) -> dict[str, InTiers]:
        """See core.views.BlockFinder: nothing is known of other memory."""
        return {name: InTiers(num) for name, num in self.match(hashes).items()}

    def _where_fewer(self, hashes: Sequence[BlockHash], holders: int, low: int, high: int) -> int:
        """The first place from `low` on that not all `holders` have; `high` when there is none."""
        masks = self._masks
        step = 1
        while low < high:  # near the last place first: prompts part soon after each other
            ahead = min(low + step, high) - 1
            if masks.get(hashes[ahead], 0) & holders == holders:
                low, step = ahead + 1, 2 * step
                continue
            high = ahead
            break
        while low < high:
            middle = (low + high) // 2
            if masks.get(hashes[middle], 0) & holders == holders:
                low = middle + 1
            else:
                high = middle
        return low

    def _names(self, mask: int) -> list[str]:
        """Whose bits these are."""
        names, by_bit = [], self._by_bit
        while mask:
            low = mask & -mask
            replica = by_bit[low.bit_length() - 1]
            assert replica is not None, "a bit that is nobody's"
            names.append(replica.name)
            mask ^= low
        return names

    def tell(self, name: str, news: BlockNews) -> None:
        """A replica's news."""
        replica, masks = self._of(name), self._masks
        bit = replica.bit
        for each in news.stored:
            if replica.guessed.pop(each, None) is None:
                masks[each] = masks.get(each, 0) | bit
        replica.told.update(news.stored)
        replica.told.difference_update(news.removed)
        for each in news.removed:
            if each not in replica.guessed:
                self._clear(each, bit)

    def guess(
        self, now: float, name: str, hashes: Sequence[BlockHash], most: int | None = None
    ) -> None:
        """A prompt was sent there."""
        replica, masks, until = self._of(name), self._masks, now + self._ttl_s
        guessed, bit, held_by = replica.guessed, replica.bit, masks.get
        for each in reversed(hashes):
            mask = held_by(each, 0)
            if not mask & bit:
                masks[each] = mask | bit
            elif guessed.pop(each, None) is None:
                break  # told, and so is all before it
            guessed[each] = until
        over = len(guessed) - (MOST_BLOCKS if most is None else most)
        for each in list(islice(guessed, over)) if over > 0 else ():
            del guessed[each]
            self._clear(each, bit)

    def expire(self, now: float, name: str) -> None:
        """Forget guesses about this replica that nobody confirmed in time."""
        replica = self._replicas.get(name)
        if replica is None:
            return
        guessed = replica.guessed
        while guessed:
            each = next(iter(guessed))
            if guessed[each] > now:
                break
            del guessed[each]
            self._clear(each, replica.bit)

    def forget(self, name: str) -> None:
        """It died: what it held is gone."""
        replica = self._replicas.pop(name, None)
        if replica is None:
            return
        for each in (*replica.told, *replica.guessed):
            self._clear(each, replica.bit)
        self._by_bit[replica.bit.bit_length() - 1] = None
        self._widest = 0

    def told(self, name: str) -> set[BlockHash]:
        """What this replica holds as it told itself."""
        return set(self._replicas[name].told) if name in self._replicas else set()

    def told_of(self, name: str) -> Set[BlockHash]:
        """The same, not copied: read-only, and valid until anything is told."""
        return self._replicas[name].told if name in self._replicas else NOTHING

    def guessed(self, name: str) -> list[BlockHash]:
        """What it is only taken to hold, the longest unused first."""
        return list(self._replicas[name].guessed) if name in self._replicas else []

    def size(self, name: str) -> int:
        """Blocks that it holds or is taken to hold."""
        replica = self._replicas.get(name)
        return 0 if replica is None else len(replica.told) + len(replica.guessed)

    def keep_only(self, names: Container[str]) -> None:
        """Forget all other replicas."""
        for name in [name for name in self._replicas if name not in names]:
            self.forget(name)

    def __len__(self) -> int:
        return len(self._masks)

    def _of(self, name: str) -> _Replica:
        found = self._replicas.get(name)
        if found is None:
            place = self._by_bit.index(None) if None in self._by_bit else len(self._by_bit)
            found = self._replicas[name] = _Replica(name, 1 << place)
            self._by_bit[place : place + 1] = [found]
        return found

    def _clear(self, each: BlockHash, bit: int) -> None:
        left = self._masks.get(each, 0) & ~bit
        if left:
            self._masks[each] = left
        else:
            self._masks.pop(each, None)
