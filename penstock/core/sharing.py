"""Context that replicas keep for each other: what an executor has for it. See core.lending for the events."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol

from penstock.core.ports import Executor


class ContextSharing(Protocol):
    """Blocks that replicas lend each other, so that a request's context can be larger than one memory.

    A loan is some blocks of one replica's memory, for one request of another. There its blocks are numbered from
    `first` on, behind the replica's own: a job in whose blocks (Work.blocks) such numbers stand has those parts of its
    context at its creditors. Of no plan that holds the job a transfer is under way, nor is it planned meanwhile.
    """

    def lend(self, loan: int, blocks: Sequence[int]) -> str:
        """Blocks of ours, of which the last is for the executor's own use; where debtors find them."""
        ...

    def take_back(self, loan: int, num_blocks: int | None = None) -> None:
        """The last ones of those that may be used, or all (None): nobody reads or writes them any more."""
        ...

    def borrow(self, loan: int, first: int, count: int, address: str) -> None: ...

    def spill(
        self, runs: Sequence[tuple[int, int, int]], tell: Callable[[str | None], None]
    ) -> None:
        """Copy blocks to creditors: own block, number of the lent one, count. `tell` hears when all is there, or why
        not, on the loop's thread.
        """
        ...

    def relocate(
        self, runs: Sequence[tuple[int, int, int]], tell: Callable[[str | None], None]
    ) -> None:
        """Copy blocks from creditors: number of the lent one, own block or number of one that another lent, count."""
        ...

    def give_back(self, loan: int) -> None: ...


class LendingExecutor(Executor, Protocol):
    """An executor with `caps.lends`."""

    @property
    def sharing(self) -> ContextSharing: ...
