"""One trial of an experiment: a deployment under some traffic in virtual time, as one flat table of figures.

    config = deployment(SCHEDULERS["vllm-2048"], gpu="a100-80g")
    figures = trial(config, Offered(trace=..., num=2000, seed=3, rate_per_s=4.0))

`Offered` offers the requests of a trace, in their order, at instants of any arrival process: two workloads may differ
in nothing but their arrivals. All are stretched to exactly the same mean rate. Which requests: seed k takes the k-th of
STRETCHES stretches that begin at even distances and overlap when they must, so seeds differ in requests as well as in
chance. Load is a share of `saturation`: what the deployment serves a second while more than enough waits.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Protocol

from penstock.assemble import Config, load_config
from penstock.core.errors import BadTrace
from penstock.core.events import Event, Finished
from penstock.core.prompt import TracedPrompt
from penstock.core.types import Request, RequestId, Sampling, Slo
from penstock.lab.simulate import Traffic, simulate
from penstock.report.summary import GroupFigures
from penstock.traffic import Trace, TraceMeta
from penstock.traffic.servegen import ServeGen

SCHEDULERS: dict[str, dict[str, object]] = {
    "vllm-512": {"preset": "vllm-v1", "batch": {"max_tokens": 512}},
    "vllm-2048": {"preset": "vllm-v1", "batch": {"max_tokens": 2048}},
    "sglang": {"preset": "sglang"},
    "s-edf": {"preset": "vllm-v1", "order": "slack-edf"},
}
FLEET = "fleet.0."
STRETCHES = 5
SERVEGEN_HOUR, SERVEGEN_REQUESTS = 10, 24_000


def deployment(
    policy: Mapping[str, object],
    *,
    model: str = "llama-3.1-8b",
    gpu: str = "a100-80g",
    replicas: int = 1,
    **more: object,
) -> Config:
    """A fleet of modelled replicas that charges scheduler time from the stored profile.

    `more`: other settings by dotted name under the fleet, with __ for the dots (cache__num_blocks=7500).
    """
    settings: dict[str, object] = {
        FLEET + "name": "default",
        FLEET + "replicas": replicas,
        FLEET + "executor": {"kind": "modelled", "gpu": gpu, "scheduler": "stored"},
        FLEET + "policy": dict(policy),
    }
    settings |= {FLEET + name.replace("__", "."): value for name, value in more.items()}
    return load_config(model=model, flags=settings)


class Process(Protocol):
    """Instants of arrivals from 0 s on; see penstock.traffic.arrivals."""

    def instants(self, seed: int) -> Iterator[float]: ...


class Promises(Protocol):
    """Which class a request belongs to."""

    def __call__(self, request: Request, /) -> Slo: ...


@functools.cache
def read_requests(trace: Path, max_tokens: int) -> tuple[tuple[float, Request], ...]:
    """A trace in memory, once a process: trials read the same one again and again."""
    if trace.is_dir():
        return tuple(_replayed(trace, max_tokens))
    found = Trace(path=trace, max_tokens=max_tokens)
    return tuple((at, request) for at, request in found if isinstance(request, Request))


def _replayed(folder: Path, max_tokens: int) -> Iterator[tuple[float, Request]]:
    """The first requests of ServeGen's clients from ten in the morning on, drawn once and for all."""
    rows = ServeGen(folder=folder, start_hour=SERVEGEN_HOUR).open().rows(seed=0)
    for place, row in enumerate(islice(rows, SERVEGEN_REQUESTS)):
        request = Request(
            id=RequestId(f"{folder.name}-{place}"),
            model="default",
            prompt=TracedPrompt(row.num_prompt),
            sampling=Sampling(max_tokens=max_tokens),
            tenant=row.tenant,
            true_output=min(row.num_output, max_tokens),
        )
        assert row.at_s is not None
        yield row.at_s, request


@dataclass(kw_only=True)
class Offered:
    """`num` requests of a trace at `rate_per_s` in the mean. `process` None: the trace's own arrivals, stretched.

    rate_per_s None: all of them at once.
    """

    trace: Path
    num: int
    seed: int
    rate_per_s: float | None
    process: Process | None = None
    promises: Promises | None = None
    max_tokens: int = 4096
    meta: TraceMeta = field(init=False)
    instants: list[float] = field(
        init=False, default_factory=list
    )  # of the last time it was played

    def __post_init__(self) -> None:
        assert self.num > 0, "nothing is offered"
        self.meta = TraceMeta(str(self.trace), "offered")

    def __iter__(self) -> Iterator[tuple[float, Request]]:
        rows = list(self._stretch())
        self.meta.rows_read = self.meta.rows_kept = len(rows)
        instants = [at for at, _ in rows]
        if self.process is not None:
            instants = list(islice(self.process.instants(self.seed), len(rows)))
        self.instants = instants = self._stretched(instants)
        for at, (_, request) in zip(instants, rows, strict=True):
            if self.promises is not None:
                request = dataclasses.replace(request, slo=self.promises(request))
            self.meta.last_at_s = at
            yield at, request

    def _stretched(self, instants: list[float]) -> list[float]:
        if self.rate_per_s is None:
            return [0.0] * len(instants)
        first, span_s = instants[0], instants[-1] - instants[0]
        factor = (len(instants) - 1) / self.rate_per_s / span_s if span_s > 0 else 0.0
        return [(at - first) * factor for at in instants]

    def _stretch(self) -> Iterator[tuple[float, Request]]:
        """The seed's stretch of the trace; with more seeds than stretches it begins again."""
        rows = read_requests(self.trace, self.max_tokens)
        if len(rows) < self.num:
            raise BadTrace(f"{self.trace} has {len(rows)} requests; {self.num} are needed")
        start = self.seed % STRETCHES * (len(rows) - self.num) // (STRETCHES - 1)
        yield from rows[start : start + self.num]


class Finishes:
    """Hears when answers end and which."""

    def __init__(self) -> None:
        self.instants: list[float] = []
        self.names: list[str] = []

    def emit(self, event: Event) -> None:
        if isinstance(event, Finished) and event.reason in ("stop", "length"):
            self.instants.append(event.at)
            self.names.append(f"{event.request}.{event.answer}")

    def digest(self) -> str:
        told = "\n".join(sorted(self.names)).encode()
        return hashlib.blake2b(told, digest_size=8).hexdigest()

    def rate_per_s(self) -> float:
        """Over the middle eight tenths, when neither start nor drain shows."""
        ends = sorted(self.instants)
        low, high = len(ends) // 10, len(ends) * 9 // 10
        if not ends or ends[high] <= ends[low]:
            raise BadTrace(
                f"{len(ends)} answers ended, which is too few to tell what a deployment serves a second",
                hint="offer more requests, of lengths that fit the deployment's memory",
            )
        return (high - low) / (ends[high] - ends[low])


def saturation(config: Config, offered: Offered) -> float:
    """Answers a second while more than enough waits: everything is offered at once."""
    return served_per_s(config, dataclasses.replace(offered, rate_per_s=None, process=None))


def served_per_s(config: Config, at_once: Traffic) -> float:
    finishes = Finishes()
    simulate(config, at_once, has_gaps=False, listeners=(finishes,))
    return finishes.rate_per_s()


def trial(config: Config, offered: Traffic) -> dict[str, object]:
    """Run it; figures by name, times in seconds."""
    finishes = Finishes()
    found = simulate(config, offered, listeners=(finishes,))
    all_of, classes = found.figures.all, found.figures.classes
    return {
        **_times(all_of),
        "attainment": all_of.attainment,
        "worst_class": min(group.attainment or 0.0 for group in classes.values()),
        "goodput_per_s": all_of.goodput_per_s,
        "output_tokens_per_s": all_of.output_tokens_per_s,
        "num_offered": all_of.num_offered,
        "num_finished": all_of.num_finished,
        "num_preemptions": all_of.num_preemptions,
        "prefix_hit_rate": all_of.prefix_hit_rate,
        "duration_s": found.figures.duration_s,
        "finished": finishes.digest(),
        "cost_model": found.sources[0].cost_model,
    }


def _times(group: GroupFigures) -> dict[str, object]:
    spreads = {
        "ttft": group.ttft_s,
        "tpot": group.tpot_s,
        "itl": group.itl_s,
        "e2e": group.e2e_s,
        "queue": group.queue_s,
    }
    return {
        f"{name}_{part}_s": getattr(spread, part)
        for name, spread in spreads.items()
        for part in ("mean", "p50", "p95", "p99", "max")
    }
