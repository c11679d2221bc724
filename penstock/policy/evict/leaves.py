"""Cached prefixes leave leaf by leaf, in one of the orders of a radix tree.

Source: the eviction strategies of SGLang's radix cache (sglang 0.5.23, srt/mem_cache/evict_policy.py).

Idea: only what nothing follows may go, or a prefix that is still known could not be found. Of these leaves the least
by `by` goes; what it followed may be a leaf then and stands against the others.

    lru         walked along longest ago
    mru         walked along last
    lfu         fewest jobs came along; then lru
    slru        those along which fewer than `protected_hits` jobs came before the others; then lru in each part
    fifo        made first
    filo        made last
    priority    least important; then lru

Parameters: by (default lru), protected_hits (default 2).

Where we differ: not in the orders, which a store with a tree keeps itself (`rank`); T-LRU, which needs the lengths of
conversations, is left out. In a store without a tree nothing is known of a block but its age: as offered, the longest
unused first, and the configuration refuses it there. Asked about running jobs it takes the earliest admitted. `decide`
itself looks at every cached node; the store with a tree asks it only where every decision is held to its law.
"""

from __future__ import annotations

import heapq
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from itertools import chain
from typing import ClassVar, Literal, Protocol, cast

from penstock.policy.evict import Decision, Item, View, take

By = Literal["lru", "mru", "lfu", "slru", "fifo", "filo", "priority"]


class Node(Protocol):
    """What a tree tells of a cached run of blocks. Larger `priority` matters more."""

    @property
    def num_blocks(self) -> int: ...
    @property
    def parent(self) -> Node | None: ...
    @property
    def num_children(self) -> int: ...
    @property
    def used_at(self) -> int: ...
    @property
    def made_at(self) -> int: ...
    @property
    def hits(self) -> int: ...
    @property
    def priority(self) -> int: ...


@dataclass(slots=True)
class Leaves:
    by: By = "lru"
    protected_hits: int = 2

    needs_tree: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if self.by not in RANKS:
            raise ValueError(f"by must be one of {', '.join(RANKS)}; got {self.by!r}")
        if self.protected_hits < 1:
            raise ValueError(f"protected_hits must be at least 1, got {self.protected_hits}")

    def rank(self, node: Node) -> tuple[float, ...]:
        """Of two leaves the one of the lesser rank leaves first."""
        return RANKS[self.by](self, node)

    def decide(self, view: View) -> Decision:
        items = iter(view.items)
        first = next(items, None)
        if first is None:
            return Decision(())
        offered = chain((first,), items)
        if not hasattr(first, "num_children"):
            return take(view, offered)
        return take(view, self._leaves(cast(list[Node], list(offered))))

    def _leaves(self, nodes: list[Node]) -> Iterator[Item]:
        """Leaf after leaf, by rank, as if each were gone by then."""
        places = {id(node): place for place, node in enumerate(nodes)}
        left = [node.num_children for node in nodes]
        heap = [(self.rank(nodes[place]), place) for place, num in enumerate(left) if not num]
        heapq.heapify(heap)
        while heap:
            node = nodes[heapq.heappop(heap)[1]]
            yield node
            place = places.get(id(node.parent))
            if place is None:  # it followed nothing, or what is still held
                continue
            left[place] -= 1
            if not left[place]:
                heapq.heappush(heap, (self.rank(nodes[place]), place))


RANKS: dict[By, Callable[[Leaves, Node], tuple[float, ...]]] = {
    "lru": lambda leaves, node: (node.used_at,),
    "mru": lambda leaves, node: (-node.used_at,),
    "lfu": lambda leaves, node: (node.hits, node.used_at),
    "slru": lambda leaves, node: (node.hits >= leaves.protected_hits, node.used_at),
    "fifo": lambda leaves, node: (node.made_at,),
    "filo": lambda leaves, node: (-node.made_at,),
    "priority": lambda leaves, node: (node.priority, node.used_at),
}
