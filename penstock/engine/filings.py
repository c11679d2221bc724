"""What goes from host memory to disk and back, and who waits for it: the disk's part of engine.tiers.

A filing is up to FILED blocks that are written, or all that are read for somebody, in the order in which they were
asked for. One writes at a time, so that reads do not wait long. Jobs that wait for one are held, and put back where
they stood when it has ended.

What goes wrong costs a computation and nothing else: a block that was not written, or does not hold what it should when
it is read, is forgotten there; a disk that takes no more is written to no more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import cast

from msgspec import Struct

from penstock.core.events import FiledAway
from penstock.core.plans import Filed, Filing
from penstock.core.ports import FilingExecutor
from penstock.core.types import BlockHash, Job
from penstock.engine.bringing import Bringing, blended
from penstock.engine.parts import Parts
from penstock.engine.tier_store import TierStore

FILED = 32  # blocks of one filing


class _Held(Struct, gc=False):
    """A job that waits for filings."""

    job: Job
    filings: set[int]


class Filings:
    """One per replica with a disk behind its host memory."""

    def __init__(
        self, parts: Parts, bringing: Bringing, store: TierStore, ask_again: Callable[[], None]
    ) -> None:
        self._parts, self._bringing, self._store = parts, bringing, store
        self._ask_again = ask_again
        self._executor = cast(FilingExecutor, parts.executor)
        # Of the store's blocks; those before are engine.swap's.
        self._first = parts.executor.caps.host_blocks
        self._under_way: dict[int, tuple[Filing, float]] = {}
        self._next = 0
        self._held: dict[int, _Held] = {}
        self._save_s: float | None = None  # what writing a block took lately

    @property
    def writing(self) -> int | None:
        """The one that writes now."""
        return next((each for each, (told, _) in self._under_way.items() if told.is_out), None)

    def save_s(self, now: float) -> float | None:
        """What writing a block takes: as lately, or as long as it takes now where that is longer; None: who knows?"""
        takes = [
            (now - begun_at) / len(told.pairs)
            for told, begun_at in self._under_way.values()
            if told.is_out
        ]
        return max(self._save_s or 0.0, *takes, 0.0) or None

    def read(self, now: float, names: Sequence[BlockHash]) -> int | None:
        """Begin to read as many of these as there is room for; None: there is none."""
        pairs = self._store.read(self._next, names)
        return self._begin(now, False, pairs, names) if pairs else None

    def write_some(self, now: float) -> None:
        store = self._store
        if not store.dirty or self.writing is not None:
            return
        names = store.to_write(FILED)
        pairs = store.write(self._next, names)
        if pairs:
            self._begin(now, True, pairs, names)

    def _begin(
        self, now: float, is_out: bool, pairs: list[tuple[int, int]], names: Sequence[BlockHash]
    ) -> int:
        told = tuple([(self._first + host, slot) for host, slot in pairs])
        filing = Filing(self._next, is_out, told, tuple(names[: len(pairs)]))
        self._next += 1
        self._under_way[filing.id] = filing, now
        self._executor.file(filing)
        return filing.id

    # ------------------------------------------------------------------ waiting

    def hold(self, job: Job, filings: set[int]) -> None:
        """It is put back when they have ended."""
        self._held[job.seq] = _Held(job, filings)
        self._parts.roster.hold(job)

    def _let_go(self, now: float, filing: int) -> None:
        for seq, held in reversed(list(self._held.items())):  # each goes to the front
            held.filings.discard(filing)
            if held.filings:
                continue
            del self._held[seq]
            self._parts.roster.take_back(held.job, "waiting")
            self._ask_again()
            if held.job.is_cancelled:
                self._parts.finish(now, held.job, "cancelled")

    # ------------------------------------------------------------------ what has ended

    def ended(self, now: float, filed: Filed) -> None:
        filing, begun_at = self._under_way.pop(filed.filing)
        told = FiledAway(
            at=now,
            who=self._parts.name,
            filing=filing.id,
            is_out=filing.is_out,
            num_blocks=len(filing.pairs),
            bad=filed.bad,
            error=filed.error,
        )
        self._parts.emit(told)
        store, bad = self._store, set(filed.bad)
        for place, name in enumerate(filing.names):
            if filing.is_out:
                store.written(name, place not in bad)
            else:
                store.was_read(name, place not in bad)
        if (
            filed.error is not None and store.has_disk
        ):  # a shelf says so with all that it reads from then on
            store.close_disk()
        seconds, count = now - begun_at, len(filing.names)
        if filing.is_out:
            self._save_s = blended(self._save_s, seconds / count)
        else:
            num_bytes = self._executor.kv_block_bytes * (count - len(bad))
            self._bringing.learn("disk", count - len(bad), num_bytes, seconds, len(bad))
            self._let_go(now, filing.id)
        self.write_some(now)

    def names(self) -> list[BlockHash]:
        """Of all that is written or read now."""
        return [name for filing, _ in self._under_way.values() for name in filing.names]
