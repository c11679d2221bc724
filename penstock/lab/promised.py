"""Streams, answers with a deadline and agent runs under one deployment for a fixed window: what came in time.

    figures = in_time(config, offers, window_s=200.0, change=lambda found: found)

A backlog that only drains when arrivals end would make all schedulers look alike, so the play is cut off at the end of
the window, and only what had to be in time by then is judged (by the offer alone: the same offers for every scheduler).

    stream     a token is good when it came by arrival + ttft_s + tpot_s * (tokens before it); the request when all are
    answer     good, all of it or nothing, when its last token came by arrival + deadline_s
    run        good, all of it or nothing, when its last call ended within what its calls are promised in sum

A bound is what policies were told of a length at `quantile`, each time they asked; it is violated when the answer is
longer. `change` may put other predictors in the place of the deployment's own, say ones that know.
"""

from __future__ import annotations

import asyncio
import hashlib
import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field, replace

from penstock.assemble import Config, assemble
from penstock.assemble.leaves import Leaves, modelled_outside
from penstock.cluster.inside import Inside
from penstock.cluster.spec import Outside
from penstock.core.events import Arrived, Completed, Event, Finished
from penstock.core.ports import Channel, Log
from penstock.core.types import Request
from penstock.core.views import JobView, Lengths
from penstock.engine.turn import Predictors
from penstock.lab.play import play
from penstock.sim.channel import Link, pair
from penstock.sim.loop import run
from penstock.traffic import Item, Workflow

Offer = tuple[float, Item]
Change = Callable[[Predictors], Predictors]


@dataclass(slots=True, eq=False)
class Case:
    """One request as it went."""

    request: Request
    arrived_at: float = 0.0
    num_output: int = 0
    num_good: int = 0  # tokens that came in time, of streams
    ended_at: float | None = None

    def take(self, ends: Sequence[float]) -> None:
        """Tokens that came at these instants."""
        slo = self.request.slo
        if slo.tpot_s is not None and slo.ttft_s is not None:
            due_at = self.arrived_at + slo.ttft_s + slo.tpot_s * self.num_output
            for end in ends:
                self.num_good += end <= due_at
                due_at += slo.tpot_s
        self.num_output += len(ends)


@dataclass(slots=True)
class Score:
    """Of one class: tokens and requests (runs count as one) that were to be in time, and that were."""

    tokens: int = 0
    good_tokens: int = 0
    num: int = 0
    num_good: int = 0

    def add(self, tokens: int, good_tokens: int, is_good: bool) -> None:
        self.tokens += tokens
        self.good_tokens += good_tokens
        self.num += 1
        self.num_good += is_good


class Scores:
    """A sink of events."""

    def __init__(self, offers: Sequence[Offer]) -> None:
        self._cases: dict[str, Case] = {}
        self._by_seq: dict[int, Case] = {}
        for _, item in offers:
            for request in requests_of(item):
                self._cases[request.id] = Case(request)

    def emit(self, event: Event) -> None:
        if isinstance(event, Completed):
            for seq, tokens, *_ in event.outputs:
                if tokens:
                    self._by_seq[seq].take(event.ends)
        elif isinstance(event, Arrived):
            if not event.who.startswith("fleet"):
                case = self._by_seq[event.seq] = self._cases[event.request]
                case.arrived_at = event.at
        elif isinstance(event, Finished) and event.reason in ("stop", "length"):
            self._cases[event.request].ended_at = event.at

    def judge(self, offers: Sequence[Offer], window_s: float) -> dict[str, Score]:
        """By class: stream, answer, run."""
        found = {"stream": Score(), "answer": Score(), "run": Score()}
        for at, item in offers:
            name, due_s = due_of(item)
            if at + due_s > window_s:
                continue
            cases = [self._cases[request.id] for request in requests_of(item)]
            tokens = sum(case.request.true_output or 0 for case in cases)
            if name == "stream":
                good = cases[0].num_good
                found[name].add(tokens, good, good == tokens)
            else:
                is_good = all(
                    case.ended_at is not None and case.ended_at <= at + due_s for case in cases
                )
                found[name].add(tokens, tokens if is_good else 0, is_good)
        return found

    def digest(self) -> str:
        """Of those that ended within the window."""
        told = "\n".join(sorted(name for name, case in self._cases.items() if case.ended_at))
        return hashlib.blake2b(told.encode(), digest_size=8).hexdigest()

    @property
    def num_ended(self) -> int:
        return sum(case.ended_at is not None for case in self._cases.values())

    @property
    def num_tokens(self) -> int:
        return sum(case.num_output for case in self._cases.values())


def requests_of(item: Item) -> Iterator[Request]:
    if isinstance(item, Workflow):
        yield from (call.request for call in item.calls)
    else:
        yield item


def due_of(item: Item) -> tuple[str, float]:
    """(class, seconds from its start within which all of it must have come)."""
    if isinstance(item, Workflow):
        return "run", sum(call.request.slo.deadline_s or math.inf for call in item.calls)
    slo = item.slo
    if slo.deadline_s is not None:
        return "answer", slo.deadline_s
    assert slo.ttft_s is not None and slo.tpot_s is not None, "a stream promises both"
    return "stream", slo.ttft_s + slo.tpot_s * (item.true_output or 0)


@dataclass
class Heard:
    """Lengths that count how often the bound they tell is violated; implements core.views.Lengths."""

    inner: Lengths
    q: float
    num: int = 0
    num_violated: int = 0
    first_num: int = 0  # of answers of which nothing was written
    first_violated: int = 0

    def quantile(self, job: JobView, q: float) -> int:
        found = self.inner.quantile(job, q)
        if q == self.q:
            is_violated = true_length(job) > found
            self.num += 1
            self.num_violated += is_violated
            if not job.num_output:
                self.first_num += 1
                self.first_violated += is_violated
        return found

    def quantiles(self, jobs: Sequence[JobView], q: float) -> list[int]:
        return [self.quantile(job, q) for job in jobs]

    def sample(self, job: JobView, u: float) -> int:
        return self.inner.sample(job, u)

    def observe(self, event: Event) -> None:
        if hasattr(self.inner, "observe"):
            self.inner.observe(event)


def true_length(job: JobView) -> int:
    """What only experiments may ask: the length that the answer will have."""
    request = job.request
    assert isinstance(request, Request) and request.true_output is not None
    return min(request.true_output, job.max_tokens)


@dataclass
class Changed:
    """Opens the outside of a replica with other predictors, and keeps what it listened with."""

    log: Log
    change: Change
    quantile: float
    heard: list[Heard] = field(default_factory=list)

    def leaves(self) -> Leaves:
        link = Link(latency_s=0.0, bytes_per_s=math.inf)

        def open_pair() -> tuple[Channel, Channel]:
            return pair(link)

        inside = Inside(lambda spec: self._opened(modelled_outside(spec, self.log)), open_pair)
        return Leaves(start=inside.start, stop=inside.stop, log=lambda who: self.log)

    def _opened(self, outside: Outside) -> Outside:
        predictors = self.change(outside.predictors)
        heard = Heard(predictors.lengths, self.quantile)
        self.heard.append(heard)
        return replace(outside, predictors=replace(predictors, lengths=heard))


def in_time(
    config: Config,
    offers: Sequence[Offer],
    *,
    window_s: float,
    change: Change = lambda found: found,
    quantile: float = 0.95,
) -> dict[str, object]:
    """Play the offers on a modelled deployment for `window_s`. Rates are over the window."""
    scores = Scores(offers)
    changed = Changed(scores, change, quantile)

    async def main() -> None:
        service = await assemble(config, changed.leaves())
        playing = asyncio.get_running_loop().create_task(play(offers, service))
        try:
            await asyncio.wait((playing,), timeout=window_s)
        finally:
            playing.cancel()
            await asyncio.gather(playing, return_exceptions=True)
            await service.stop()

    run(main())
    return figures_of(scores, scores.judge(offers, window_s), window_s, changed.heard)


def figures_of(
    scores: Scores, judged: dict[str, Score], window_s: float, heard: Sequence[Heard]
) -> dict[str, object]:
    parts = [score for score in judged.values() if score.num]
    num = sum(heard.num for heard in heard)
    first = sum(heard.first_num for heard in heard)
    return {
        "good_tokens_per_s": sum(score.good_tokens for score in parts) / window_s,
        "due_tokens_per_s": sum(score.tokens for score in parts) / window_s,
        "tokens_per_s": scores.num_tokens / window_s,
        "good_requests": sum(s.num_good for s in parts) / max(1, sum(s.num for s in parts)),
        "worst_class": min((score.num_good / score.num for score in parts), default=None),
        **{f"good_{name}": s.num_good / s.num for name, s in judged.items() if s.num},
        **{f"tokens_{name}": s.good_tokens / window_s for name, s in judged.items()},
        "violated": sum(heard.num_violated for heard in heard) / num if num else None,
        "violated_first": sum(one.first_violated for one in heard) / first if first else None,
        "num_bounds": num,
        "num_finished": scores.num_ended,
        "finished": scores.digest(),
    }
