"""Replicas in fixed roles and in roles that follow the load, where prompts or answers are the larger part of the work.

    code        lengths of Azure's code trace (long prompts, short answers), in bursts
    conv        Azure's conversations with their own arrivals, stretched
    shift       the one, then the other

The highest mean rate is sought at which enough answers keep both promises; OPT-13B with the step times that DistServe
published (cost.linear_five), keys and values over modelled wires.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path

from penstock.assemble import Config
from penstock.cluster.predictors import step_model
from penstock.cluster.spec import ExecutorSpec
from penstock.core.prompt import TracedPrompt
from penstock.core.types import Request, RequestId, Sampling, Slo
from penstock.cost.shapes import shape_of
from penstock.lab.rate_search import RateSearch, fleet_of
from penstock.lab.stage_work import StageWork, stage_work
from penstock.lab.trial import Offered
from penstock.traffic import TraceMeta
from penstock.traffic.arrivals import OnOff
from penstock.traffic.lengths import Empirical

REPLICAS = 8
MODEL = "opt-13b"
CARD = "a100-80g"
EXECUTOR = {"gpu": CARD, "tables": "distserve"}
LONGEST = 2048  # positions of the model
ON_S, OFF_S = 10.0, 20.0  # of bursts: what the published piece of the code trace looks like
LOW, HIGH = 8, 38  # places on the grid of rates: 2.1 to 37 a second
STEP_TOKENS = 2048
BATCH: dict[str, object] = {"name": "vllm-v1", "max_tokens": STEP_TOKENS}


def policy_of(variant: str) -> tuple[dict[str, object], dict[str, int] | None]:
    """The policies of a variant, and its roles. "5:3": fixed roles, least load on either side."""
    plain: dict[str, object] = {"preset": "vllm-v1", "batch": BATCH}
    if variant == "together":
        return {**plain, "route": "least"}, None
    if variant == "xllm":
        half = {"prefill": REPLICAS // 2, "decode": REPLICAS // 2}
        return {**plain, "route": "xllm", "route_decode": "xllm", "scale": "xllm"}, half
    first, _, second = variant.partition(":")
    roles = {"prefill": int(first), "decode": int(second)}
    return {**plain, "route": "least", "route_decode": "least"}, roles


def config_of(variant: str) -> Config:
    policy, roles = policy_of(variant)
    return fleet_of(policy, model=MODEL, executor=EXECUTOR, replicas=REPLICAS, roles=roles)


@dataclass(kw_only=True)
class Turns:
    """`num` requests of each kind in `kinds`, one kind after the other, each at the same mean rate."""

    kinds: tuple[str, ...]
    code: Path
    conv: Path
    num: int
    rate_per_s: float
    seed: int
    slo: Slo
    meta: TraceMeta = field(init=False)

    def __post_init__(self) -> None:
        total = self.num * len(self.kinds)
        self.meta = TraceMeta(", then ".join(self.kinds), "drawn", total, total)

    def __iter__(self) -> Iterator[tuple[float, Request]]:
        before, place = 0.0, 0
        for kind in self.kinds:
            at = before
            for at, prompt, output in self._code() if kind == "code" else self._conv():
                at += before
                yield at, request_of(str(place), prompt, output, slo=self.slo)
                place += 1
            before = at

    def _code(self) -> Iterator[tuple[float, int, int]]:
        lengths = _lengths(self.code).first(self.num, self.seed)
        on_rate = self.rate_per_s * (ON_S + OFF_S) / ON_S
        bursts = OnOff(on_rate_per_s=on_rate, mean_on_s=ON_S, mean_off_s=OFF_S)
        for at, (prompt, output) in zip(bursts.instants(self.seed), lengths.tolist(), strict=False):
            yield at, prompt, output

    def _conv(self) -> Iterator[tuple[float, int, int]]:
        offered = Offered(trace=self.conv, num=self.num, seed=self.seed, rate_per_s=self.rate_per_s)
        for at, request in offered:
            assert request.true_output is not None
            yield at, request.prompt.num_tokens, request.true_output


def request_of(
    name: str, prompt: int, output: int, *, slo: Slo | None = None, priority: int = 0
) -> Request:
    """Cut to what the model has positions for, the answer to half of them."""
    output = min(output, LONGEST // 2)
    return Request(
        id=RequestId(name),
        model="default",
        prompt=TracedPrompt(min(prompt, LONGEST - output)),
        sampling=Sampling(max_tokens=output),
        priority=priority,
        slo=slo or Slo(),
        true_output=output,
    )


@functools.cache
def _lengths(path: Path) -> Empirical:
    return Empirical(path=path)


def flips(variant: str, offered: Turns) -> RateSearch:
    """The search of one variant on one traffic, at whatever rate."""
    return RateSearch(
        config=config_of(variant),
        at_rate=lambda rate: replace(offered, rate_per_s=rate),
        slo=offered.slo,
        low=LOW,
        high=HIGH,
    )


def work_of(offered: Turns) -> StageWork:
    """What its prompts and answers take a replica, at the promised pace."""
    assert offered.slo.tpot_s is not None
    model = step_model(ExecutorSpec(kind="modelled", gpu=CARD, tables="distserve"), shape_of(MODEL))
    pairs = [(request.prompt.num_tokens, request.true_output or 1) for _, request in offered]
    return stage_work(pairs, model, offered.slo.tpot_s, step_tokens=STEP_TOKENS)
