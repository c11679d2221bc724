"""Jobs that come to this replica from another one.

    asked     a job is made for it that no policy sees; blocks are taken for what comes along, behind those of its
              beginning that are here already (the first time); where there is no room it is turned away, or waits
    granted   somebody copies into its blocks, as soon as nothing else is copied from or to them
    landed    they are written; after the last stage the job joins the running (or, without blocks, the waiting)
    settled   confirmed: its blocks get their names, by which others find them; or dropped

There is room when, with these blocks taken, every running job and this one can take one more. What waits is granted in
the order in which it came, and what could never fit is turned away. With a `pull_share` no more is granted while what
came so, and is in no batch yet, holds that share of all blocks (DistServe's bound, 5 %): what is not in a batch
stays in the memory of who computed its prompt, and slows that one down.

A job that is dropped while somebody writes into its blocks keeps them until that has ended.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import nullcontext

from msgspec import UNSET, Struct

from penstock.core.moving import Granted, JobState, Landed, Took
from penstock.core.types import Job, Request
from penstock.engine.partings import Settling
from penstock.engine.parts import Parts

Pairs = tuple[tuple[int, int, int], ...]  # first block there, first block here, count
OnGranted = Callable[[Pairs | str], None]  # or why not
NO_ROOM = "it has no room for the blocks"


class Taking(Struct, gc=False):
    """Asked from outside; see core.messages.Take. `on_granted` hears once."""

    move: int
    name: str
    state: JobState
    is_last: bool
    waits: bool
    request: Request | None
    blocks: tuple[int, ...]
    on_granted: OnGranted


class Landing(Struct, gc=False):
    """What was granted is here, or why it cannot be. `on_landed` hears when that is applied, if it still matters."""

    move: int
    error: str | None
    on_landed: Callable[[], None]


class _Incoming(Struct, gc=False):
    job: Job
    asked: Taking
    has_blocks: bool = False
    room: Pairs | None = None  # taken, until nothing else is copied there
    is_asking: bool = True
    is_copying: bool = False
    is_dropped: bool = False


class Joinings:
    """One per replica. `answers` are given at the end of a turn."""

    def __init__(
        self,
        parts: Parts,
        take_blocks: Callable[[], None],
        ask_again: Callable[[], None],
        *,
        pull_share: float | None = None,
    ) -> None:
        self._parts, self._take_blocks, self._ask_again = parts, take_blocks, ask_again
        self._pull_share = pull_share
        self._pulled: dict[int, tuple[Job, int]] = {}  # by seq, and tokens it came with
        self._incoming: dict[int, _Incoming] = {}
        self._joined: dict[
            int, tuple[Job, bool]
        ] = {}  # of movements not settled; whether with blocks
        self.answers: list[Callable[[], None]] = []

    @property
    def is_waiting(self) -> bool:
        """Whether somebody waits for room."""
        return any([one.is_asking for one in self._incoming.values()])

    def take(self, now: float, asked: Taking) -> None:
        roster, state = self._parts.roster, asked.state
        told = _took(now, self._parts.name, asked)
        coming = self._incoming.get(asked.move)
        if coming is not None and coming.is_dropped:
            self._parts.emit(told)
            self._answer(asked, "what came before is still being dropped")
            return
        if coming is None:
            if asked.request is None:  # of a movement that was dropped
                self._parts.emit(told)
                return
            if roster.jobs_of(asked.name):
                self._parts.emit(told)
                self._answer(asked, "it is here already")
                return
            job = roster.expect(now, asked.request, state, asked.move)
            coming = self._incoming[asked.move] = _Incoming(job, asked)
        coming.asked, coming.is_asking, coming.room = asked, True, None
        self._parts.emit(told)
        roster.bring(now, coming.job, state)
        self.grant(now)

    def grant(self, now: float) -> None:
        """Give blocks to whoever asks, in the order in which they came."""
        is_full = False
        for move, coming in list(self._incoming.items()):
            if not coming.is_asking:
                continue
            if coming.room is None:
                waits = coming.asked.waits and self._could_fit(coming)
                if waits and (is_full or self._is_enough()):
                    is_full = True
                    continue
                coming.room = self._room_for(now, coming)
                if coming.room is None and waits:
                    is_full = True
                    continue
                if waits and self._pull_share is not None:
                    self._pulled[coming.job.seq] = coming.job, coming.asked.state.num_output
            if coming.room is None:
                self._turn_away(now, move, coming)
            elif self._is_quiet(coming.room):
                self._let_copy(now, move, coming, coming.room)

    def _room_for(self, now: float, coming: _Incoming) -> Pairs | None:
        if not coming.asked.state.computed:
            return ()
        self._take_blocks()
        room, tiers = self._blocks_for(coming), self._parts.tiers
        if tiers is not None:
            tiers.begin(now)  # what has left is copied with the next step, which may never come
        return room

    def _is_quiet(self, pairs: Pairs) -> bool:
        """Whether nothing else is copied from or to these blocks: what lay there may be on its way to host memory."""
        places = {first + at for _, first, count in pairs for at in range(count)}
        return self._parts.copied_blocks().isdisjoint(places)

    def _let_copy(self, now: float, move: int, coming: _Incoming, pairs: Pairs) -> None:
        coming.is_asking, coming.room, coming.is_copying = False, None, True
        self._emit_granted(now, move, coming, pairs, None)
        self._answer(coming.asked, pairs)

    def _turn_away(self, now: float, move: int, coming: _Incoming) -> None:
        coming.is_asking = False
        self._emit_granted(now, move, coming, (), NO_ROOM)
        self._drop(now, move)
        self._answer(coming.asked, NO_ROOM)

    def land(self, now: float, landing: Landing) -> None:
        coming = self._incoming.get(landing.move)
        if coming is None or not coming.is_copying:
            return
        coming.is_copying = False
        job, asked, parts = coming.job, coming.asked, self._parts
        parts.emit(
            Landed(
                at=now,
                who=parts.name,
                move=landing.move,
                request=asked.name,
                error=landing.error,
            )
        )
        if coming.is_dropped:
            self._drop(now, landing.move)
            return
        if landing.error is not None:
            self._drop(now, landing.move)
        elif asked.is_last:
            del self._incoming[landing.move]
            self._join(job, asked)
        else:
            job.computed = max(job.computed, asked.state.computed)
        self.answers.append(landing.on_landed)

    def settle(self, now: float, told: Settling) -> None:
        """How a movement to here ended."""
        coming = self._incoming.get(told.move)
        joined, has_blocks = self._joined.pop(told.move, (None, False))
        parts = self._parts
        if coming is not None:
            if coming.is_copying:
                coming.is_dropped = True
            else:
                self._drop(now, told.move)
        elif joined is not None and joined.status != "ended":
            if told.how == "confirm":
                if has_blocks:
                    parts.briefing.proven(joined)
            else:
                self._distrust(joined)
                joined.is_cancelled = True
                if not joined.in_flight and joined.status != "in_transfer":
                    parts.finish(now, joined, "cancelled")

    # ------------------------------------------------------------------ inside

    def _could_fit(self, coming: _Incoming) -> bool:
        """If nothing else were here."""
        size, total = self._parts.ledger.block_size, self._parts.ledger.total
        return -(-coming.asked.state.computed // size) < total

    def _is_enough(self) -> bool:
        """Whether those that were pulled, have no token here yet and are in no plan hold what they may."""
        if self._pull_share is None:
            return False
        ledger = self._parts.ledger
        self._pulled = {
            seq: (job, had)
            for seq, (job, had) in self._pulled.items()
            if job.num_output == had and not job.in_flight and seq in ledger.tables
        }
        held = sum([ledger.held(job) for job, _ in self._pulled.values()])
        return held >= self._pull_share * ledger.total

    def _blocks_for(self, coming: _Incoming) -> Pairs | None:
        """Take blocks, and pair them with those that they are copied from; None: there is no room."""
        ledger, job, asked = self._parts.ledger, coming.job, coming.asked
        upto, size = asked.state.computed, ledger.block_size
        need = -(-upto // size) - ledger.held(job)
        if need + len(self._parts.roster.running) + 1 > ledger.free:
            return None
        if not coming.has_blocks:
            coming.has_blocks = True
            job.computed = ledger.adopt(job)
        begin = job.computed // size
        tiers = self._parts.tiers
        with nullcontext() if tiers is None else tiers.aside():  # peers' copies wait for nobody
            ledger.extend(job, upto)
        table = ledger.tables[job.seq]
        return _runs(asked.blocks, table, range(begin, -(-upto // size)))

    def _join(self, job: Job, asked: Taking) -> None:
        parts, state = self._parts, asked.state
        job.computed = max(job.computed, state.computed)
        parts.briefing.bring(job, state)
        parts.roster.images.bring(job, state.encoded, has_blocks=state.computed > 0)
        self._joined[asked.move] = job, bool(state.computed)
        if state.computed:
            parts.roster.admit(job)
            self._ask_again()
        else:
            parts.roster.line_up(job)

    def _drop(self, now: float, move: int) -> None:
        job = self._incoming.pop(move).job
        self._distrust(job)
        self._parts.forget(now, job)

    def _distrust(self, job: Job) -> None:
        """Nobody shall find what was copied."""
        del job.hashes[self._parts.ledger.registered.get(job.seq, 0) :]

    def _answer(self, asked: Taking, told: Pairs | str) -> None:
        self.answers.append(lambda: asked.on_granted(told))

    def _emit_granted(
        self, now: float, move: int, coming: _Incoming, pairs: Pairs, error: str | None
    ) -> None:
        self._parts.emit(
            Granted(
                at=now,
                who=self._parts.name,
                move=move,
                request=coming.asked.name,
                num_blocks=sum([count for _, _, count in pairs]),
                error=error,
            )
        )


def _runs(there: tuple[int, ...], here: list[int], places: range) -> Pairs:
    """Blocks that are consecutive at both ends, as one run each."""
    runs: list[tuple[int, int, int]] = []
    for place in places:
        one, other = there[place], here[place]
        if runs:
            first, start, count = runs[-1]
            if one == first + count and other == start + count:
                runs[-1] = first, start, count + 1
                continue
        runs.append((one, other, 1))
    return tuple(runs)


def _took(now: float, who: str, asked: Taking) -> Took:
    state = asked.state
    return Took(
        at=now,
        who=who,
        move=asked.move,
        request=asked.name,
        is_last=asked.is_last,
        waits=asked.waits,
        num_output=state.num_output,
        computed=state.computed,
        cached=state.cached,
        num_blocks=len(asked.blocks),
        filled=tuple([each.hex() for each in state.filled]),
        num_preemptions=state.num_preemptions,
        num_recomputed=state.num_recomputed,
        age_s=state.age_s,
        admitted_age_s=state.admitted_age_s,
        first_token_age_s=state.first_token_age_s,
        last_token_age_s=state.last_token_age_s,
        encoded=state.encoded or UNSET,
    )
