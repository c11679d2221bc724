"""Measures what serving costs around the engine: a real `penstock serve`, asked over HTTP by a real client.

Some callers ask one request after the other: first one caller who pauses in between, so that the engine is met idle,
then one who does not, then two, four ... The lengths of prompts and answers
are drawn log-uniformly from what the context holds, so that a few dozen requests meet short and long, and so that
nothing here is the traffic of any later run. Every answer is asked for by its client's clock and found again in the
engine's log by its id; both clocks are the machine's one monotonic clock.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import NamedTuple

from penstock.core.clock import now, sleep_until
from penstock.core.prompt import TracedPrompt
from penstock.core.rng import stream
from penstock.core.types import Request, RequestId, Sampling
from penstock.lab.client import Client, Wish
from penstock.lab.prompts import Composer, lexicon_of
from penstock.lab.stream import Reading

SHORTEST_PROMPT, SHORTEST_ANSWER, LONGEST_ANSWER = 16, 8, 320
START_SHARE = 0.2  # of a rung: its callers begin one by one, since all at once is no traffic
PAUSE_S = 0.4  # at most, and half of it in the mean


@dataclass(frozen=True, slots=True, kw_only=True)
class Ladder:
    """So many callers at once, each number for `seconds`, after `pausing_s` of one who pauses.

    Answers begun in that time are waited for.
    """

    callers: tuple[int, ...] = (1, 2, 4, 8, 16, 32, 48)
    seconds: float = 10.0
    pausing_s: float = 15.0

    def __str__(self) -> str:
        told = ", ".join(map(str, self.callers))
        return f"one who pauses for {self.pausing_s:g} s, then {told} callers for {self.seconds:g} s each"


class Answered(NamedTuple):
    """One answer at the client. `others`: requests of other callers under way when it was sent."""

    id: str
    num_prompt: int
    others: int
    sent_at: float
    first_at: float
    last_at: float


async def ask_in_rounds(
    url: str,
    ladder: Ladder,
    *,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Answered]:
    """Climb the ladder. Raises PenstockError when the server fails."""
    found: list[Answered] = []
    async with Client(url) as client:
        server = await client.probe()
        asker = _Asker(client, Composer(await lexicon_of(client), seed), seed)
        wishes = asker.wishes(server.max_context or 2048)
        await asker.ask_until(now(), now() + ladder.pausing_s, wishes, found, PAUSE_S)
        for number, callers in enumerate(ladder.callers):
            until = now() + ladder.seconds
            async with asyncio.TaskGroup() as tasks:
                for caller in range(callers):
                    begin_at = now() + ladder.seconds * START_SHARE * caller / callers
                    tasks.create_task(asker.ask_until(begin_at, until, wishes, found))
            if on_progress is not None:
                on_progress(number + 1, len(ladder.callers))
    return found


class _Asker:
    def __init__(self, client: Client, composer: Composer, seed: int) -> None:
        self._client, self._composer = client, composer
        self._num_open = 0
        self._rng = stream(seed, "serving")

    def wishes(self, max_context: int) -> Iterator[Wish]:
        """Endless requests of random lengths."""
        rng, number = self._rng, 0
        while True:
            number += 1
            longest = max_context - LONGEST_ANSWER
            prompt = _between(rng.random(), min(SHORTEST_PROMPT, longest), longest)
            answer = _between(rng.random(), SHORTEST_ANSWER, LONGEST_ANSWER)
            request = Request(
                id=RequestId(f"serving-{number}"),
                model="measured",
                prompt=TracedPrompt(prompt),
                sampling=Sampling(max_tokens=answer),
            )
            yield Wish(prompt=self._composer.compose(request), max_tokens=answer, is_exact=True)

    async def ask_until(
        self,
        begin_at: float,
        until: float,
        wishes: Iterator[Wish],
        found: list[Answered],
        pause_s: float = 0.0,
    ) -> None:
        await sleep_until(begin_at)
        while now() < until:
            if pause_s:
                await asyncio.sleep(pause_s * self._rng.random())
            wish, reading = next(wishes), Reading()
            await asyncio.sleep(0)  # a loop's clock stands still while a prompt is composed
            sent_at, others = now(), self._num_open
            self._num_open += 1
            try:
                await self._client.ask(wish, reading)
            finally:
                self._num_open -= 1
            if reading.first_at is None or reading.last_at is None or reading.id is None:
                continue
            num_prompt = reading.num_prompt or 0
            found.append(
                Answered(reading.id, num_prompt, others, sent_at, reading.first_at, reading.last_at)
            )


def _between(share: float, least: int, most: int) -> int:
    """Log-uniform: equal chance for 16 to 32 and for 512 to 1024."""
    return round(math.exp(math.log(least) + share * math.log(most / least)))
