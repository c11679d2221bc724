"""How far to look into a prompt for a key that is neither everybody's nor nobody's.

Source: DualMap's prefix hotness tree.

Prompts that begin alike should get the same key, and a beginning that more than its share of all prompts have (a
system prompt) must be split, or its replica would drown. With n replicas and rho(p) the share of the last `window`
prompts that begin with p:

    key(prompt) = its first unit; while the key is split, one unit more
    p is split when rho(p) > 2 / n, and no longer when rho(p) < 1 / n        (the band keeps keys from flapping)

A unit is as many blocks as make `unit_tokens`. Below `least` prompts in the window nothing is split.

Work: one count up and one down for each unit of a prompt, at most `deepest` of them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from penstock.core.types import BlockHash

UNIT_TOKENS = 512


class Hotness:
    """Counts over the last prompts by their beginnings."""

    def __init__(
        self,
        *,
        window: int = 512,
        least: int = 50,
        deepest: int = 64,
        unit_tokens: int = UNIT_TOKENS,
    ) -> None:
        self._window, self._least = window, least
        self._deepest, self._unit_tokens = deepest, unit_tokens
        self._counts: dict[BlockHash, int] = {}
        self._split: set[BlockHash] = set()
        self._seen: deque[tuple[BlockHash, ...]] = deque()

    def units(self, hashes: Sequence[BlockHash], block_size: int) -> tuple[BlockHash, ...]:
        """The beginnings of a prompt, by their last block; one that is shorter than a unit is one."""
        step = max(1, self._unit_tokens // block_size)
        found = tuple(hashes[step - 1 : step * self._deepest : step])
        return found or tuple(hashes[-1:])

    def see(self, units: tuple[BlockHash, ...], num_replicas: int) -> None:
        """A prompt came."""
        counts, seen = self._counts, self._seen
        seen.append(units)
        for each in units:
            counts[each] = counts.get(each, 0) + 1
        if len(seen) > self._window:
            for each in seen.popleft():
                left = counts[each] - 1
                if left:
                    counts[each] = left
                else:
                    del counts[each]
                    self._split.discard(each)
        self._settle(units, num_replicas)

    def _settle(self, units: tuple[BlockHash, ...], num_replicas: int) -> None:
        """Split or join the beginnings of this prompt; others change when they are asked for."""
        total, split = len(self._seen), self._split
        if total < self._least:
            return
        for each in units:
            share = self._counts[each] / total
            if share > 2 / num_replicas:
                split.add(each)
            elif share < 1 / num_replicas:
                split.discard(each)
            if each not in split:
                break

    def key(self, units: tuple[BlockHash, ...]) -> BlockHash:
        """The shortest beginning that is not split, or all of it."""
        split = self._split
        for each in units:
            if each not in split:
                return each
        return units[-1]

    def depth(self, units: tuple[BlockHash, ...]) -> int:
        """Units in the key."""
        return units.index(self.key(units)) + 1
