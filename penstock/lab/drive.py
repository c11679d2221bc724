"""Drives a server under a trace: open loop, real arrival times, streamed answers, measured at the client.

A request is sent at its instant however many are under way, as users do; a slow server meets the same traffic as a
fast one. All latencies count from that instant and not from the sending: when this client is late, or a concurrency
cap holds requests back, that shows in TTFT and is told in the notes. Prompts are text of the traced length, answers are
asked for at the traced length. HTTP 429 and 503 count as refused, other failures as failed, all of them as misses.
Later calls of a workflow are wanted when their predecessors have ended and their wait is over (see `lab.workflow`).
"""

from __future__ import annotations

import asyncio
from array import array
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Protocol

from penstock.core.clock import now, sleep_until
from penstock.core.prompt import TracedPrompt
from penstock.core.types import Request, Slo
from penstock.lab.client import Wish
from penstock.lab.stream import Failed, Reading
from penstock.lab.workflow import Workflows
from penstock.report.summary import (
    Answer,
    Figures,
    Group,
    Spread,
    class_name,
    figures_of,
    spread_of,
)
from penstock.report.timeline import Timeline
from penstock.traffic import Item

LATE_S = 0.02  # sending later than this is worth a note
TICK_S = 0.25
REFUSALS = (429, 503)


@dataclass(slots=True)
class Driven:
    """What has been measured so far."""

    groups: defaultdict[tuple[str, str], Group] = field(default_factory=lambda: defaultdict(Group))
    errors: Counter[str] = field(default_factory=Counter)
    messages: dict[str, str] = field(default_factory=dict)  # the first of each kind of error
    lateness_s: array[float] = field(default_factory=lambda: array("d"))
    timeline: Timeline = field(default_factory=Timeline)
    started_at: float = 0.0
    last_at: float = 0.0
    num_sent: int = 0
    num_held: int = 0  # requests that the concurrency cap made wait
    open: set[Reading] = field(default_factory=set)
    wanted_prompt: int = 0
    wanted_output: int = 0
    num_events: int = 0
    has_shared_prefixes: bool = False
    num_counted: int = 0  # answers whose server said how many tokens they had

    @property
    def num_ended(self) -> int:
        """Answered, refused or failed."""
        return self.num_sent - len(self.open)

    @property
    def num_waiting(self) -> int:
        """Sent, and no token yet."""
        return sum(reading.first_at is None for reading in self.open)

    def figures(self, notes: tuple[str, ...] = ()) -> Figures:
        return figures_of(
            self.groups,
            max(0.0, self.last_at - self.started_at),
            errors=self.errors,
            notes=(*notes, *self.notes()),
        )

    def lateness(self) -> Spread:
        return spread_of(self.lateness_s)

    def notes(self) -> tuple[str, ...]:
        """What a reader of the figures must know."""
        told = []
        late = self.lateness()
        if late.p99 is not None and late.p99 > LATE_S:
            told.append(
                f"this client could not keep up: it sent requests late, p99 {late.p99:.3f} s, most {late.max:.3f} s"
            )
        if self.num_held:
            told.append(f"the concurrency cap made {self.num_held:,} requests wait at this client")
        groups = self.groups.values()
        prompt, output = sum(g.prompt_tokens for g in groups), sum(g.output_tokens for g in groups)
        for name, got, wanted in (
            ("prompt", prompt, self.wanted_prompt),
            ("output", output, self.wanted_output),
        ):
            if wanted and abs(got / wanted - 1) > 0.02:
                told.append(f"{name} tokens were {got / wanted:.1%} of the traced ones")
        cached = sum(group.cached_tokens for group in groups)
        if not self.has_shared_prefixes and prompt and cached > 0.05 * prompt:
            told.append(
                f"the server had {cached / prompt:.0%} of the prompts in its cache although the trace shares none: "
                "it met them in an earlier run; take another --seed"
            )
        ended = sum(group.num_finished for group in groups)
        if ended and self.num_counted < ended:
            told.append("the server told no usage: tokens are counted by events")
        elif output and self.num_events < 0.9 * output:
            told.append(
                f"{self.num_events:,} events carried {output:,} tokens: ITL is between events"
            )
        return tuple(told)


class Asker(Protocol):
    """What a driver needs of a client."""

    async def ask(self, wish: Wish, reading: Reading) -> Reading: ...


class Writer(Protocol):
    """What a driver needs of a composer."""

    def compose(self, request: Request) -> str: ...


class Driver:
    """One run of a trace against a client's server."""

    def __init__(
        self,
        client: Asker,
        composer: Writer,
        *,
        concurrency_cap: int | None = None,
        on_tick: Callable[[Driven], None] | None = None,
    ) -> None:
        self._client, self._composer = client, composer
        self._cap = None if concurrency_cap is None else asyncio.Semaphore(concurrency_cap)
        self._on_tick = on_tick
        self.driven = Driven()
        self.workflows = Workflows(self._ask, on_abandoned=self._abandoned)

    async def run(self, trace: Iterable[tuple[float, Item]]) -> Driven:
        """Send everything, wait for all answers. Cancelling stops and keeps what was measured."""
        driven = self.driven
        driven.started_at = driven.last_at = now()
        ticking = asyncio.create_task(self._tick())
        try:
            async with asyncio.TaskGroup() as tasks:
                for at_s, item in trace:
                    at = driven.started_at + at_s
                    text = self._composer.compose(item) if isinstance(item, Request) else ""
                    await sleep_until(at)
                    if isinstance(item, Request):
                        tasks.create_task(self._one(at, item, text))
                    else:
                        tasks.create_task(self.workflows.play(item, at))
        finally:
            ticking.cancel()
        return driven

    async def _tick(self) -> None:
        while True:
            driven = self.driven
            waiting = driven.num_waiting
            driven.timeline.add("client", now(), len(driven.open) - waiting, waiting)
            if self._on_tick is not None:
                self._on_tick(driven)
            await asyncio.sleep(TICK_S)

    async def _ask(self, request: Request, at: float) -> bool:
        return await self._one(at, request, self._composer.compose(request))

    def _abandoned(self, request: Request) -> None:
        self._group(request).num_cancelled += 1

    def _group(self, request: Request) -> Group:
        return self.driven.groups[request.tenant, class_name(request.priority, request.slo)]

    async def _one(self, at: float, request: Request, text: str) -> bool:
        """Whether it was answered."""
        driven, slo = self.driven, request.slo
        group = self._group(request)
        group.num_offered += 1
        driven.num_sent += 1
        driven.lateness_s.append(now() - at)
        reading = Reading()
        driven.open.add(reading)
        try:
            if self._cap is not None and self._cap.locked():
                driven.num_held += 1
            async with self._cap or nullcontext():
                await self._client.ask(_wish(request, text, slo), reading)
            self._count(group, at, request, reading, slo)
            return True
        except Failed as error:
            driven.errors[error.kind] += 1
            driven.messages.setdefault(error.kind, error.message)
            if error.status in REFUSALS:
                group.num_refused += 1
            else:
                group.num_failed += 1
            return False
        finally:
            driven.open.discard(reading)
            driven.last_at = max(driven.last_at, now())

    def _count(self, group: Group, at: float, request: Request, reading: Reading, slo: Slo) -> None:
        driven = self.driven
        wanted = request.sampling.max_tokens
        num_output = reading.num_output if reading.num_output is not None else reading.num_events
        num_prompt = reading.num_prompt
        driven.num_counted += reading.num_output is not None
        driven.num_events += reading.num_events
        driven.wanted_output += wanted
        driven.wanted_prompt += request.prompt.num_tokens
        if isinstance(request.prompt, TracedPrompt) and request.prompt.hash_ids:
            driven.has_shared_prefixes = True
        for gap_s in reading.gaps_s:
            group.itl_s.add(gap_s)
        group.add(
            Answer(
                arrived_at=at,
                first_token_at=reading.first_at,
                last_token_at=reading.last_at,
                num_prompt=request.prompt.num_tokens if num_prompt is None else num_prompt,
                num_cached=reading.num_cached,
                num_output=num_output,
            ),
            slo,
        )


def _wish(request: Request, text: str, slo: Slo) -> Wish:
    bounds = {"ttft_s": slo.ttft_s, "tpot_s": slo.tpot_s, "deadline_s": slo.deadline_s}
    return Wish(
        prompt=text,
        max_tokens=request.sampling.max_tokens,
        tenant=request.tenant,
        priority=request.priority or None,
        slo={name: value for name, value in bounds.items() if value is not None},
        is_exact=True,
    )
