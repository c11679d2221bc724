"""Two homes for every prefix, and the choice between them by the promise.

Source: DualMap ("cache affinity and load balance through two hash mappings"); there is no official code, so this
follows the text and reviews of it.

Idea: affinity sends what begins alike to one place, balance spreads it, and routers that weigh one against the other
for each request do both badly. A prefix that may live in exactly two places keeps its cache warm in both, and the
better of two is nearly as even as the best of all (see p2c).

    key        the prompt's beginning, longer where it is hot (route.hotness)
    homes      a, b = owners of hash1(key), hash2(key) on one ring (route.ring); the next distinct one if they are the
               same
    c          the home with the longer cached prefix; among equals the one with fewer prompt tokens to compute
    choice     c if ttft(c) <= slo, else the less loaded of both
    ttft(i)    queue_s(i) + prefill(prompt - hit | hit) + guard(i)
    rebalance  when both homes miss the promise: of the requests that wait at the chosen home, those that would win time
               at their other home and keep the promise there move there, the greatest winner first, until all that are
               left keep it. Only their descriptions move: they have not started
    guard      seconds since the last first token of a replica that has requests waiting, once they exceed what its
               oldest one takes by `guard_s`: memory full of decodes lets no prompt in

Parameters
    slo_s           first token within; a request's own promise goes before. Default 5
    select          "slo" as above; "ttft": the home with the earlier first token, always (their ablation)
    rebalances      whether waiting requests move, default true; most_moves in one go
    window, least   prompts that hotness is counted over, and from which on (theirs are not told)
    guard_s         default 3; None: no guard

Where we differ: the choice compares seconds by the fleet's own predictions, where the paper compares tokens against as
many as fit into the promise. A prompt without hashes has its id for a key, so it is spread evenly over pairs.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import ClassVar, Literal

from penstock.core.events import Begun, Event
from penstock.core.types import BlockHash, Report
from penstock.core.views import Move, RequestView
from penstock.policy.route import Decision, Queued, View
from penstock.policy.route.hotness import Hotness
from penstock.policy.route.ring import Ring, place_of

SALTS = (b"one", b"other")
MOST_HOMES = 1 << 16  # keys whose homes are remembered


@dataclass(slots=True)
class Waiter:
    """One that waits at a hot replica. `here_s`: its prefill there; `other`: its other home, if it has one."""

    queued: Queued
    here_s: float
    age_s: float
    slo_s: float
    other: str | None = None
    queue_s: float = 0.0  # of the other home
    there_s: float = 0.0  # its prefill at the other home


@dataclass(slots=True)
class DualMap:
    needs_blocks: ClassVar[bool] = True
    needs_cost: ClassVar[bool] = True
    needs_queued: ClassVar[bool] = True
    slo_s: float = 5.0
    select: Literal["slo", "ttft"] = "slo"
    rebalances: bool = True
    most_moves: int = 16
    window: int = 512
    least: int = 50
    guard_s: float | None = 3.0
    _hotness: Hotness = field(init=False, compare=False, repr=False)
    _ring: Ring = field(init=False, compare=False, repr=False)
    _homes_of: dict[bytes, tuple[str, ...]] = field(
        init=False, compare=False, default_factory=dict, repr=False
    )
    _begun_at: dict[str, float] = field(init=False, compare=False, default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        if not self.slo_s > 0:
            raise ValueError(f"slo_s must be a positive number of seconds, got {self.slo_s}")
        if self.window < 1 or self.most_moves < 0:
            raise ValueError("window must be at least 1 and most_moves at least 0")
        self._hotness = Hotness(window=self.window, least=self.least)
        self._ring = Ring()

    def observe(self, event: Event) -> None:
        if isinstance(event, Begun):
            self._begun_at[event.replica] = event.at

    def decide(self, view: View) -> Decision:
        able = view.candidates_by_name()
        if not able:
            return Decision(None, "no replica can take it")
        self._keep(view.columns().names)
        size = next(iter(able.values())).block_size
        units = self._hotness.units(view.request.prompt.blocks(size), size)
        if units:
            self._hotness.see(units, len(able))
        homes = self._homes(view.request, units)
        if len(homes) == 1:
            return Decision(homes[0], "the only one")
        pair = [able[name] for name in homes]
        waits = [view.queue_s(each) + self._delay_s(view, each.replica) for each in pair]
        prefills = view.prefills_s([view.hit(each) for each in pair])
        times = [wait_s + takes_s for wait_s, takes_s in zip(waits, prefills, strict=True)]
        place, why = self._choose(view, pair, waits, times)
        chosen = homes[place]
        told = f"{why}; {times[place]:.2f} s, {times[1 - place]:.2f} s at {homes[1 - place]}"
        moves: tuple[Move, ...] = ()
        if self.rebalances and min(times) > self._slo_s(view.request):
            moves = self._relieve(view, able, chosen)
        return Decision(chosen, told, alternates=(homes[1 - place],), moves=moves)

    def _choose(
        self, view: View, pair: Sequence[Report], waits: Sequence[float], times: Sequence[float]
    ) -> tuple[int, str]:
        """Of the pair, and why. `waits`: seconds of their queues; `times`: until the first token."""
        if self.select == "ttft":
            return int(times[1] < times[0]), "the earlier"
        loads = [(wait_s, view.pending(each)) for wait_s, each in zip(waits, pair, strict=True)]
        lighter = int(loads[1] < loads[0])
        hits = [view.hit(report) for report in pair]
        if hits[0] == hits[1]:
            warmer, why = lighter, "equal caches, the lighter"
        else:
            warmer = int(hits[1] > hits[0])
            why = f"{hits[warmer]} tokens cached"
        if times[warmer] <= self._slo_s(view.request):
            return warmer, why
        return lighter, "the promise would break, the lighter"

    def _keep(self, names: Sequence[str]) -> None:
        """Have these on the ring. The homes of keys are remembered while it stays as it is."""
        if self._ring.keep(names) or len(self._homes_of) > MOST_HOMES:
            self._homes_of.clear()

    def _homes(self, request: RequestView, units: tuple[BlockHash, ...]) -> tuple[str, ...]:
        """The two, or the only one."""
        key = self._hotness.key(units) if units else request.id.encode()
        found = self._homes_of.get(key)
        if found is None:
            found = self._homes_of[key] = self._find_homes(key)
        return found

    def _find_homes(self, key: bytes) -> tuple[str, ...]:
        first = self._ring.owner(place_of(key, SALTS[0]))
        for other in self._ring.after(place_of(key, SALTS[1])):
            if other != first:
                return first, other
        return (first,)

    def _slo_s(self, request: RequestView) -> float:
        return request.slo.ttft_s or self.slo_s

    def _delay_s(self, view: View, replica: str) -> float:
        queue = view.queued.get(replica)
        if self.guard_s is None or not queue:
            return 0.0
        oldest = next(iter(queue.values()))
        since = max(self._begun_at.get(replica, oldest.sent_at), oldest.sent_at)
        gap_s = view.now - since
        takes_s = _prefill_s(view, oldest.tokens + oldest.hit, oldest.hit)
        return gap_s if gap_s > takes_s + self.guard_s else 0.0

    # ---------------------------------------------------------------- rebalancing

    def _relieve(self, view: View, able: Mapping[str, Report], hot: str) -> tuple[Move, ...]:
        """Moves that let those who stay at `hot` keep their promises, as far as others can take some."""
        queue = [self._waiter(view, each) for each in view.queued.get(hot, {}).values()]
        if not _breaks(queue):
            return ()
        for waiter in queue:
            self._look_elsewhere(view, able, waiter)
        extra_s: dict[str, float] = {}  # what moves of this round add to their targets
        moves: list[Move] = []
        while len(moves) < self.most_moves and _breaks(queue):
            place = _greatest_winner(queue, extra_s)
            if place is None:
                break
            moved = queue.pop(place)
            assert moved.other is not None
            moves.append(Move(moved.queued.request.id, hot, moved.other, "queued"))
            extra_s[moved.other] = extra_s.get(moved.other, 0.0) + moved.there_s
        return tuple(moves)

    def _waiter(self, view: View, queued: Queued) -> Waiter:
        here_s = _prefill_s(view, queued.tokens + queued.hit, queued.hit)
        return Waiter(queued, here_s, view.now - queued.sent_at, self._slo_s(queued.request))

    def _look_elsewhere(self, view: View, able: Mapping[str, Report], waiter: Waiter) -> None:
        """What it would take at its other home; none where it does not stand at one of its homes any more."""
        request, replica = waiter.queued.request, waiter.queued.replica
        size = next(iter(able.values())).block_size
        homes = self._homes(request, self._hotness.units(request.prompt.blocks(size), size))
        if replica not in homes or len(homes) == 1:
            return
        other = able[homes[1 - homes.index(replica)]]
        hit = self._hit_at(view, request, other)
        waiter.other = other.replica
        waiter.queue_s = view.queue_s(other)
        waiter.there_s = _prefill_s(view, request.prompt.num_tokens, hit)

    def _hit_at(self, view: View, request: RequestView, report: Report) -> int:
        if view.blocks is None:
            return 0
        held = view.blocks.depth(request.prompt.blocks(report.block_size), report.replica)
        return min(held * report.block_size, request.prompt.num_tokens - 1)


def _breaks(queue: Sequence[Waiter]) -> bool:
    """Whether one of them gets its first token too late, one after the other."""
    at_s = 0.0
    for each in queue:
        at_s += each.here_s
        if each.age_s + at_s > each.slo_s:
            return True
    return False


def _greatest_winner(queue: Sequence[Waiter], extra_s: Mapping[str, float]) -> int | None:
    """Who wins most time at its other home and keeps its promise there; the first among equals."""
    at_s, best_s, best = 0.0, 0.0, None
    for place, each in enumerate(queue):
        at_s += each.here_s
        if each.other is None:
            continue
        first_s = each.queue_s + extra_s.get(each.other, 0.0) + each.there_s
        if each.age_s + first_s <= each.slo_s and at_s - first_s > best_s:
            best_s, best = at_s - first_s, place
    return best


def _prefill_s(view: View, num_prompt: int, hit: int) -> float:
    return 0.0 if view.cost is None else view.cost.prefill_s(num_prompt - hit, hit)
