"""Requests at given instants, and how many of them kept their promises as the fleet sees it, not a replica."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

from penstock.core.events import Arrived, Event, Finished
from penstock.core.prompt import TracedPrompt
from penstock.core.types import Request, RequestId, Sampling, Slo
from penstock.traffic import TraceMeta

TTFT_S, TPOT_S = 1.0, 0.1


@dataclass
class Sent:
    """(instant, prompt, answer) of each."""

    rows: Sequence[tuple[float, int, int]]
    meta: TraceMeta = field(init=False)

    def __post_init__(self) -> None:
        self.meta = TraceMeta("drawn", "drawn", len(self.rows), len(self.rows))

    def __iter__(self) -> Iterator[tuple[float, Request]]:
        for place, (at, prompt, output) in enumerate(self.rows):
            yield (
                at,
                Request(
                    id=RequestId(str(place)),
                    model="default",
                    prompt=TracedPrompt(prompt),
                    sampling=Sampling(max_tokens=output),
                    slo=Slo(ttft_s=TTFT_S, tpot_s=TPOT_S),
                    true_output=output,
                ),
            )


@dataclass
class Kept:
    """Requests within their promises, by whether they came before `split_at`."""

    num: int = 0
    by_half: list[int] = field(default_factory=lambda: [0, 0])
    split_at: float = float("inf")
    came_at: dict[str, float] = field(default_factory=dict)

    def emit(self, event: Event) -> None:
        if isinstance(event, Arrived):
            self.came_at.setdefault(
                event.request, event.at
            )  # at the fleet; at a replica it may be later
        if not isinstance(event, Finished) or event.reason not in ("stop", "length"):
            return
        if event.first_token_at is None or event.last_token_at is None:
            return
        gap_s = (event.last_token_at - event.first_token_at) / max(1, event.num_output - 1)
        came_at = self.came_at[event.request]
        if event.first_token_at - came_at <= TTFT_S and gap_s <= TPOT_S:
            self.num += 1
            self.by_half[came_at >= self.split_at] += 1
