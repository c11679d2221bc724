"""Which block hashes a replica has taken up and lost since it last said so.

A hash can name several blocks (twins, engine.ledger): it is here from the first until the last of them is forgotten.
What came and went between two sayings is not told. The ledger counts names only where somebody asked for news, so
nobody else pays. Blocks are named when the step that computes them is planned; whoever is told of one hears a moment
early, which is the moment from which the replica itself would share it.
"""

from __future__ import annotations

from collections.abc import Iterable

from penstock.core.messages import NO_CHANGES, BlockNews, Changes
from penstock.core.types import BlockHash
from penstock.engine.run import Run


class Silence:
    """Where nobody asked."""

    def name(self, run: Run, start: int = 0) -> None:
        pass

    def forget(self, run: Run, start: int = 0) -> None:
        pass

    def take(self) -> BlockNews | None:
        return None

    def restart(self) -> None:
        pass


SILENCE = Silence()


class NewsDesk:
    """Hears of runs that got names, or lose them, from their block number `start` on; `take` says what changed."""

    def __init__(self) -> None:
        self._counts: dict[BlockHash, int] = {}
        self._stored: dict[BlockHash, None] = {}  # in the order of their prefixes
        self._removed: dict[BlockHash, None] = {}

    def name(self, run: Run, start: int = 0) -> None:
        counts, stored, removed = self._counts, self._stored, self._removed
        for each in run.hashes()[start:]:
            count = counts.get(each, 0)
            counts[each] = count + 1
            if not count:
                if each in removed:
                    del removed[each]
                else:
                    stored[each] = None

    def forget(self, run: Run, start: int = 0) -> None:
        counts, stored, removed = self._counts, self._stored, self._removed
        for each in run.hashes()[start:]:
            count = counts[each]
            if count > 1:
                counts[each] = count - 1
                continue
            del counts[each]
            if each in stored:
                del stored[each]
            else:
                removed[each] = None

    def take(self) -> BlockNews | None:
        """What changed since the last call; None = nothing."""
        if not (self._stored or self._removed):
            return None
        news = BlockNews(tuple(self._stored), tuple(self._removed))
        self._stored.clear()
        self._removed.clear()
        return news

    def restart(self) -> None:
        """Somebody new listens: all that is here is news."""
        self._stored = dict.fromkeys(self._counts)
        self._removed.clear()

    def contents(self) -> set[BlockHash]:
        """All hashes that are here."""
        return set(self._counts)


class PlaceNews:
    """Hears which blocks came to one place behind the device's memory, and left it; `take` says what changed."""

    def __init__(self) -> None:
        self._stored: dict[BlockHash, None] = {}
        self._removed: dict[BlockHash, None] = {}

    def came(self, name: BlockHash) -> None:
        if self._removed.pop(name, self) is self:
            self._stored[name] = None

    def went(self, name: BlockHash) -> None:
        if self._stored.pop(name, self) is self:
            self._removed[name] = None

    def take(self) -> Changes:
        """What changed since the last call."""
        if not (self._stored or self._removed):
            return NO_CHANGES
        changes = Changes(tuple(self._stored), tuple(self._removed))
        self._stored.clear()
        self._removed.clear()
        return changes

    def restart(self, held: Iterable[BlockHash]) -> None:
        """Somebody new listens: all that is here is news."""
        self._stored = dict.fromkeys(held)
        self._removed.clear()
