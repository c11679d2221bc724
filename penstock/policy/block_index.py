"""Which replica holds which blocks, by hash: told by the replicas, and guessed from what was sent to them.

    told      a replica's news (engine.block_news): exact, up to what is on its way
    guessed   a prompt sent to a replica will be there in a moment (policy.guesses). A guess becomes certain when it is
              told, and is forgotten after `ttl_s`. Of a replica that tells nothing (a foreign server) all is guessed,
              the longest unused beyond `most` blocks are taken for gone, leaves before what they continue

Every hash that was told has a bit for each replica. Hashes of a prompt are chained, and a replica gives up the end of a
sequence before its beginning, so along a prompt the bits only go out; `match` looks for the places where some do by
halving, and asks about a prompt of thousands of blocks in a few dozen steps. Where some do, guesses may go on. One that
gave up a block in the middle is taken to hold what follows it as well, until that goes too.

Work: `match` O(log blocks) for each place where replicas drop out, guesses O(log blocks) for each run that they meet;
news O(blocks of them).
"""

from __future__ import annotations

from collections.abc import Container, Sequence, Set

from penstock.core.messages import BlockNews
from penstock.core.types import BlockHash
from penstock.core.views import Behind
from penstock.policy.guesses import Guesses, Note, Owner

TTL_S = 120.0
NOTHING: frozenset[BlockHash] = frozenset()
MOST_BLOCKS = 1 << 18  # guessed of one replica
MOST_MASKS = 1 << 12  # whose names are kept


class _Replica(Owner):
    """One replica: what it told, and what is guessed of it."""

    __slots__ = ("name", "told")

    def __init__(self, name: str, bit: int) -> None:
        super().__init__(bit)
        self.name = name
        self.told: set[BlockHash] = set()


class BlockIndex:
    """A core.views.BlockFinder."""

    has_tiers = False

    def __init__(self, ttl_s: float = TTL_S) -> None:
        self._ttl_s = ttl_s
        self._masks: dict[BlockHash, int] = {}
        self._guesses = Guesses()
        self._replicas: dict[str, _Replica] = {}
        self._by_bit: list[_Replica | None] = []
        self._names_of: dict[int, list[str]] = {}  # masks that were met lately
        self._widest = 0, 0, dict[str, int]()  # of the last match: who has how much at least

    def match(self, hashes: Sequence[BlockHash]) -> dict[str, int]:
        """See core.views.BlockFinder."""
        masks, guesses, end = self._masks, self._guesses, len(hashes)
        found, at, holders = None, 0, -1 if end else 0  # of all before `at`
        spans: list[tuple[int, int]] = []  # up to which place guesses go, and whose
        while at < end:
            by_told, by_guess, until = masks.get(hashes[at], 0) & holders, 0, end
            run = guesses.at(hashes[at])
            while run is not None:
                if run.holders & holders:
                    spans.append((at + run.shared(hashes, at), run.holders))
                run = run.beside
            if spans:
                spans = [span for span in spans if span[0] > at]
                for place, who in spans:
                    by_guess, until = by_guess | who & holders, min(until, place)
            left = by_told | by_guess
            if at and left != holders:
                found = self._with(found, holders, at)
            holders = left
            if not holders:
                break
            by_told &= ~by_guess
            at = self._where_fewer(hashes, by_told, at + 1, until) if by_told else until
        return self._with(found, holders, at) if holders else found or {}

    def _with(self, found: dict[str, int] | None, holders: int, num: int) -> dict[str, int]:
        """What was found, and that these hold so many blocks; those that hold more are told again."""
        if found is None:
            if self._widest[:2] != (holders, num):  # nearly all prompts begin alike
                self._widest = holders, num, dict.fromkeys(self._names(holders), num)
            return self._widest[2].copy()
        for name in self._names(holders):
            found[name] = num
        return found

    def depth(self, hashes: Sequence[BlockHash], name: str) -> int:
        """See core.views.BlockFinder."""
        replica, at, end = self._replicas.get(name), 0, len(hashes)
        while replica is not None and at < end:
            at = self._where_fewer(hashes, replica.bit, at, end)
            _, shared = self._guesses.of(replica.bit, hashes, at) if at < end else (None, 0)
            if not shared:
                break
            at += shared
        return at

    def behind(self, hashes: Sequence[BlockHash]) -> dict[str, Behind]:
        """See core.views.BlockFinder: nothing is known of other memory."""
        return {}

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
        """Whose bits these are. Read-only."""
        names = self._names_of.get(mask)
        if names is None:
            if len(self._names_of) >= MOST_MASKS:
                self._names_of.clear()
            names, left = list[str](), mask
            while left:
                low = left & -left
                replica = self._by_bit[low.bit_length() - 1]
                assert replica is not None, "a bit that is nobody's"
                names.append(replica.name)
                left ^= low
            self._names_of[mask] = names
        return names

    def tell(self, name: str, news: BlockNews) -> None:
        """A replica's news."""
        replica, masks = self._of(name), self._masks
        bit, told = replica.bit, replica.told
        for each in news.stored:
            masks[each] = masks.get(each, 0) | bit
        told.update(news.stored)
        told.difference_update(news.removed)
        for each in news.removed:
            self._clear(each, bit)
        if replica.num:
            self._guesses.confirm(replica, news.stored, told)

    def guess(
        self, now: float, name: str, hashes: Sequence[BlockHash], most: int | None = None
    ) -> None:
        """A prompt was sent there."""
        replica, guesses, end = self._of(name), self._guesses, len(hashes)
        note, at = Note(now + self._ttl_s), self._where_fewer(hashes, replica.bit, 0, end)
        while at < end:
            at = guesses.add(replica, hashes, at, note)
            at = self._where_fewer(hashes, replica.bit, at, end)
        guesses.keep_most(replica, MOST_BLOCKS if most is None else most)

    def expire(self, now: float, name: str) -> None:
        """Forget guesses about this replica that nobody confirmed in time."""
        replica = self._replicas.get(name)
        if replica is not None:
            self._guesses.expire(replica, now)

    def forget(self, name: str) -> None:
        """It died: what it held is gone."""
        replica = self._replicas.pop(name, None)
        if replica is None:
            return
        for each in replica.told:
            self._clear(each, replica.bit)
        self._guesses.forget(replica)
        self._by_bit[replica.bit.bit_length() - 1] = None
        self._names_of.clear()
        self._widest = 0, 0, {}

    def told(self, name: str) -> set[BlockHash]:
        """What this replica holds as it told itself."""
        return set(self._replicas[name].told) if name in self._replicas else set()

    def told_of(self, name: str) -> Set[BlockHash]:
        """The same, not copied: read-only, and valid until anything is told."""
        return self._replicas[name].told if name in self._replicas else NOTHING

    def guessed(self, name: str) -> list[BlockHash]:
        """What it is only taken to hold, the longest unused first."""
        return self._replicas[name].blocks() if name in self._replicas else []

    def size(self, name: str) -> int:
        """Blocks that it holds or is taken to hold."""
        replica = self._replicas.get(name)
        return 0 if replica is None else len(replica.told) + replica.num

    def keep_only(self, names: Container[str]) -> None:
        """Forget all other replicas."""
        for name in [name for name in self._replicas if name not in names]:
            self.forget(name)

    def check(self) -> None:
        """What is kept twice is the same."""
        masks: dict[BlockHash, int] = {}
        for replica in self._replicas.values():
            for each in replica.told:
                masks[each] = masks.get(each, 0) | replica.bit
        assert masks == self._masks, "the bits are not what was told"
        self._guesses.check()

    def _of(self, name: str) -> _Replica:
        found = self._replicas.get(name)
        if found is None:
            place = self._by_bit.index(None) if None in self._by_bit else len(self._by_bit)
            found = self._replicas[name] = _Replica(name, 1 << place)
            self._by_bit[place : place + 1] = [found]
            self._guesses.own(found)
        return found

    def _clear(self, each: BlockHash, bit: int) -> None:
        left = self._masks.get(each, 0) & ~bit
        if left:
            self._masks[each] = left
        else:
            self._masks.pop(each, None)
