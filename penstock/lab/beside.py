"""Offline prompts without end beside online conversations, on one replica: what is served of either.

Online requests keep the trace's own arrivals, stretched to a rate at which the replica alone keeps their promises.
Offline ones (priority 1) have the same lengths; so many are there from the start that they do not run out before the
last online request has come, and those served until then are counted.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from penstock.assemble import Config
from penstock.core.events import Event, Finished
from penstock.core.types import Request, Slo
from penstock.lab.rate_search import fleet_of
from penstock.lab.role_flips import EXECUTOR, MODEL, request_of
from penstock.lab.simulate import simulate
from penstock.lab.trial import Offered
from penstock.traffic import TraceMeta
from penstock.traffic.lengths import Empirical

RATE_PER_S = 0.5  # of online requests
PROMISE = Slo(ttft_s=1.0, tpot_s=0.06)
OFFLINE_PER_S = 2.5  # offline requests there are, for each second: more than can be served
PREFIX = "offline-"
OFFLINE: dict[str, dict[str, object]] = {
    "leftover": {"batch": {"name": "leftover"}},
    "only when idle": {"batch": {"name": "leftover", "is_idle_only": True}},
    "online first": {"batch": {"name": "vllm-v1", "max_tokens": 512, "stops_on_self": False}},
    "online alone": {"batch": {"name": "leftover"}},
}
RANKED: dict[str, object] = {
    "preset": "vllm-v1", "order": "priority", "evict": "recompute-priority",
}  # fmt: skip


@dataclass(kw_only=True)
class Mixed:
    """Offline requests first, all at once; then the online ones at their instants."""

    conv: Path
    num: int
    seed: int
    num_offline: int
    rate_per_s: float = RATE_PER_S
    meta: TraceMeta = field(init=False)

    def __post_init__(self) -> None:
        total = self.num + self.num_offline
        self.meta = TraceMeta("conversations beside offline prompts", "drawn", total, total)

    def __iter__(self) -> Iterator[tuple[float, Request]]:
        for request in self._offline():
            yield 0.0, request
        online = Offered(trace=self.conv, num=self.num, seed=self.seed, rate_per_s=self.rate_per_s)
        for place, (at, each) in enumerate(online):
            assert each.true_output is not None
            prompt, output = each.prompt.num_tokens, each.true_output
            yield at, request_of(str(place), prompt, output, slo=PROMISE)

    def offline_sizes(self) -> Mapping[str, int]:
        """Prompt tokens by request."""
        return {request.id: request.prompt.num_tokens for request in self._offline()}

    def _offline(self) -> Iterator[Request]:
        pairs = Empirical(path=self.conv).first(max(1, self.num_offline), self.seed + 1).tolist()
        for place, (prompt, output) in enumerate(pairs[: self.num_offline]):
            yield request_of(f"{PREFIX}{place}", prompt, output, priority=1)


@dataclass
class Tally:
    """Answers of online requests, and tokens of offline requests that were served before the last of these."""

    sizes: Mapping[str, int]  # prompt tokens of offline requests
    num_online: int
    kept: int = 0
    ended: int = 0
    ended_at: float = 0.0
    offline_tokens: int = 0

    def emit(self, event: Event) -> None:
        if not isinstance(event, Finished) or self.ended == self.num_online:
            return
        if event.request in self.sizes:
            self.offline_tokens += self.sizes[event.request] + event.num_output
            return
        self.ended, self.ended_at = self.ended + 1, event.at
        if event.first_token_at is None or event.last_token_at is None:
            return
        ttft_s = event.first_token_at - event.arrived_at
        tpot_s = (event.last_token_at - event.first_token_at) / max(1, event.num_output - 1)
        assert PROMISE.ttft_s is not None and PROMISE.tpot_s is not None
        self.kept += ttft_s <= PROMISE.ttft_s and tpot_s <= PROMISE.tpot_s


def config_of(variant: str) -> Config:
    return fleet_of({**RANKED, **OFFLINE[variant]}, model=MODEL, executor=EXECUTOR)


def beside(variant: str, *, conv: Path, num: int, seed: int) -> Mapping[str, object]:
    """Figures of one variant."""
    seconds = num / RATE_PER_S
    offline = 0 if variant == "online alone" else int(OFFLINE_PER_S * seconds)
    mixed = Mixed(conv=conv, num=num, seed=seed, num_offline=offline)
    tally = Tally(mixed.offline_sizes(), num)
    simulated = simulate(config_of(variant), mixed, has_gaps=False, listeners=(tally,))
    return {
        "attainment": tally.kept / num,
        "offline_tokens_per_s": tally.offline_tokens / tally.ended_at,
        "cost_model": simulated.sources[0].cost_model,
    }
