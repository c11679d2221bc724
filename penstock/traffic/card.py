"""A trace's card: what a reader must know of it before believing anything that was run on it.

    card = card_of(open_trace("conv.csv"))        or, beside a run that iterates anyway:
    watched = Watched(trace); simulate(config, watched); card = watched.card()

Definitions
    rate         kept requests over the span from the first to the last arrival
    dispersion   variance over mean of the numbers of arrivals in bins of 1 s and of 60 s; 1 for Poisson
    gap cv       standard deviation over mean of the gaps between arrivals; 1 for Poisson
    hit ceiling  share of prompt tokens (and of their hash blocks) that a prefix cache without end would have had, each
                 prompt after all those before it; None where the trace names no blocks
    images       requests that show any, and the tokens of the images
    top tenant   the one with the most requests, and its share of them

Calls that wait for others have no instant of their own: they stand where they would at the nominal pace of
`traffic.workflow`, and the card says so.
"""

from __future__ import annotations

import dataclasses
import math
from array import array
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from penstock.core.images import images_of
from penstock.core.prompt import TracedPrompt
from penstock.core.types import Request
from penstock.traffic.statistics import dispersion, gap_cv
from penstock.traffic.trace import Item, TraceMeta
from penstock.traffic.workflow import NOMINAL_S_PER_TOKEN, Workflow, instants_of_workflow

NUM_BINS = 60  # of the picture of the rate
EDGES = tuple(2**power for power in range(22))  # of the pictures of lengths


@dataclass(frozen=True, slots=True, kw_only=True)
class Lengths:
    """Token counts of prompts or of answers. `counts[i]`: how many lie in [EDGES[i], EDGES[i + 1])."""

    total: int
    mean: float
    p50: float
    p90: float
    p99: float
    max: int
    counts: tuple[int, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Card:
    """All None: too few requests to tell, or not told by the trace."""

    path: str
    format: str
    sha256: str | None
    rows_read: int
    rows_kept: int
    drops: dict[str, int]
    num_late: int
    is_whole: bool
    span_s: float
    rate_per_s: float | None
    dispersion_1s: float | None
    dispersion_60s: float | None
    gap_cv: float | None
    prompt: Lengths
    output: Lengths
    hit_ceiling_tokens: float | None
    hit_ceiling_blocks: float | None
    num_sessions: int  # conversations and programs
    num_in_sessions: int  # requests that belong to one
    num_workflows: dict[str, int]
    num_tenants: int
    top_tenant: str
    top_tenant_share: float
    rates: tuple[float, ...]  # requests a second in NUM_BINS equal parts of the span
    num_with_images: int = 0
    images: Lengths | None = None  # tokens of each
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return dataclasses.asdict(self)


class Played(Protocol):
    """What a card can be made of: a Trace, or what stands for one."""

    @property
    def meta(self) -> TraceMeta: ...

    def __iter__(self) -> Iterator[tuple[float, Item]]: ...


class Watched:
    """A trace that takes notes as it is iterated: a few numbers a request, and the block ids it has met."""

    def __init__(self, trace: Played) -> None:
        self._trace = trace
        self._clear()

    @property
    def meta(self) -> TraceMeta:
        return self._trace.meta

    def __iter__(self) -> Iterator[tuple[float, Item]]:
        self._clear()
        for at_s, item in self._trace:
            if isinstance(item, Request):
                self._note(at_s, item)
            else:
                self._note_workflow(at_s, item)
            yield at_s, item

    def card(self) -> Card:
        """Of what has been iterated so far."""
        meta, at = self.meta, np.sort(np.frombuffer(self._at, np.float64))
        span_s = float(at[-1] - at[0]) if len(at) else 0.0
        tenant, most = self._tenants.most_common(1)[0] if self._tenants else ("", 0)
        sha256: Callable[[], str] | None = getattr(self._trace, "sha256", None)
        return Card(
            path=meta.path,
            format=meta.format,
            sha256=None if sha256 is None else sha256(),
            rows_read=meta.rows_read,
            rows_kept=meta.rows_kept,
            drops=dict(meta.drops),
            num_late=meta.num_late,
            is_whole=meta.is_whole,
            span_s=span_s,
            rate_per_s=len(at) / span_s if span_s > 0 else None,
            dispersion_1s=_known(dispersion(at - at[0], 1.0)) if len(at) else None,
            dispersion_60s=_known(dispersion(at - at[0], 60.0)) if len(at) else None,
            gap_cv=_known(gap_cv(at)),
            prompt=_lengths(self._prompts),
            output=_lengths(self._outputs),
            hit_ceiling_tokens=self._share(self._hit_tokens, sum(self._prompts)),
            hit_ceiling_blocks=self._share(self._hit_blocks, self._num_blocks),
            num_sessions=len(self._sessions),
            num_in_sessions=self._num_in_sessions,
            num_workflows=dict(self._workflows),
            num_tenants=len(self._tenants),
            top_tenant=tenant,
            top_tenant_share=most / len(at) if len(at) else 0.0,
            rates=_rates(at, span_s),
            num_with_images=self._num_with_images,
            images=_lengths(self._images) if self._images else None,
            notes=self._notes(),
        )

    def _clear(self) -> None:
        self._at, self._prompts, self._outputs = array("d"), array("q"), array("q")
        self._tenants: Counter[str] = Counter()
        self._workflows: Counter[str] = Counter()
        self._sessions: set[str] = set()
        self._num_in_sessions = self._num_with_images = 0
        self._images = array("q")
        self._seen: set[int] = set()
        self._num_blocks = self._hit_blocks = self._hit_tokens = 0

    def _note(self, at_s: float, request: Request) -> None:
        self._at.append(at_s)
        self._prompts.append(request.prompt.num_tokens)
        self._outputs.append(request.true_output or 0)
        self._tenants[request.tenant] += 1
        if request.parts:
            self._num_with_images += 1
            self._images.extend(images_of(request))
        if request.program is not None:
            self._sessions.add(request.program)
            self._num_in_sessions += 1
        if isinstance(request.prompt, TracedPrompt) and request.prompt.hash_ids:
            self._meet(request.prompt)

    def _note_workflow(self, at_s: float, workflow: Workflow) -> None:
        self._workflows[workflow.kind] += 1
        instants = instants_of_workflow(workflow, at_s)
        for instant, call in zip(instants, workflow.calls, strict=True):
            self._note(instant, call.request)

    def _meet(self, prompt: TracedPrompt) -> None:
        num_hits = 0
        for id in prompt.hash_ids:
            if id not in self._seen:
                break
            num_hits += 1
        self._seen.update(prompt.hash_ids[num_hits:])
        self._num_blocks += len(prompt.hash_ids)
        self._hit_blocks += num_hits
        self._hit_tokens += min(num_hits * prompt.traced_size, prompt.num_tokens)

    def _share(self, part: int, whole: int) -> float | None:
        return part / whole if self._num_blocks else None

    def _notes(self) -> tuple[str, ...]:
        told = list(self.meta.notes)
        if self._workflows:
            told.append(
                f"calls that wait for others are placed as if an answer token took {NOMINAL_S_PER_TOKEN:g} s"
            )
        return tuple(told)


def card_of(trace: Played, on_progress: Callable[[int], None] | None = None) -> Card:
    """Read the trace to its end (or limit). `on_progress` hears how many items were read, after each."""
    watched = Watched(trace)
    for number, _ in enumerate(watched, 1):
        if on_progress is not None:
            on_progress(number)
    return watched.card()


def _known(value: float) -> float | None:
    return None if math.isnan(value) else value


def _lengths(counts: array[int]) -> Lengths:
    found = np.frombuffer(counts, np.int64)
    if not len(found):
        return Lengths(total=0, mean=0.0, p50=0.0, p90=0.0, p99=0.0, max=0, counts=())
    p50, p90, p99 = np.quantile(found, (0.5, 0.9, 0.99)).tolist()
    bins = np.bincount(np.frexp(found)[1].clip(1) - 1)  # exponent of the power of two below it
    return Lengths(
        total=int(found.sum()),
        mean=float(found.mean()),
        p50=p50,
        p90=p90,
        p99=p99,
        max=int(found.max()),
        counts=tuple(bins.tolist()),
    )


def _rates(at: NDArray[np.float64], span_s: float) -> tuple[float, ...]:
    if span_s <= 0:
        return ()
    counts, _ = np.histogram(at, bins=NUM_BINS)
    return tuple((counts * (NUM_BINS / span_s)).tolist())
