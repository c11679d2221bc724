"""One request moves from one replica to another while its caller hears nothing but its tokens.

    STAGING   (live only) the source offers what it has computed, the target copies it; the request runs on
    LEAVING   the source takes it out of its running jobs and says what it is: nobody computes it from here on
    TAKING    the target copies what it lacks and takes it in; when it says so, it is committed
    over      committed: the source forgets it, tokens come from the target; else: the source goes on

Modes. live: up to `max_stages` stages while the blocks that are left are more than `last_blocks`, then LEAVING;
blocking: LEAVING at once; pull: the same, and the target waits until it has room, while the source keeps the blocks and
so has less room itself; queued: LEAVING, and only what was said travels, the target computes keys and values again.

**One owner.** Until the fleet hears that the target took it, the request is the source's: it runs there or is held
there. The target runs it before that word arrives, but nobody listens to it: the fleet hears its tokens only behind its
word, on the same channel. So whatever is lost, no token is lost or heard twice:

    the source is lost   while staging or leaving: the target drops what it took, the fleet places the request anew
                         while taking: the target's word decides; it may have all it needs
    the target is lost   the source goes on, until it was released
    the caller is gone   the target drops what it took, the source has the request back and is told to end it
    it ends first        the target drops what it took
    nobody answers       after `timeout_s`: the target is told to drop it, the source goes on

A copy is of use only if the source held the blocks all the while, which the target cannot know: a source that was told
to go on may have ended and given them to others. So the target gives copied blocks no names, by which other requests
would find them, before the fleet has confirmed the movement.

Here is the state only; messages go through the replicas' links, and what happens with the request is the fleet's.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, Protocol

from penstock.core.clock import now, running_loop
from penstock.core.errors import PenstockError
from penstock.core.messages import Offered, Taken
from penstock.core.moving import KvCard, Migrated, MoveMode, MoveOutcome
from penstock.core.ports import MovingPort, OnFailed, OnOutput
from penstock.core.types import Request, Stage

Phase = Literal["staging", "leaving", "taking", "over"]


@dataclass(frozen=True, slots=True, kw_only=True)
class MoveBounds:
    """Bounds of a movement; blocks and stages as in Llumnix."""

    max_stages: int = 3
    last_blocks: int = 16
    timeout_s: float = 10.0
    pull_timeout_s: float = 60.0

    def __post_init__(self) -> None:
        if self.max_stages < 0 or self.last_blocks < 1:
            raise ValueError("max_stages must be 0 or more and last_blocks 1 or more")
        if not (self.timeout_s > 0 and self.pull_timeout_s > 0):
            raise ValueError("timeouts of movements must be positive numbers of seconds")


class Moved(Protocol):
    """The request that moves, as its fleet keeps it."""

    request: Request

    @property
    def hear(self) -> OnOutput: ...

    @property
    def fail(self) -> OnFailed: ...


OnOver = Callable[[MoveOutcome, str], None]


class Movement:
    """See the module's text. `on_over` hears once; by then the links know who has the request."""

    def __init__(
        self,
        number: int,
        moved: Moved,
        source: MovingPort,
        target: MovingPort,
        *,
        mode: MoveMode,
        bounds: MoveBounds,
    ) -> None:
        self.number, self.moved = number, moved
        self.source, self.target, self.mode = source, target, mode
        self.phase: Phase = "staging" if mode == "live" else "leaving"
        self.pauses: Stage | None = None  # before which it stands still at the target
        self.lost: PenstockError | None = None  # why the source is gone, while the target decides
        self._bounds = bounds
        self._on_over: OnOver | None = None
        self._asked_at = now()
        self._left_at: float | None = None
        self._has_taken = False  # the target holds something of it
        self._preemptions: int | None = None
        self._stages = self._num_blocks = self._num_known = self._num_bytes = 0
        self._timer: asyncio.TimerHandle | None = None

    def begin(self, on_over: OnOver) -> None:
        self._on_over = on_over
        self.source.attend(self.number, self._hear_source)
        self.target.attend(self.number, self._hear_target)
        limit_s = self._bounds.pull_timeout_s if self.mode == "pull" else self._bounds.timeout_s
        self._timer = running_loop().call_later(limit_s, self._time_out)
        self._ask()

    # ---------------------------------------------------------------- what the fleet tells

    def ended(self) -> None:
        """The source said the last of it."""
        self._abort("finished_first")

    def unwanted(self) -> None:
        """The caller is gone: wherever it is, nobody needs it. The fleet tells the source, which has it back."""
        self._abort("cancelled")

    def source_lost(self, error: PenstockError) -> bool:
        """Whether the request is lost with it. False: the target's word decides."""
        self.lost = error
        if self.phase == "taking":
            return False
        self._abort("source_lost", error.message)
        return True

    # ---------------------------------------------------------------- what the replicas say

    def _ask(self) -> None:
        self.source.offer(self.number, self.moved.request.id, self.phase == "leaving")

    def _hear_source(self, told: Offered | Taken | PenstockError) -> None:
        if not isinstance(told, Offered) or self.phase == "over":
            return  # of a loss the fleet hears by itself, for this request as for others
        if told.state is None:
            self._abort("source_aborted", told.error or "")
            return
        before, self._preemptions = self._preemptions, told.state.num_preemptions
        if self._has_taken and before != self._preemptions:
            self._abort("source_aborted", "it was preempted, and its blocks are gone")
            return
        if self.phase == "staging" and not told.is_last:
            if len(told.blocks) - self._num_known <= self._bounds.last_blocks or (
                self._stages >= self._bounds.max_stages
            ):
                self.phase = "leaving"
                self._ask()
                return
        elif told.is_last:
            self.phase, self._left_at = "taking", now()
        card = self.source.kv
        if card is None:
            return  # it is lost, and the fleet will hear of it
        self.target.take(
            self.number,
            self.moved.request,
            told,
            address="" if self.mode == "queued" else card.address,
            is_first=not self._has_taken,
            waits=self.mode == "pull",
            pauses=self.pauses,
        )
        self._has_taken = True
        self._num_known = len(told.blocks)

    def _hear_target(self, told: Offered | Taken | PenstockError) -> None:
        if self.phase == "over":
            return
        if isinstance(told, PenstockError):
            self._abort("target_lost", told.message)
        elif isinstance(told, Taken):
            if told.error is not None:
                self._abort("target_aborted", told.error)
                return
            self._num_blocks += told.num_blocks
            self._num_bytes += told.num_bytes
            self._stages += 1
            if told.is_last:
                self._commit()
            else:
                self._ask()

    def _time_out(self) -> None:
        self._abort("timed_out", f"nobody answered while it was {self.phase}")

    # ---------------------------------------------------------------- how it ends

    def _commit(self) -> None:
        request = self.moved.request
        self.source.disown(request.id)
        self.target.adopt(request, self.moved.hear, self.moved.fail)
        self.source.settle(self.number, request.id, "release")
        self.target.settle(self.number, request.id, "confirm")
        self._end("committed")

    def _abort(self, outcome: MoveOutcome, why: str = "") -> None:
        """The request stays, or ends, where it was."""
        if self.phase == "over":
            return
        is_away = self.phase != "staging" and outcome != "finished_first"
        if is_away and outcome != "source_lost":
            self.source.settle(self.number, self.moved.request.id, "resume")
        else:
            self.source.forget(self.number)
        if self._has_taken:
            self.target.settle(self.number, self.moved.request.id, "drop")
        else:
            self.target.forget(self.number)
        self._end(outcome, why)

    def _end(self, outcome: MoveOutcome, why: str = "") -> None:
        self.phase = "over"
        if self._timer is not None:
            self._timer.cancel()
        on_over, self._on_over = self._on_over, None  # who holds this movement
        assert on_over is not None, "it has begun"
        on_over(outcome, why)

    def told(self, who: str, outcome: MoveOutcome, why: str) -> Migrated:
        """What is to be written of it, when it is over."""
        card, at = self.source.kv or self.target.kv, now()
        return Migrated(
            at=at,
            who=who,
            request=self.moved.request.id,
            source=self.source.name,
            target=self.target.name,
            mode=self.mode,
            outcome=outcome,
            why=why,
            asked_at=self._asked_at,
            stages=self._stages,
            num_blocks=self._num_blocks,
            num_bytes=self._num_bytes
            + self._num_blocks * (0 if card is None else card.block_bytes),
            pause_s=None if self._left_at is None else at - self._left_at,
        )


def refusal(request: Request, source: object, target: object, mode: MoveMode) -> str | None:
    """Why a request cannot move at all from one replica to another; None when it can be tried."""
    if request.n > 1:
        return f"it has {request.n} answers, which share blocks"
    if request.kind != "generate" or request.sampling.prompt_logprobs is not None:
        return "something is read off its prompt, which is not part of what moves"
    if request.adapter is not None:
        return "requests with an adapter do not move"
    cards = [getattr(port, "kv", None) for port in (source, target)]
    for port, card in zip((source, target), cards, strict=True):
        if not isinstance(card, KvCard):
            return f"{getattr(port, 'name', port)} cannot move requests, or is not running"
    ours, theirs = (f"{card.layout}, blocks of {card.block_size}" for card in cards if card)
    if mode == "queued":
        return None
    if not all([card.layout for card in cards if card]):
        return (
            "their keys and values cannot be copied, so that it can move without them only (queued)"
        )
    if ours == theirs:
        return None
    return f"their keys and values are not laid out alike: {ours}; {theirs}"
