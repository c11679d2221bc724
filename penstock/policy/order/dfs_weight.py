"""Depth first through the cached prefixes, the branch with most waiting jobs before the others.

Source: SGLang schedule policy dfs-weight (sglang 0.5.23, srt/managers/schedule_policy.py).

Idea: jobs under one branch of the tree of cached prefixes share more with each other than with the rest. Serving a
branch whole before the next one keeps what it shares in memory for as long as it is needed, and not longer.

    tree        of the prefixes that the waiting jobs find cached; a job hangs at the end of its own
    weight      of a node: the jobs that hang at it or below it
    rank        children first, heaviest first, then the jobs of the node itself, in arrival order

Parameters: most_waiting (more waiting jobs than this go in arrival order, default 128).

Where we differ: SGLang's tree holds all cached tokens, this one what the waiting jobs find, block by block: the
branches they do not touch weigh nothing. SGLang falls back to arrival order for lpm alone; here both do, since both
look everybody up. Equal weights go by the earliest arrival below. Jobs whose prompts are cached nowhere come last and
may starve."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from penstock.core.types import BlockHash
from penstock.core.views import JobView
from penstock.policy.order import STABLE, Decision, View

Path = Sequence[BlockHash]


@dataclass(slots=True)
class Node:
    """The prefix path[:end]. `children` by the hash of the block that follows it."""

    path: Path
    end: int
    children: dict[BlockHash, Node] = field(default_factory=dict)
    jobs: list[JobView] = field(default_factory=list)

    def insert(self, job: JobView, path: Path) -> None:
        node = self
        while node.end < len(path):
            branch = path[node.end]
            child = node.children.get(branch)
            if child is None:
                child = node.children[branch] = Node(path, len(path))
            same = num_alike(path, child.path, node.end + 1, min(len(path), child.end))
            if same < child.end:
                upper = Node(child.path, same, {child.path[same]: child})
                node.children[branch] = child = upper
            node = child
        node.jobs.append(job)

    def walk(self) -> list[JobView]:
        """The jobs at or below this node, in the order of service."""
        below = [child.walk() for child in self.children.values()]
        below.sort(key=len, reverse=True)
        return [job for jobs in (*below, self.jobs) for job in jobs]


def num_alike(one: Path, other: Path, known: int, most: int) -> int:
    """Blocks that two prefixes share, from `known` to `most`. A hash names all that is before it, so bisect."""
    while known < most:
        middle = (known + most + 1) // 2
        if one[middle - 1] == other[middle - 1]:
            known = middle
        else:
            most = middle - 1
    return known


@dataclass(slots=True)
class DfsWeight:
    most_waiting: int = 128

    def __post_init__(self) -> None:
        if self.most_waiting < 1:
            raise ValueError(f"most_waiting must be at least 1, got {self.most_waiting}")

    def decide(self, view: View) -> Decision:
        waiting = view.waiting
        if len(waiting) > self.most_waiting:
            return Decision(waiting, f"{len(waiting)} wait: arrival order", STABLE)
        if view.ledger is None or len(waiting) < 2:
            return Decision(waiting, stable_for=STABLE)
        fork, root = view.ledger.fork(), Node((), 0)
        for job in waiting:
            num_blocks = fork.cached(job) // fork.block_size
            hashes = job.request.prompt.blocks(fork.block_size) if num_blocks else ()
            root.insert(job, hashes[:num_blocks])
        return Decision(root.walk())
