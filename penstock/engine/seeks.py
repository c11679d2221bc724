"""Prefixes fetched from a peer: a job that waits, and is told who holds more of its prompt, may have blocks of it.

    hinted    a request came with a hint; when it is near the head of the queue, and its whole prompt would fit, the
              policy of kind `fetch` is asked (engine.bringing)
    asked     the peer is asked to keep the blocks that continue what is here, and the job is held back; so are others
              that need the first of them
    shown     blocks are taken for so many, behind those that are here, and the peer's are copied into them, as soon as
              nothing else is copied from or to them: what lay in them may be on its way to host memory
    brought   they are idle and known by name, like any other cached ones, and the job is put back where it stood: it
              adopts them when it starts. If they came spoilt, or not at all, they are forgotten and it computes them
    late      whoever waits is put back and computes. Blocks that are still being written stay taken until that ends

What is fetched is held by a stand-in (engine.stand_ins), not by the job, so that a job that is cancelled, or has waited
long enough, has nothing to do with it any more.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from msgspec import Struct

from penstock.core.fetching import BlocksBrought, Hinted, SeekAnswered, SeekBegun, SeekLate
from penstock.core.types import BlockHash, Job
from penstock.engine.bringing import NEAR, Bringing, CopyTime
from penstock.engine.joinings import NO_ROOM, Pairs
from penstock.engine.parts import Parts
from penstock.engine.stand_ins import StandIns
from penstock.engine.swap import joined

Names = tuple[BlockHash, ...]
OnSeek = Callable[[int, str, Names, Names], None]  # seek, peer, wanted, before them
OnRoom = Callable[[Pairs | str], None]  # or why not


class Hinting(Struct, gc=False):
    """A request came with this hint. `on_seek` hears if its blocks are wanted."""

    request: str
    peer: str
    num_blocks: int
    on_seek: OnSeek


class Answering(Struct, gc=False):
    """The peer's answer; see core.fetching.Shown. `on_room` hears where the blocks are to be copied."""

    seek: int
    blocks: tuple[int, ...]
    error: str | None
    on_room: OnRoom


class Fetched(Struct, gc=False):
    """The copy has ended."""

    seek: int
    num_bytes: int
    error: str | None


class Delaying(Struct, gc=False):
    """It has taken too long."""

    seek: int


class _Seek(Struct, gc=False):
    """`have` blocks were here, held by `holder`; `names` follow them."""

    peer: str
    names: tuple[BlockHash, ...]
    holder: Job
    begun_at: float
    waiting: list[Job]
    room: tuple[Answering, Pairs] | None = None  # until nothing else is copied there
    is_copying: bool = False
    is_late: bool = False
    num_blocks: int = 0


SeekOrder = Hinting | Answering | Fetched | Delaying


class Seeks:
    """One per replica; `under_way` by number."""

    def __init__(
        self,
        parts: Parts,
        stand_ins: StandIns,
        bringing: Bringing,
        take_blocks: Callable[[], None],
        ask_again: Callable[[], None],
    ) -> None:
        """`take_blocks`: what plans under way will need is taken before others get blocks."""
        self._parts, self._stand_ins, self._bringing = parts, stand_ins, bringing
        self._take_blocks, self._ask_again = take_blocks, ask_again
        self._hints: dict[str, Hinting] = {}  # by request
        self.under_way: dict[int, _Seek] = {}
        self._coming: dict[BlockHash, int] = {}  # the seek that brings it
        self._count = 0
        self._takes = CopyTime()

    @property
    def has_hints(self) -> bool:
        """Whether anybody who waits may want something of peers."""
        return bool(self._hints or self._coming)

    def apply(self, now: float, order: SeekOrder) -> None:
        if isinstance(order, Hinting):
            self._hint(now, order)
        elif isinstance(order, Answering):
            self._answer(now, order)
        elif isinstance(order, Fetched):
            self._end_copy(now, order)
        else:
            self._parts.emit(SeekLate(at=now, who=self._parts.name, seek=order.seek))
            seek = self.under_way.get(order.seek)
            if seek is not None:
                seek.is_late = True
                self._put_back(now, seek)
                if not seek.is_copying:
                    self._end(order.seek, 0)

    def prepare(self, now: float) -> None:
        """Ask for what those who wait could use."""
        for job in self._parts.roster.waiting.jobs[:NEAR]:
            hint = self._hints.get(job.request.id)
            if hint is not None or self._coming:
                self._look(now, job, hint)

    def look(self, now: float) -> None:
        """Something was applied: who has room now, and who is not waited for any more?"""
        for seek in list(self.under_way.values()):
            if any([job.is_cancelled for job in seek.waiting]):
                self._put_back(now, seek, [job for job in seek.waiting if job.is_cancelled])
            self._pull(seek)

    def forget(self, job: Job) -> None:
        """It has ended here."""
        self._hints.pop(job.request.id, None)

    # ------------------------------------------------------------------ inside

    def _hint(self, now: float, order: Hinting) -> None:
        parts = self._parts
        told = Hinted(
            at=now, who=parts.name, request=order.request, peer=order.peer,
            num_blocks=order.num_blocks,
        )  # fmt: skip
        parts.emit(told)
        if parts.roster.has(order.request):
            self._hints[order.request] = order

    def _look(self, now: float, job: Job, hint: Hinting | None) -> None:
        ledger, names = self._parts.ledger, job.hashes
        limit = min((job.known - 1) // ledger.block_size, len(names))
        found = ledger.find(names, 0, limit)
        here = sum(found.values())
        if here < limit and job.seq not in ledger.copies:
            coming = self._coming.get(names[here])
            if coming is not None and not self.under_way[coming].is_late:
                self.under_way[coming].waiting.append(job)
                self._parts.roster.hold(job)
                return
        if hint is None or not self._bringing.fits(job, found):
            return
        del self._hints[hint.request]
        more = min(limit, hint.num_blocks) - here
        if more < 1 or job.seq in ledger.copies or names[here] in self._coming:
            return
        takes_s = self._takes.of(more)
        if self._bringing.wants(now, "peer", job, have=here, more=more, copy_s=takes_s):
            self._begin(now, job, hint, names[: here + more])

    def _begin(self, now: float, job: Job, hint: Hinting, names: Sequence[BlockHash]) -> None:
        holder = self._stand_ins.make(names)
        have = self._parts.ledger.held(holder)
        number, self._count = self._count, self._count + 1
        before, wanted = tuple(names[:have]), tuple(names[have:])
        self.under_way[number] = _Seek(hint.peer, wanted, holder, now, [job])
        self._coming.update(dict.fromkeys(wanted, number))
        self._parts.roster.hold(job)
        self._parts.emit(
            SeekBegun(
                at=now, who=self._parts.name, seek=number, request=hint.request, peer=hint.peer,
                num_blocks=len(wanted),
            )
        )  # fmt: skip
        self._stand_ins.answers.append(lambda: hint.on_seek(number, hint.peer, wanted, before))

    def _answer(self, now: float, told: Answering) -> None:
        parts, seek = self._parts, self.under_way.get(told.seek)
        parts.emit(
            SeekAnswered(
                at=now, who=parts.name, seek=told.seek, num_blocks=len(told.blocks),
                error=told.error,
            )
        )  # fmt: skip
        if seek is None or seek.room is not None or seek.is_copying:
            return
        if told.error is not None or not told.blocks:
            self._fail(now, told.seek)
            return
        self._take(now, told, seek)

    def _take(self, now: float, told: Answering, seek: _Seek) -> None:
        """Blocks for what was shown."""
        parts = self._parts
        ledger, holder = parts.ledger, seek.holder
        self._take_blocks()
        have = len(holder.hashes) - len(seek.names)
        skipped = ledger.adopt(holder) // ledger.block_size - have  # computed meanwhile
        count = min(len(told.blocks), len(seek.names)) - skipped
        if count <= 0 or count + len(parts.roster.running) + 1 > ledger.free:
            self._stand_ins.answers.append(lambda: told.on_room(NO_ROOM))
            self._fail(now, told.seek)
            return
        ledger.extend(holder, (have + skipped + count) * ledger.block_size)
        if parts.tiers is not None:
            parts.tiers.begin(now)
        table = ledger.tables[holder.seq][have + skipped :]
        pairs = joined(list(zip(told.blocks[skipped : skipped + count], table, strict=True)))
        seek.room, seek.num_blocks = (told, pairs), count
        self._pull(seek)

    def _pull(self, seek: _Seek) -> None:
        """Let the peer's blocks come, unless something else is copied from or to the places for them."""
        if seek.room is None:
            return
        told, pairs = seek.room
        places = {first + at for _, first, count in pairs for at in range(count)}
        if self._parts.copied_blocks().isdisjoint(places):
            seek.room, seek.is_copying = None, True
            self._stand_ins.answers.append(lambda: told.on_room(pairs))

    def _end_copy(self, now: float, told: Fetched) -> None:
        parts, seek = self._parts, self.under_way.get(told.seek)
        parts.emit(
            BlocksBrought(
                at=now, who=parts.name, seek=told.seek, num_bytes=told.num_bytes, error=told.error
            )
        )
        if seek is None:
            return
        if told.error is not None:
            self._fail(now, told.seek)
            return
        seconds = now - seek.begun_at
        self._takes.learn(seek.num_blocks, seconds)
        self._bringing.count("peer", seek.num_blocks, told.num_bytes, seconds)
        upto = parts.ledger.held(seek.holder) * parts.ledger.block_size
        parts.ledger.register(seek.holder, upto)
        self._put_back(now, seek)
        self._end(told.seek, upto)

    def _fail(self, now: float, number: int) -> None:
        seek = self.under_way[number]
        self._bringing.count("peer", 0, 0, 0.0, failed=1)
        self._put_back(now, seek)
        self._end(number, 0)

    def _put_back(self, now: float, seek: _Seek, jobs: Sequence[Job] | None = None) -> None:
        """Those who waited can be planned."""
        for job in reversed(list(seek.waiting if jobs is None else jobs)):  # each to the front
            seek.waiting.remove(job)
            self._parts.roster.take_back(job, "waiting")
            self._ask_again()
            if job.is_cancelled:
                self._parts.finish(now, job, "cancelled")

    def _end(self, number: int, written: int) -> None:
        """Blocks up to position `written` hold what their names say, or those that were here."""
        seek = self.under_way.pop(number)
        named = self._parts.ledger.registered.get(seek.holder.seq, 0)
        size = self._parts.ledger.block_size
        self._stand_ins.end(seek.holder, max(written, named * size))
        for name in seek.names:
            if self._coming.get(name) == number:
                del self._coming[name]
