"""Requests whose lengths follow the power laws of Llumnix's evaluation (Sun et al., OSDI 2024, table 1).

The paper tells of each law its mean and four quantiles; between those, lengths are log-linear here, which leaves the
means within 3 % of those told. Prompts may come from a trace instead.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from penstock.core.prompt import TracedPrompt
from penstock.core.rng import Stream, stream
from penstock.core.types import Request, RequestId, Sampling
from penstock.lab.trial import read_requests
from penstock.traffic import TraceMeta
from penstock.traffic.arrivals import Gamma, Poisson

LONGEST = 6144  # of a prompt and of an answer
POWER_LAWS = {  # mean -> shortest (ours, for the mean), and the published P50, P80, P95 and P99
    128: (2, 38, 113, 413, 1464),
    256: (1, 32, 173, 1288, 4208),
    512: (1, 55, 582, 3113, 5166),
}
AT = (0.0, 0.5, 0.8, 0.95, 0.99, 1.0)
URGENT = 10  # one request in so many


@functools.cache
def prompts_of(path: Path) -> tuple[int, ...]:
    found = (request.prompt.num_tokens for _, request in read_requests(path, LONGEST))
    return tuple(tokens for tokens in found if tokens <= LONGEST)


def length_of(mean: int, uniform: float) -> int:
    """A length of one of the power laws."""
    logs = np.log((*POWER_LAWS[mean], LONGEST))
    return round(math.exp(np.interp(uniform, AT, logs)))


@dataclass(kw_only=True)
class Conversations:
    """`num` requests. `prompts`: mean of their lengths, None = Azure's from `path`. `cv` None: Poisson."""

    num: int
    seed: int
    rate_per_s: float
    answers: int
    prompts: int | None = None
    path: Path | None = None
    cv: float | None = None
    meta: TraceMeta = field(init=False)

    def __post_init__(self) -> None:
        self.meta = TraceMeta("lengths of power laws", "drawn", self.num, self.num)

    def __iter__(self) -> Iterator[tuple[float, Request]]:
        chance = stream(self.seed, "experiments", "llumnix")
        rate = self.rate_per_s
        arrivals = (
            Poisson(rate_per_s=rate) if self.cv is None else Gamma(rate_per_s=rate, cv=self.cv)
        )
        instants = arrivals.instants(self.seed)
        for place in range(self.num):
            prompt = self._prompt(chance)
            yield (
                next(instants),
                Request(
                    id=RequestId(f"talk-{place}"),
                    model="default",
                    prompt=TracedPrompt(prompt),
                    sampling=Sampling(max_tokens=LONGEST),
                    priority=-1 if chance.randrange(URGENT) == 0 else 0,
                    true_output=length_of(self.answers, chance.random()),
                ),
            )

    def _prompt(self, chance: Stream) -> int:
        if self.prompts is not None:
            return length_of(self.prompts, chance.random())
        assert self.path is not None, "prompts come from somewhere"
        known = prompts_of(self.path)
        return known[chance.randrange(len(known))]
