"""Which replica holds which blocks, by hash, and where: on the device, in host memory or on disk.

Three indexes (policy.block_index), each of what can be had without going further away:

    device   as ever, guesses included: what a prompt finds at once
    near     device and host memory: what peers can read too
    far      all of it

A prompt's blocks are given up from their end, so what follows a replica's blocks on the device is in its host memory,
and what follows those on disk: the numbers that `behind` tells are differences of the three matches. Where replicas
have no memory behind the device's, all three are one index, and nothing costs more.
"""

from __future__ import annotations

from collections.abc import Container, Iterable, Sequence, Set

from penstock.core.messages import BlockNews
from penstock.core.types import BlockHash
from penstock.core.views import Behind
from penstock.policy.block_index import TTL_S, BlockIndex


class TierIndex:
    """A core.views.BlockFinder."""

    def __init__(self, ttl_s: float = TTL_S, *, has_tiers: bool = False) -> None:
        self.has_tiers = has_tiers
        self._device = BlockIndex(ttl_s)
        self._near = BlockIndex(ttl_s) if has_tiers else self._device
        self._far = BlockIndex(ttl_s) if has_tiers else self._device
        self._host: dict[str, set[BlockHash]] = {}
        self._disk: dict[str, set[BlockHash]] = {}
        self._each = (self._device, self._near, self._far) if has_tiers else (self._device,)

    def match(self, hashes: Sequence[BlockHash]) -> dict[str, int]:
        """See core.views.BlockFinder."""
        return self._device.match(hashes)

    def match_near(self, hashes: Sequence[BlockHash]) -> dict[str, int]:
        """The same of device and host memory."""
        return self._near.match(hashes)

    def depth(self, hashes: Sequence[BlockHash], name: str) -> int:
        """See core.views.BlockFinder."""
        return self._device.depth(hashes, name)

    def behind(self, hashes: Sequence[BlockHash]) -> dict[str, Behind]:
        """See core.views.BlockFinder."""
        found = dict[str, Behind]()
        if not self.has_tiers:
            return found
        device, far = self._device.match(hashes), self._far.match(hashes)
        if far == device:
            return found
        near = self._near.match(hashes)
        for name, end in far.items():
            here = device.get(name, 0)
            if end > here:
                between = min(max(near.get(name, 0), here), end)  # guesses outlive what they were
                found[name] = Behind(between - here, end - between)
        return found

    def tell(self, name: str, news: BlockNews) -> None:
        """A replica's news."""
        self._device.tell(name, news)
        if not self.has_tiers:
            return
        host, disk = self._host.setdefault(name, set()), self._disk.setdefault(name, set())
        for held, change in ((host, news.host), (disk, news.disk)):
            held.update(change.stored)
            held.difference_update(change.removed)
        device = self._device.told_of(name)
        changed = {*news.stored, *news.removed, *news.host.stored, *news.host.removed}
        _settle(self._near, name, changed, (device, host))
        changed.update(news.disk.stored, news.disk.removed)
        _settle(self._far, name, changed, (device, host, disk))

    def guess(
        self, now: float, name: str, hashes: Sequence[BlockHash], most: int | None = None
    ) -> None:
        """A prompt was sent there."""
        for each in self._each:
            each.guess(now, name, hashes, most)

    def expire(self, now: float, name: str) -> None:
        """Forget guesses about this replica that nobody confirmed in time."""
        for each in self._each:
            each.expire(now, name)

    def forget(self, name: str) -> None:
        """It died: what it held is gone."""
        for each in self._each:
            each.forget(name)
        self._host.pop(name, None)
        self._disk.pop(name, None)

    def keep_only(self, names: Container[str]) -> None:
        """Forget all other replicas."""
        for each in self._each:
            each.keep_only(names)
        for table in (self._host, self._disk):
            for name in [name for name in table if name not in names]:
                del table[name]

    def told(self, name: str) -> set[BlockHash]:
        """What this replica has on its device as it told itself."""
        return self._device.told(name)

    def told_near(self, name: str) -> Set[BlockHash]:
        """The same of device and host memory. Read-only, and valid until anything is told."""
        return self._near.told_of(name)

    def told_behind(self, name: str) -> tuple[Set[BlockHash], Set[BlockHash]]:
        """In host memory and on disk."""
        return self._host.get(name, set()), self._disk.get(name, set())

    def guessed(self, name: str) -> list[BlockHash]:
        """What it is only taken to hold, the longest unused first."""
        return self._device.guessed(name)

    def size(self, name: str) -> int:
        """Blocks that it has on its device or is taken to have."""
        return self._device.size(name)

    def check(self) -> None:
        """What is kept twice is the same."""
        for each in self._each:
            each.check()


def _settle(
    index: BlockIndex, name: str, changed: Iterable[BlockHash], held: Sequence[Set[BlockHash]]
) -> None:
    """Tell an index which of the changed blocks are in any of these places now."""
    stored: list[BlockHash] = []
    removed: list[BlockHash] = []
    for each in changed:
        (stored if any([each in place for place in held]) else removed).append(each)
    index.tell(name, BlockNews(tuple(stored), tuple(removed)))
