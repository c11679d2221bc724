"""A real replica in virtual time under a given order, and its books: who was served how much while who waited."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from penstock.core.clock import sleep_until
from penstock.core.events import Arrived, Completed, Event, Finished, Stepped
from penstock.core.prompt import TracedPrompt
from penstock.core.types import Caps, Request, RequestId, Sampling
from penstock.cost.fitted import Fitted
from penstock.cost.lengths import RecentLengths
from penstock.cost.predict import StepPredictor
from penstock.engine.replica import Replica, ReplicaConfig
from penstock.engine.turn import Predictors, ReplicaPolicies
from penstock.policy import find
from penstock.sim.executor import ModelledExecutor
from penstock.sim.loop import run


@dataclass(frozen=True)
class Ask:
    at: float
    tenant: str
    prompt: int
    output: int


class Book:
    def __init__(self) -> None:
        self.events: list[Event] = []

    def emit(self, event: Event) -> None:
        self.events.append(event)


def serve(
    ordering: Any,
    asks: Sequence[Ask],
    *,
    max_jobs: int = 4,
    num_blocks: int = 1 << 14,
    batching: str = "vllm-v1",
    evicting: str = "recompute-last",
) -> list[Event]:
    """A step takes 10 ms and 0.1 ms a token."""
    model = Fitted({"step": 0.01, "token": 1e-4}, name="", digest="", num_layers=1)
    book = Book()
    tokens = {} if batching == "sglang" else {"max_tokens": 256}

    async def main() -> None:
        replica = Replica(
            ReplicaConfig(num_blocks=num_blocks),
            ModelledExecutor(model, caps=Caps(num_layers=1, max_context=1 << 14)),
            ReplicaPolicies(
                order=ordering,
                admit=find("admit", "full-fit")(),
                batch=find("batch", batching)(**tokens, max_jobs=max_jobs),
                evict=find("evict", evicting)(),
                blocks=find("evict", "lru")(),
            ),
            Predictors(cost=StepPredictor(model, 1), lengths=RecentLengths()),
            log=book,
        )
        ended = asyncio.get_running_loop().create_task(replica.run())
        for place, ask in enumerate(sorted(asks, key=lambda ask: ask.at)):
            await sleep_until(ask.at)
            request = Request(
                id=RequestId(f"r{place}"),
                model="m",
                prompt=TracedPrompt(ask.prompt),
                sampling=Sampling(max_tokens=ask.output),
                tenant=ask.tenant,
                true_output=ask.output,
            )
            replica.submit(request, every_token=False)
        await replica.drain()
        await replica.stop()
        await ended

    run(main())
    return book.events


class Service:
    """Weighted tokens that two tenants were served while both had jobs waiting: what fairness is about."""

    def __init__(
        self, events: Sequence[Event], one: str, other: str, output_weight: float = 2.0
    ) -> None:
        self._pair, self._weight = (one, other), output_weight
        self._waiting = {one: 0, other: 0}
        self._served = {one: 0.0, other: 0.0}
        self._of: dict[int, tuple[str, int]] = {}
        self._entered: set[int] = set()
        self._span: list[float] = []
        self.most_unfair, self.together = 0.0, {one: 0.0, other: 0.0}
        for event in events:
            before = dict(self._served)
            was_both = all(self._waiting.values())
            self._hear(event)
            if was_both:
                for name in self._pair:
                    self.together[name] += self._served[name] - before[name]
            self._look()

    def _hear(self, event: Event) -> None:
        if isinstance(event, Arrived):
            self._of[event.seq] = event.tenant, event.num_prompt
            self._move(event.seq, 1)
        elif isinstance(event, Stepped):
            for seq in event.evicted:
                self._move(seq, 1)
            for seq in event.admitted:
                self._move(seq, -1)
                tenant, prompt = self._of[seq]
                if seq not in self._entered and tenant in self._served:
                    self._served[tenant] += prompt
                self._entered.add(seq)
        elif isinstance(event, Completed):
            for seq, tokens, _, _ in event.outputs:
                tenant = self._of[seq][0]
                if tenant in self._served:
                    self._served[tenant] += self._weight * tokens

    def _move(self, seq: int, by: int) -> None:
        tenant = self._of[seq][0]
        if tenant in self._waiting:
            self._waiting[tenant] += by

    def _look(self) -> None:
        """The greatest difference in service over any part of a time in which both were backlogged."""
        if not all(self._waiting.values()):
            self._span = []
            return
        one, other = self._pair
        self._span.append(self._served[one] - self._served[other])
        self.most_unfair = max(self.most_unfair, max(self._span) - min(self._span))


def waits(events: Sequence[Event], tenant: str) -> list[float]:
    """Seconds from arrival to admission of a tenant's requests, in the order in which they ended."""
    found = [event for event in events if isinstance(event, Finished) and event.tenant == tenant]
    return [(event.admitted_at or event.at) - event.arrived_at for event in found]
