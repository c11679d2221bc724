"""Clients in a closed loop: each asks for the next request of one queue when its last one has ended, in virtual time.

    figures = serve_clients(config, requests, num_clients=32, promise=Promise(ttft_s=10, gap_s=1.5))

A request is served well when its first token came within `ttft_s` and no gap between two later ones was longer than
`gap_s`: a mean would hide the gap of a job that was evicted. Goodput counts the tokens of those alone.

With `is_strict` nobody waits for an answer that is late already: the request is cancelled at the first broken bound,
what was computed for it is lost, and it goes to the end of the queue, to be tried again up to TRIES times. That is how
servers behave that shed what they have promised in vain, and it makes an eviction dearer than a refusal.
"""

from __future__ import annotations

import asyncio
import dataclasses
import hashlib
from collections import deque
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial

from penstock.assemble import Config, assemble, modelled_leaves
from penstock.core.clock import now
from penstock.core.events import Arrived, Completed, Event, Finished, Opened, Stepped
from penstock.core.ports import Call, StartService
from penstock.core.types import Request, RequestId
from penstock.sim.loop import run

TRIES = 20


@dataclass(frozen=True, kw_only=True)
class Promise:
    """`gap_s`: the longest time between two tokens of an answer."""

    ttft_s: float
    gap_s: float


@dataclass(slots=True, eq=False)
class Attempt:
    """One time that a request was asked for."""

    request: Request
    number: int
    at: float
    first_at: float | None = None
    last_at: float = 0.0
    longest_gap_s: float = 0.0
    num_output: int = 0
    num_evictions: int = 0
    ended_at: float | None = None
    is_cancelled: bool = False
    call: Call | None = None

    def keeps(self, promise: Promise) -> tuple[bool, bool]:
        """Whether the first token came in time, and all others."""
        first = self.first_at is not None and self.first_at - self.at <= promise.ttft_s
        return first, self.longest_gap_s <= promise.gap_s


class Clients:
    """A sink of events that also asks: what is late shows in the log of the deployment."""

    def __init__(
        self, requests: Iterable[Request], *, num_clients: int, promise: Promise, is_strict: bool
    ) -> None:
        self.attempts: list[Attempt] = []
        self._queue = deque((request, 1) for request in requests)
        self._num_clients, self._promise, self._is_strict = num_clients, promise, is_strict
        self._by_name: dict[str, Attempt] = {}
        self._by_seq: dict[int, Attempt] = {}
        self._fleets: set[str] = set()
        self._num_busy = 0

    async def run(self, service: StartService) -> None:
        """Return when the queue is empty and nobody waits."""
        self._service, self._loop = service, asyncio.get_running_loop()
        self._over: asyncio.Future[None] = self._loop.create_future()
        for _ in range(self._num_clients):
            self._ask()
        await self._over

    # ---------------------------------------------------------------- asking

    def _ask(self) -> None:
        if not self._queue:
            if not self._num_busy and not self._over.done():
                self._over.set_result(None)
            return
        request, number = self._queue.popleft()
        self._num_busy += 1
        attempt = Attempt(request, number, now())
        self.attempts.append(attempt)
        name = RequestId(f"{request.id}~{number}")
        self._by_name[name] = attempt
        asked = dataclasses.replace(request, id=name)
        attempt.call = self._service.start(asked, partial(self._on_ended, attempt))
        if self._is_strict:
            self._loop.call_later(self._promise.ttft_s, self._look, attempt, None)

    def _on_ended(self, attempt: Attempt, error: Exception | None) -> None:
        if error is not None:
            if not self._over.done():
                self._over.set_exception(error)
            return
        self._next()

    def _next(self) -> None:
        self._num_busy -= 1
        self._ask()

    def _look(self, attempt: Attempt, seen: float | None) -> None:
        """Give up an attempt that has had no token since `seen`; None = none at all."""
        last = None if attempt.first_at is None else attempt.last_at
        if attempt.ended_at is None and not attempt.is_cancelled and last == seen:
            self._give_up(attempt)

    def _give_up(self, attempt: Attempt) -> None:
        if attempt.ended_at is not None or attempt.is_cancelled:
            return
        assert attempt.call is not None
        attempt.is_cancelled = True
        attempt.call.cancel()
        if attempt.number < TRIES:
            self._queue.append((attempt.request, attempt.number + 1))
        self._next()

    # ---------------------------------------------------------------- hearing

    def emit(self, event: Event) -> None:
        if isinstance(event, Completed):
            self._hear_tokens(event)
        elif isinstance(event, Stepped):
            for seq in event.evicted:
                self._hear_eviction(self._by_seq[seq])
        elif isinstance(event, Arrived):
            if event.who not in self._fleets:  # what arrives there has no number yet
                self._by_seq[event.seq] = self._by_name[event.request]
        elif isinstance(event, Opened):
            if event.what == "fleet":
                self._fleets.add(event.who)
        elif isinstance(event, Finished):
            attempt = self._by_name[event.request]
            attempt.num_output, attempt.ended_at = event.num_output, event.at

    def _hear_tokens(self, event: Completed) -> None:
        ends, by_seq, most = event.ends, self._by_seq, self._promise.gap_s
        first, last = ends[0], ends[-1]
        inner = max((b - a for a, b in zip(ends, ends[1:], strict=False)), default=0.0)
        for seq, *_ in event.outputs:
            attempt = by_seq[seq]
            gap = inner
            if attempt.first_at is None:
                attempt.first_at = first
            elif first - attempt.last_at > gap:
                gap = first - attempt.last_at
            attempt.last_at = last
            if gap > attempt.longest_gap_s:
                attempt.longest_gap_s = gap
                if gap > most and self._is_strict:
                    self._loop.call_soon(self._give_up, attempt)

    def _hear_eviction(self, attempt: Attempt) -> None:
        attempt.num_evictions += 1
        if self._is_strict and attempt.first_at is not None:
            at = attempt.last_at + self._promise.gap_s
            self._loop.call_at(max(at, now()), self._look, attempt, attempt.last_at)


def serve_clients(
    config: Config,
    requests: Sequence[Request],
    *,
    num_clients: int,
    promise: Promise,
    is_strict: bool = False,
) -> dict[str, object]:
    """Serve them all on a modelled deployment of one fleet. Raises BadConfig, BadModel and what ends a request."""
    clients = Clients(requests, num_clients=num_clients, promise=promise, is_strict=is_strict)

    async def main() -> None:
        service = await assemble(config, modelled_leaves(config, clients))
        try:
            await clients.run(service)
        finally:
            await service.stop()

    run(main())
    return figures_of(clients.attempts, promise)


def figures_of(attempts: Sequence[Attempt], promise: Promise) -> dict[str, object]:
    """Rates are over the time from the start to the last end."""
    whole = [one for one in attempts if one.ended_at is not None and not one.is_cancelled]
    kept = [one.keeps(promise) for one in attempts]
    begun = [second for one, (_, second) in zip(attempts, kept, strict=True) if one.first_at]
    good = [one for one in whole if all(one.keeps(promise))]
    duration_s = max((one.ended_at or 0.0 for one in attempts), default=0.0)
    written = sum(one.num_output for one in attempts)
    told = "\n".join(sorted(one.request.id for one in whole)).encode()
    return {
        "goodput_tokens_per_s": sum(one.num_output for one in good) / duration_s,
        "tokens_per_s": sum(one.num_output for one in whole) / duration_s,
        "first_in_time": sum(first for first, _ in kept) / len(kept),
        "gaps_in_time": sum(begun) / max(1, len(begun)),
        "evictions": 100 * sum(one.num_evictions for one in attempts) / max(1, len(whole)),
        "evicted_share": sum(one.num_evictions > 0 for one in attempts) / len(attempts),
        "wasted_share": sum(one.num_output for one in attempts if one.is_cancelled)
        / max(1, written),
        "num_attempts": len(attempts),
        "num_finished": len(whole),
        "duration_s": duration_s,
        "finished": hashlib.blake2b(told, digest_size=8).hexdigest(),
    }
