"""Nodes of the tree of prefixes (engine.radix): runs that know what they follow and what follows them.

`priority` is larger for what matters more; `hits` counts the jobs that came along. Instants are ticks of the tree's
clock: it moves once for whoever walks along a path and once for each node that is made, so no two nodes that could be
emptied next are alike in `used_at` or `made_at`.
"""

from __future__ import annotations

import heapq
from collections.abc import Iterator

from penstock.core.types import BlockHash
from penstock.engine.run import IdleRuns, Rank, Run


class Node(Run):
    """A run in the tree. The root has no blocks and follows nothing. `stamp`: its entry among the leaves, if any."""

    __slots__ = ("parent", "children", "used_at", "made_at", "hits", "priority", "stamp")

    def __init__(
        self,
        blocks: list[int],
        names: list[BlockHash] | None,
        at: int,
        *,
        refs: int = 0,
        parent: Node | None = None,
        made_at: int = 0,
    ) -> None:
        super().__init__(blocks, names, at, refs)
        self.parent = parent
        self.children: dict[BlockHash, Node] = {}
        self.used_at = self.made_at = made_at
        self.hits = 0
        self.priority = 0
        self.stamp: int | None = None
        if parent is not None:
            parent.children[self.key] = self

    @property
    def id(self) -> int:
        """What policies name it by."""
        return self.blocks[0]

    @property
    def num_blocks(self) -> int:
        return len(self.blocks)

    @property
    def num_children(self) -> int:
        return len(self.children)

    @property
    def key(self) -> BlockHash:
        """What its parent finds it by."""
        first = self.first
        assert first is not None, "a node has a name"
        return first

    def fork_at(self, size: int, made_at: int) -> Node:
        """Cut the first `size` blocks off: they become this node's parent, which is answered."""
        begin = Node(
            self.blocks[:size],
            self.names,
            self.at,
            refs=self.refs,
            parent=self.parent,
            made_at=made_at,
        )
        begin.hits, begin.priority = self.hits, self.priority
        del self.blocks[:size]
        self.at += size
        begin.children[self.key] = self
        self.parent = begin
        return begin

    def leave(self) -> Node:
        """Out of the tree; nothing follows it. What it followed is answered."""
        parent = self.parent
        assert parent is not None and not self.children, "only a leaf can go"
        del parent.children[self.key]
        return parent

    def up(self) -> Iterator[Node]:
        """This node and all it follows, without the root."""
        node = self
        while node.parent is not None:
            yield node
            node = node.parent

    def down(self) -> Iterator[Node]:
        """What follows this node and the node itself, whatever follows first."""
        found = [self]
        for node in found:
            found += node.children.values()
        return reversed(found)


class IdleNodes(IdleRuns):
    """The nodes nobody holds. With a `rank`, the leaves among them also stand in a heap by it, the least first.

    An entry of the heap is good while its node bears its stamp.
    """

    def __init__(self) -> None:
        super().__init__()
        self.rank: Rank | None = None
        self._heap: list[tuple[tuple[float, ...], int, Node]] = []
        self._next_stamp = 0

    def nodes(self) -> Iterator[Node]:
        for run in self:
            assert isinstance(run, Node)
            yield run

    def append(self, run: Run) -> None:
        super().append(run)
        assert isinstance(run, Node)
        self.rate(run)

    def remove(self, run: Run) -> None:
        super().remove(run)
        assert isinstance(run, Node)
        run.stamp = None

    def move_to_end(self, node: Node) -> None:
        """It was used, though nobody holds it."""
        self.remove(node)
        self.append(node)

    def rate(self, node: Node) -> None:
        """Nobody holds `node`: enter it among the leaves, if it is one."""
        if self.rank is None or node.children:
            return
        if len(self._heap) > 64 + 2 * self.num_blocks:
            self._heap = [entry for entry in self._heap if entry[2].stamp == entry[1]]
            heapq.heapify(self._heap)
        node.stamp = self._next_stamp
        self._next_stamp += 1
        heapq.heappush(self._heap, (self.rank(node), node.stamp, node))

    def rate_all(self, rank: Rank) -> None:
        self.rank, self._heap = rank, []
        for node in self.nodes():
            self.rate(node)

    def next_leaf(self) -> Node:
        """The leaf that is to be emptied next: that of the least rank, or the longest unused. Some node is idle."""
        if self.rank is None:
            oldest = self.oldest
            assert isinstance(oldest, Node)
            return oldest
        while (found := self._heap[0])[2].stamp != found[1]:
            heapq.heappop(self._heap)
        return found[2]

    def check(self) -> None:
        """Every leaf that nobody holds has a good entry."""
        good = {id(node) for rank, stamp, node in self._heap if node.stamp == stamp}
        seen: set[int] = set()
        for node in self.nodes():
            assert all(id(child) in seen for child in node.children.values()), (
                "something follows a node that is idle, and is held or younger"
            )
            seen.add(id(node))
            is_leaf = self.rank is not None and not node.children
            assert (id(node) in good) == is_leaf, "the leaves are not those in the heap"
