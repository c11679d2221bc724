"""Figures: plain numbers, ready for JSON, tables and comparison. Built by `metrics` and by `lab.drive`.

Definitions
    TTFT   first token - arrival
    TPOT   (last token - first token) / (output tokens - 1), of answers with at least two tokens
    ITL    every gap between consecutive tokens of an answer
    E2E    last token - arrival
    queue  admission - arrival
    goodput      answers that met all their promises, a second
    attainment   the same answers over all that were offered: refused, cancelled, failed and unfinished ones are misses
"""

from __future__ import annotations

import dataclasses
import math
from array import array
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

from penstock.core.types import Slo
from penstock.report.histogram import Histogram

NO_PROMISE = "no promise"
PERCENTS = (50, 90, 95, 99)
COUNTS = (
    "num_offered", "num_finished", "num_refused", "num_cancelled", "num_failed", "num_met",
    "prompt_tokens", "cached_tokens", "output_tokens", "num_preemptions",
    "recomputed_tokens",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Spread:
    """Mean and percentiles of one quantity. None where nothing was measured."""

    num: int = 0
    mean: float | None = None
    p50: float | None = None
    p90: float | None = None
    p95: float | None = None
    p99: float | None = None
    max: float | None = None


def spread_of(values: Sequence[float]) -> Spread:
    """Exact percentiles: the smallest value that the given share of values does not exceed.

    The mean is of the exact sum, which every version of Python agrees on; of sum() they do not.
    """
    if not values:
        return Spread()
    ordered = sorted(values)
    num = len(ordered)
    picked = {f"p{percent}": ordered[-(-num * percent // 100) - 1] for percent in PERCENTS}
    return Spread(num=num, mean=math.fsum(ordered) / num, max=ordered[-1], **picked)


def spread_of_histogram(found: Histogram) -> Spread:
    """Percentiles within 0.55% of themselves; number, mean and greatest are exact."""
    if not found.num:
        return Spread()
    picked = {f"p{percent}": found.percentile(percent) for percent in PERCENTS}
    return Spread(num=found.num, mean=found.mean, max=found.most, **picked)


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupFigures:
    """The figures of one tenant, one class, or all. Counts are of answers."""

    num_offered: int
    num_finished: int
    num_refused: int
    num_cancelled: int
    num_failed: int
    num_met: int
    attainment: float | None
    goodput_per_s: float | None
    prompt_tokens: int
    cached_tokens: int
    output_tokens: int
    prompt_tokens_per_s: float | None
    output_tokens_per_s: float | None
    prefix_hit_rate: float | None
    num_preemptions: int
    recomputed_tokens: int  # positions computed again after preemptions
    ttft_s: Spread
    tpot_s: Spread
    itl_s: Spread
    e2e_s: Spread
    queue_s: Spread


@dataclass(frozen=True, slots=True, kw_only=True)
class Figures:
    """One run. `duration_s`: first arrival to last event of a request. `notes`: what a reader must know."""

    duration_s: float
    all: GroupFigures
    tenants: dict[str, GroupFigures] = field(default_factory=dict)
    classes: dict[str, GroupFigures] = field(default_factory=dict)
    num_steps: int = 0
    errors: dict[str, int] = field(default_factory=dict)
    notes: tuple[str, ...] = ()

    def to_dict(self) -> dict[str, object]:
        """For JSON."""
        return dataclasses.asdict(self)


@dataclass(slots=True, kw_only=True)
class Answer:
    """One measured answer, whoever measured it. Times are instants of one clock."""

    arrived_at: float
    admitted_at: float | None = None
    first_token_at: float | None = None
    last_token_at: float | None = None
    num_prompt: int = 0
    num_cached: int = 0
    num_output: int = 0
    num_preemptions: int = 0
    num_recomputed: int = 0

    def ttft_s(self) -> float | None:
        return None if self.first_token_at is None else self.first_token_at - self.arrived_at

    def tpot_s(self) -> float | None:
        if self.first_token_at is None or self.last_token_at is None or self.num_output < 2:
            return None
        return (self.last_token_at - self.first_token_at) / (self.num_output - 1)

    def e2e_s(self) -> float | None:
        return None if self.last_token_at is None else self.last_token_at - self.arrived_at

    def has_met(self, slo: Slo) -> bool:
        """Whether all bounds were kept. An answer without a token has met nothing."""
        return are_kept(slo, self.ttft_s(), self.tpot_s(), self.e2e_s())


def are_kept(slo: Slo, ttft_s: float | None, tpot_s: float | None, e2e_s: float | None) -> bool:
    """Whether these latencies keep the bounds; see Answer.has_met."""
    if ttft_s is None or e2e_s is None:
        return False
    return (
        (slo.ttft_s is None or ttft_s <= slo.ttft_s)
        and (slo.tpot_s is None or tpot_s is None or tpot_s <= slo.tpot_s)
        and (slo.deadline_s is None or e2e_s <= slo.deadline_s)
    )


@dataclass(slots=True)
class Group:
    """What is gathered about one tenant or class: a few floats an answer, and a histogram of gaps."""

    num_offered: int = 0
    num_finished: int = 0
    num_refused: int = 0
    num_cancelled: int = 0
    num_failed: int = 0
    num_met: int = 0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    num_preemptions: int = 0
    recomputed_tokens: int = 0
    ttft_s: array[float] = field(default_factory=lambda: array("d"))
    tpot_s: array[float] = field(default_factory=lambda: array("d"))
    e2e_s: array[float] = field(default_factory=lambda: array("d"))
    queue_s: array[float] = field(default_factory=lambda: array("d"))
    itl_s: Histogram = field(default_factory=Histogram)

    def add(self, answer: Answer, slo: Slo) -> None:
        """Count an answer that ended by itself."""
        ttft_s, tpot_s, e2e_s = answer.ttft_s(), answer.tpot_s(), answer.e2e_s()
        self.num_finished += 1
        self.num_met += are_kept(slo, ttft_s, tpot_s, e2e_s)
        self.prompt_tokens += answer.num_prompt
        self.cached_tokens += answer.num_cached
        self.output_tokens += answer.num_output
        self.num_preemptions += answer.num_preemptions
        self.recomputed_tokens += answer.num_recomputed
        if ttft_s is not None:
            self.ttft_s.append(ttft_s)
        if tpot_s is not None:
            self.tpot_s.append(tpot_s)
        if e2e_s is not None:
            self.e2e_s.append(e2e_s)
        if answer.admitted_at is not None:
            self.queue_s.append(answer.admitted_at - answer.arrived_at)

    def merge(self, other: Group) -> None:
        """Take in all that `other` gathered."""
        for name in COUNTS:
            setattr(self, name, getattr(self, name) + getattr(other, name))
        for name in ("ttft_s", "tpot_s", "e2e_s", "queue_s"):
            getattr(self, name).extend(getattr(other, name))
        self.itl_s.merge(other.itl_s)

    def figures(self, duration_s: float) -> GroupFigures:
        """The figures, with rates over `duration_s`."""

        def rate(count: int) -> float | None:
            return count / duration_s if duration_s > 0 else None

        def share(count: int, of: int) -> float | None:
            return count / of if of else None

        return GroupFigures(
            num_offered=self.num_offered,
            num_finished=self.num_finished,
            num_refused=self.num_refused,
            num_cancelled=self.num_cancelled,
            num_failed=self.num_failed,
            num_met=self.num_met,
            attainment=share(self.num_met, self.num_offered),
            goodput_per_s=rate(self.num_met),
            prompt_tokens=self.prompt_tokens,
            cached_tokens=self.cached_tokens,
            output_tokens=self.output_tokens,
            prompt_tokens_per_s=rate(self.prompt_tokens),
            output_tokens_per_s=rate(self.output_tokens),
            prefix_hit_rate=share(self.cached_tokens, self.prompt_tokens),
            num_preemptions=self.num_preemptions,
            recomputed_tokens=self.recomputed_tokens,
            ttft_s=spread_of(self.ttft_s),
            tpot_s=spread_of(self.tpot_s),
            itl_s=spread_of_histogram(self.itl_s),
            e2e_s=spread_of(self.e2e_s),
            queue_s=spread_of(self.queue_s),
        )


def figures_of(
    groups: Mapping[tuple[str, str], Group],
    duration_s: float,
    *,
    num_steps: int = 0,
    errors: Mapping[str, int] | None = None,
    notes: tuple[str, ...] = (),
) -> Figures:
    """Figures of a run from its groups, one for each (tenant, class)."""
    tenants: defaultdict[str, Group] = defaultdict(Group)
    classes: defaultdict[str, Group] = defaultdict(Group)
    whole = Group()
    for (tenant, name), group in sorted(groups.items()):
        for total in (tenants[tenant], classes[name], whole):
            total.merge(group)
    return Figures(
        duration_s=duration_s,
        all=whole.figures(duration_s),
        tenants={name: group.figures(duration_s) for name, group in tenants.items()},
        classes={name: group.figures(duration_s) for name, group in classes.items()},
        num_steps=num_steps,
        errors=dict(errors or {}),
        notes=notes,
    )


def class_name(priority: int, slo: Slo) -> str:
    """Requests with equal promises and priority are one class: "priority 0, ttft 0.5 s, tpot 0.05 s"."""
    bounds = (("ttft", slo.ttft_s), ("tpot", slo.tpot_s), ("deadline", slo.deadline_s))
    told = [f"{name} {value:g} s" for name, value in bounds if value is not None]
    return ", ".join((f"priority {priority}", *(told or [NO_PROMISE])))
