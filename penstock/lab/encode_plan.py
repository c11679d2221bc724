"""Who encodes images, computes prompts and writes answers: the bounds of steps, then each placement on the traffic.

    1. the bounds with which steps keep the pace (lab.encode_budgets), for the usual request of the traffic
    2. what each stage takes a replica for a request, in the mean; numbers of replicas in proportion: one each, then one
       more to whichever stage has the most left for each of its replicas
    3. the highest mean rate of each placement, simulated: together, EP-D, ED-P, E-P-D; bisection on a grid of rates

Source: xLLM's hybrid EPD disaggregation takes one of the three by a profile; "together" is what they have to beat.
Answers are taken to be written by batches as large as keep the pace.
"""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path

from penstock.assemble import Config
from penstock.assemble.vision import vision_of
from penstock.cluster.predictors import executed, shape_of_model
from penstock.core.config import Table
from penstock.core.errors import BadConfig, BadTrace
from penstock.core.events import Event, Finished
from penstock.core.images import images_of
from penstock.core.types import Request, Slo
from penstock.cost.step import StepModel
from penstock.cost.vision import VisionCost
from penstock.lab.encode_budgets import Budgets, Usual, budgets
from penstock.lab.highest_rate import highest_rate
from penstock.lab.simulate import simulate
from penstock.lab.stage_work import stage_work
from penstock.traffic import open_trace

STEP, WANTED = 1.1, 0.9
WIDER, WIDER_BY = 3, 8  # the search goes on above what was expected so often, by so many places
ALONE = 64  # and below it by so many: at a four-hundredth of that rate requests hardly ever meet
SAMPLE = 2000  # requests that the usual one is the mean of
STAGES: Mapping[str, Mapping[str, str]] = {  # role: its stages, by their first letters
    "EP-D": {"prefill": "ep", "decode": "d"},
    "ED-P": {"encode-decode": "ed", "prefill": "p"},
    "E-P-D": {"encode": "e", "prefill": "p", "decode": "d"},
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Needs:
    """Seconds of a replica that a request takes in the mean, by stage."""

    e: float
    p: float
    d: float

    def of(self, stages: str) -> float:
        return math.fsum([getattr(self, stage) for stage in stages])


@dataclass(frozen=True, slots=True, kw_only=True)
class Tried:
    """`roles` None: all replicas do everything."""

    name: str
    roles: Mapping[str, int] | None
    rate_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Planned:
    """The placement with the highest rate stands first."""

    bounds: Budgets
    needs: Needs
    tried: tuple[Tried, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class AskedFor:
    """`num` requests of the traffic in each trial; 90 % are to keep both promises."""

    trace: Path
    ttft_s: float
    tpot_s: float
    num: int = 400

    @property
    def slo(self) -> Slo:
        return Slo(ttft_s=self.ttft_s, tpot_s=self.tpot_s)


def plan_images(
    config: Config, asked: AskedFor, on_try: Callable[[str, int], None] = lambda name, tries: None
) -> Planned:
    """Of the first fleet and its replicas. Raises BadConfig, BadTrace."""
    fleet = config.fleet[0]
    vision = vision_of(fleet.executor)
    model = executed(
        dataclasses.replace(fleet.executor, kind="modelled"),
        shape_of_model(fleet.model, fleet.executor),
    )
    sample = _sample(asked.trace)
    usual = _usual(sample)
    bounds = budgets(model, vision, usual, asked.tpot_s)
    needs = _needs(sample, model, vision, asked.tpot_s)
    placements = {"together": None, **placements_of(needs, fleet.replicas)}
    trials = _Trials(config, asked, bounds, needs.of("epd") / fleet.replicas, on_try)
    tried = [
        Tried(name=name, roles=roles, rate_per_s=trials.highest(name, roles))
        for name, roles in placements.items()
    ]
    tried.sort(key=lambda each: -each.rate_per_s)
    return Planned(bounds=bounds, needs=needs, tried=tuple(tried))


def placements_of(needs: Needs, replicas: int) -> dict[str, dict[str, int]]:
    """Those that there are replicas enough for, with their numbers."""
    return {
        name: split({role: needs.of(stages) for role, stages in roles.items()}, replicas)
        for name, roles in STAGES.items()
        if len(roles) <= replicas
    }


def split(needs: Mapping[str, float], replicas: int) -> dict[str, int]:
    """One for each, then one more to whoever has the most left for each of its own."""
    found = dict.fromkeys(needs, 1)
    for _ in range(replicas - len(found)):
        found[max(found, key=lambda role: needs[role] / found[role])] += 1
    return found


def _sample(trace: Path) -> Sequence[Request]:
    found = open_trace(trace, limit=SAMPLE, max_tokens="trace", rate_per_s=1.0)
    sample = [item for _, item in found if isinstance(item, Request)]
    if not any(request.parts for request in sample):
        raise BadTrace(
            f"nobody shows an image in the first {len(sample)} requests of {trace}",
            hint="give a workload with [images]; see docs/workloads.md",
        )
    return sample


def _usual(sample: Sequence[Request]) -> Usual:
    sizes = [tokens for request in sample for tokens in images_of(request)]
    contexts = [each.prompt.num_tokens + (each.true_output or 1) / 2 for each in sample]
    return Usual(
        context=max(2, round(math.fsum(contexts) / len(contexts))),
        image_tokens=max(1, round(sum(sizes) / len(sizes))),
    )


def _needs(sample: Sequence[Request], model: StepModel, vision: VisionCost, tpot_s: float) -> Needs:
    pairs = [(each.prompt.num_tokens, each.true_output or 1) for each in sample]
    work = stage_work(pairs, model, tpot_s)
    images_s = math.fsum([vision.seconds(images_of(each)) for each in sample])
    return Needs(e=images_s / len(sample), p=work.prompt_s, d=work.answer_s)


@dataclass
class _Kept:
    """Counts answers, and those that kept both promises. What ends with an error is counted by whoever asked for it."""

    slo: Slo
    num: int = 0
    num_kept: int = 0

    def emit(self, event: Event) -> None:
        if not isinstance(event, Finished) or event.reason == "error":
            return
        self.num += 1
        if event.first_token_at is None or event.last_token_at is None:
            return
        first_s = event.first_token_at - event.arrived_at
        gap_s = (event.last_token_at - event.first_token_at) / max(1, event.num_output - 1)
        assert self.slo.ttft_s is not None and self.slo.tpot_s is not None
        self.num_kept += first_s <= self.slo.ttft_s and gap_s <= self.slo.tpot_s


@dataclass
class _Trials:
    """`each_s`: what a request takes of all replicas together, so that 1 / each_s is the most that there can be."""

    config: Config
    asked: AskedFor
    bounds: Budgets
    each_s: float
    on_try: Callable[[str, int], None]
    _tries: int = field(default=0)

    def highest(self, name: str, roles: Mapping[str, int] | None) -> float:
        config = self._config(roles)

        @cache
        def attained(place: int) -> float:
            self._tries += 1
            self.on_try(name, self._tries)
            kept, asked = _Kept(self.asked.slo), self.asked
            trace = open_trace(
                asked.trace,
                model=config.fleet[0].served_name,
                limit=asked.num,
                max_tokens="trace",
                rate_per_s=STEP**place,
                slo=asked.slo,
            )
            played = simulate(config, trace, has_gaps=False, listeners=(kept,)).played
            num = kept.num + sum(played.errors.values())  # who is refused is not served in time
            return kept.num_kept / max(1, num)

        middle = math.log(1 / self.each_s, STEP)
        low, high = math.floor(middle) - 14, math.ceil(middle) + 5  # a quarter to 1.6 times
        for _ in range(WIDER):  # short prompts take less in batches than one by one
            if attained(high) < WANTED:
                break
            low, high = high, high + WIDER_BY
        if attained(low) < WANTED:
            low, high = math.floor(middle) - ALONE, low
        return highest_rate(attained, low=low, high=high, step=STEP, wanted=WANTED)

    def _config(self, roles: Mapping[str, int] | None) -> Config:
        fleet = self.config.fleet[0]
        batch = Table(self.bounds.batch())
        if fleet.size is not None or "scale" in fleet.policy or fleet.hand_off.degrees:
            raise BadConfig(
                "a plan is of fixed replicas, all alike",
                hint="leave out size, policy.scale and hand_off.degrees",
            )
        policy = Table({**fleet.policy, "batch": batch})
        told = dataclasses.replace(
            fleet, roles=None if roles is None else dict(roles), policy=policy
        )
        return dataclasses.replace(self.config, fleet=(told,))


def text_of(found: Planned) -> str:
    """For people."""
    bounds, needs = found.bounds, found.needs
    best = found.tried[0]
    lines = [
        f"bounds    {bounds.max_tokens} tokens, {bounds.max_images} images in a step beside answers",
        f"needs     {1e3 * needs.e:.1f} ms to encode, {1e3 * needs.p:.1f} ms to prefill, "
        f"{1e3 * needs.d:.1f} ms to write, for each request in the mean",
        "",
    ]
    for each in found.tried:
        told = "all do everything" if each.roles is None else _roles_told(each.roles)
        lines.append(f"{each.rate_per_s:8.2f} requests/s  {each.name:<9} {told}")
    if not best.rate_per_s:
        told = "none keeps both promises, even where requests hardly ever meet"
        return "\n".join([*lines, "", f"{told}: promise less, or take faster cards"])
    roles = "" if best.roles is None else f"roles = {{{_roles_told(best.roles)}}}, "
    lines += [
        "",
        f"take      {roles}policy.batch = {{{_batch_told(bounds)}}}",
    ]
    return "\n".join(lines)


def _batch_told(bounds: Budgets) -> str:
    return ", ".join(f"{name} = {json.dumps(value)}" for name, value in bounds.batch().items())


def _roles_told(roles: Mapping[str, int]) -> str:
    return ", ".join(f"{role} = {count}" for role, count in roles.items())


def table_of(found: Planned) -> dict[str, object]:
    """For JSON."""
    return dataclasses.asdict(found)
