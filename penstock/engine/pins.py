"""Blocks that a peer reads: they stay where they are until it has left.

Shown are those of the wanted ones that follow each other from the first: on the device as far as nobody writes them
now, behind them those that host memory holds (where peers can read it). The device's are found along the prompt, so a
stand-in holds them like those of a running job, with what is in front of them; host blocks are marked as busy. What
follows those on disk is read to host memory first, as far as there is room; the answer waits for that, and nobody else.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from msgspec import Struct

from penstock.core.fetching import Pinned, Unpinned
from penstock.core.types import BlockHash, Job
from penstock.engine.parts import Parts
from penstock.engine.stand_ins import StandIns

OnPinned = Callable[[tuple[int, ...], tuple[int, ...]], None]  # device blocks, then host blocks


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
    asked: Pinning
    job: Job
    blocks: tuple[int, ...]  # of the device
    hosts: tuple[BlockHash, ...] = ()

    @property
    def rest(self) -> tuple[BlockHash, ...]:
        """What was asked for and is not kept."""
        return self.asked.names[len(self.blocks) + len(self.hosts) :]


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
        names = (*asked.before, *asked.names)
        job = self._stand_ins.make(names)
        readable = self._readable(parts.ledger.tables[job.seq])
        is_whole = len(readable) == len(parts.ledger.tables[job.seq])
        if not is_whole:
            again = self._stand_ins.make(names[: len(readable)])  # before the others are let go
            self._stand_ins.end(job, len(names) * size)
            job = again
        pin = _Pin(asked, job, tuple(readable[len(asked.before) :]))
        self._pins[asked.seek] = pin
        is_reading = False
        if is_whole and asked.reads_host:
            self._hold_hosts(pin)
            is_reading = self._is_read(now, pin)
        parts.emit(
            Pinned(
                at=now,
                who=parts.name,
                seek=asked.seek,
                names=tuple([each.hex() for each in asked.names]),
                reads_host=asked.reads_host,
                num_blocks=len(pin.blocks),
                num_host=len(pin.hosts),
                before=tuple([each.hex() for each in asked.before]),
                is_reading=is_reading,
            )
        )
        if not is_reading:
            self._answer(pin)

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

    def _hold_hosts(self, pin: _Pin) -> None:
        """Those of the rest that host memory holds in a row."""
        tiers = self._parts.tiers
        if tiers is None:
            return
        hosts = pin.rest[: tiers.store.settled(pin.rest, 0)]
        tiers.store.touch(reversed(hosts))
        for name in hosts:
            tiers.store.host[name].busy += 1
        pin.hosts += hosts

    def _is_read(self, now: float, pin: _Pin) -> bool:
        """Whether some of the rest come from disk."""
        tiers = self._parts.tiers

        def go_on(_: float) -> None:
            if self._pins.get(pin.asked.seek) is pin:
                self._hold_hosts(pin)
                self._answer(pin)

        return tiers is not None and tiers.read_for_peer(now, pin.rest, go_on)

    def _answer(self, pin: _Pin) -> None:
        tiers, there = self._parts.tiers, list[int]()
        if tiers is not None:
            there = [tiers.first + tiers.store.host[name].block for name in pin.hosts]
        self._stand_ins.answers.append(lambda: pin.asked.on_pinned(pin.blocks, tuple(there)))

    def held(self) -> list[BlockHash]:
        """Host blocks that are marked as busy here, once for each time."""
        return [name for pin in self._pins.values() for name in pin.hosts]
