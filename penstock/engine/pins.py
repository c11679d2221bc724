"""Blocks that a peer reads: they stay where they are until it has left.

Shown are those of the wanted ones that follow each other from the first: on the device as far as nobody writes them
now, behind them those that host memory holds (where peers can read it). The device's are found along the prompt, so a
stand-in holds them like those of a running job, with what is in front of them; host blocks are marked as busy. A block
on disk is not shown: its owner would have to read it first.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from msgspec import Struct

from penstock.core.fetching import Pinned, Unpinned
from penstock.core.types import BlockHash, Job
from penstock.engine.parts import Parts
from penstock.engine.stand_ins import StandIns

OnPinned = Callable[[tuple[int, ...], tuple[int, ...]], None]  # device blocks, then host blocks


NOBODY: tuple[BlockHash, ...] = ()


class Pinning(Struct, gc=False):
    """Asked from outside; see core.fetching.Show. `reads_host`: the peer can."""

    seek: int
    names: tuple[BlockHash, ...]
    before: tuple[BlockHash, ...]
    reads_host: bool
    on_pinned: OnPinned


class Unpinning(Struct, gc=False):
    """See core.fetching.Leave."""

    seek: int


class _Pin(Struct, gc=False):
    job: Job
    hosts: tuple[BlockHash, ...]


class Pins:
    """One per replica."""

    def __init__(
        self, parts: Parts, stand_ins: StandIns, written: Callable[[Sequence[int]], int]
    ) -> None:
        """`written`: so many of the first of some blocks are not being written now."""
        self._parts, self._stand_ins, self._written = parts, stand_ins, written
        self._pins: dict[int, _Pin] = {}

    @property
    def is_empty(self) -> bool:
        return not self._pins

    def pin(self, now: float, asked: Pinning) -> None:
        assert asked.seek not in self._pins, f"seek {asked.seek} is shown already"
        parts, size = self._parts, self._parts.ledger.block_size
        names, hosts = (*asked.before, *asked.names), NOBODY
        job = self._stand_ins.make(names)
        readable = self._readable(parts.ledger.tables[job.seq])
        blocks = tuple(readable[len(asked.before) :])
        if len(readable) < len(parts.ledger.tables[job.seq]):
            again = self._stand_ins.make(names[: len(readable)])  # before the others are let go
            self._stand_ins.end(job, len(names) * size)
            job = again
        else:
            hosts = self._in_host(asked, len(blocks))
        there = self._hold_hosts(hosts)
        self._pins[asked.seek] = _Pin(job, hosts)
        parts.emit(
            Pinned(
                at=now,
                who=parts.name,
                seek=asked.seek,
                names=tuple([each.hex() for each in asked.names]),
                reads_host=asked.reads_host,
                num_blocks=len(blocks),
                num_host=len(hosts),
                before=tuple([each.hex() for each in asked.before]),
            )
        )
        self._stand_ins.answers.append(lambda: asked.on_pinned(blocks, there))

    def unpin(self, now: float, told: Unpinning) -> None:
        self._parts.emit(Unpinned(at=now, who=self._parts.name, seek=told.seek))
        pin = self._pins.pop(told.seek, None)
        if pin is None:
            return
        self._stand_ins.end(pin.job, pin.job.num_prompt)
        if self._parts.tiers is not None:
            for name in pin.hosts:
                self._parts.tiers.store.host[name].busy -= 1

    # ------------------------------------------------------------------ inside

    def _readable(self, table: list[int]) -> list[int]:
        """The first of these blocks that are written, and into which nothing is being copied."""
        full, tiers = self._written(table), self._parts.tiers
        coming = set() if tiers is None else tiers.coming()
        blocks = table[:full]
        return blocks[: next((at for at, one in enumerate(blocks) if one in coming), full)]

    def _in_host(self, asked: Pinning, start: int) -> tuple[BlockHash, ...]:
        tiers = self._parts.tiers
        if tiers is None or not asked.reads_host:
            return ()
        count = tiers.store.settled(asked.names, start)
        return asked.names[start : start + count]

    def _hold_hosts(self, hosts: Sequence[BlockHash]) -> tuple[int, ...]:
        tiers = self._parts.tiers
        if tiers is None or not hosts:
            return ()
        tiers.store.touch(reversed(hosts))
        found = []
        for name in hosts:
            kept = tiers.store.host[name]
            kept.busy += 1
            found.append(tiers.first + kept.block)
        return tuple(found)

    def held(self) -> list[BlockHash]:
        """Host blocks that are marked as busy here, once for each time."""
        return [name for pin in self._pins.values() for name in pin.hosts]
