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
from penstock.core.types import Report
from penstock.core.views import Move, RequestView
from penstock.policy.route import Decision, Queued, View
from penstock.policy.route.hotness import Hotness
from penstock.policy.route.ring import Ring, place_of

SALTS = (b"one", b"other")


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
        able = {report.replica: report for report in view.candidates()}
        if not able:
            return Decision(None, "no replica can take it")
        self._ring.keep(view.columns().names)
        size = next(iter(able.values())).block_size
        units = self._hotness.units(view.request.prompt.blocks(size), size)
        if units:
            self._hotness.see(units, len(able))
        homes = self._homes(view.request, size)
        if len(homes) == 1:
            return Decision(homes[0], "the only one")
        times = [self._ttft_s(view, able[name]) for name in homes]
        place, why = self._choose(view, [able[name] for name in homes], times)
        chosen = homes[place]
        told = f"{why}; {times[place]:.2f} s, {times[1 - place]:.2f} s at {homes[1 - place]}"
        moves: tuple[Move, ...] = ()
        if self.rebalances and min(times) > self._slo_s(view.request):
            moves = self._relieve(view, able, chosen)
        return Decision(chosen, told, alternates=(homes[1 - place],), moves=moves)

    def _choose(
        self, view: View, pair: Sequence[Report], times: Sequence[float]
    ) -> tuple[int, str]:
        loads = [
            (view.queue_s(each) + self._delay_s(view, each.replica), view.pending(each))
            for each in pair
        ]
        lighter = int(loads[1] < loads[0])
        if self.select == "ttft":
            return int(times[1] < times[0]), "the earlier"
        hits = [view.hit(report) for report in pair]
        if hits[0] == hits[1]:
            warmer, why = lighter, "equal caches, the lighter"
        else:
            warmer = int(hits[1] > hits[0])
            why = f"{hits[warmer]} tokens cached"
        if times[warmer] <= self._slo_s(view.request):
            return warmer, why
        return lighter, "the promise would break, the lighter"

    def _homes(self, request: RequestView, size: int) -> list[str]:
        """The two, or the only one."""
        units = self._hotness.units(request.prompt.blocks(size), size)
        key = self._hotness.key(units) if units else request.id.encode()
        first = self._ring.owner(place_of(key, SALTS[0]))
        for other in self._ring.after(place_of(key, SALTS[1])):
            if other != first:
                return [first, other]
        return [first]

    def _slo_s(self, request: RequestView) -> float:
        return request.slo.ttft_s or self.slo_s

    def _ttft_s(self, view: View, report: Report) -> float:
        prefill_s = _prefill_s(view, view.request.prompt.num_tokens, view.hit(report))
        return view.queue_s(report) + self._delay_s(view, report.replica) + prefill_s

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
        queue = list(view.queued.get(hot, {}).values())
        extra_s: dict[str, float] = {}  # what moves of this round add to their targets
        moves: list[Move] = []
        gains = self._gains(view, able, queue, extra_s)
        while gains and len(moves) < self.most_moves and self._breaks(view, queue):
            _, place, target, takes_s = max(gains, key=lambda gain: (gain[0], -gain[1]))
            moved = queue.pop(place)
            moves.append(Move(moved.request.id, hot, target, "queued"))
            extra_s[target] = extra_s.get(target, 0.0) + takes_s
            gains = self._gains(view, able, queue, extra_s)
        return tuple(moves)

    def _waits(self, view: View, queue: Sequence[Queued]) -> list[float]:
        """Seconds from now until the first token of each, one after the other."""
        waits, at_s = [], 0.0
        for each in queue:
            at_s += _prefill_s(view, each.tokens + each.hit, each.hit)
            waits.append(at_s)
        return waits

    def _breaks(self, view: View, queue: Sequence[Queued]) -> bool:
        waits = zip(queue, self._waits(view, queue), strict=True)
        return any(view.now - one.sent_at + s > self._slo_s(one.request) for one, s in waits)

    def _gains(
        self,
        view: View,
        able: Mapping[str, Report],
        queue: Sequence[Queued],
        extra_s: Mapping[str, float],
    ) -> list[tuple[float, int, str, float]]:
        """(seconds won, place in the queue, other home, seconds it takes there) of those that may move."""
        found = []
        for place, (each, wait_s) in enumerate(zip(queue, self._waits(view, queue), strict=True)):
            other = self._other_home(each, able)
            if other is None:
                continue
            hit = self._hit_at(view, each.request, other)
            takes_s = _prefill_s(view, each.request.prompt.num_tokens, hit)
            there_s = view.queue_s(other) + extra_s.get(other.replica, 0.0) + takes_s
            keeps = view.now - each.sent_at + there_s <= self._slo_s(each.request)
            if keeps and there_s < wait_s:
                found.append((wait_s - there_s, place, other.replica, takes_s))
        return found

    def _other_home(self, each: Queued, able: Mapping[str, Report]) -> Report | None:
        """None where it has none, or does not stand at one of its homes any more."""
        size = next(iter(able.values())).block_size
        homes = self._homes(each.request, size)
        if each.replica not in homes or len(homes) == 1:
            return None
        return able[homes[1 - homes.index(each.replica)]]

    def _hit_at(self, view: View, request: RequestView, report: Report) -> int:
        if view.blocks is None:
            return 0
        found = view.blocks.match(request.prompt.blocks(report.block_size))
        return min(found.get(report.replica, 0) * report.block_size, request.prompt.num_tokens - 1)


def _prefill_s(view: View, num_prompt: int, hit: int) -> float:
    return 0.0 if view.cost is None else view.cost.prefill_s(num_prompt - hit, hit)
