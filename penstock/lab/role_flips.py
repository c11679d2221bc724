"""Replicas in fixed roles and in roles that follow the load, where prompts or answers are the larger part of the work.

    code        lengths of Azure's code trace (long prompts, short answers), in bursts
    conv        Azure's conversations with their own arrivals, stretched
    shift       the one, then the other

The highest mean rate is sought at which enough answers keep both promises; OPT-13B with the step times that DistServe
published (cost.linear_five), keys and values over modelled wires.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path

from penstock.assemble import Config, load_config
from penstock.core.prompt import TracedPrompt
from penstock.core.types import Request, RequestId, Sampling, Slo
from penstock.lab.highest_rate import Kept, highest_rate
from penstock.lab.simulate import simulate
from penstock.lab.trial import Finishes, Offered
from penstock.traffic import TraceMeta
from penstock.traffic.arrivals import OnOff
from penstock.traffic.lengths import Empirical

REPLICAS = 8
MODEL, CARD, TABLES = "opt-13b", "a100-80g", "distserve"
LONGEST = 2048  # positions of the model
KV_BYTES_S = 200e9  # of a replica's wire; NVLink of the card, two thirds of it
ON_S, OFF_S = 10.0, 20.0  # of bursts: what the published piece of the code trace looks like
STEP = 1.1
LOW, HIGH = 8, 38  # places on the grid of rates: 2.1 to 37 a second
WANTED = 0.9
BATCH: dict[str, object] = {"name": "vllm-v1", "max_tokens": 2048}


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
    fleet: dict[str, object] = {
        "name": "default",
        "replicas": REPLICAS,
        "roles": roles,
        "executor": {"kind": "modelled", "gpu": CARD, "tables": TABLES},
        "cache": {"prefix": False},
        "policy": policy,
    }
    flags: dict[str, object] = {f"fleet.0.{name}": told for name, told in fleet.items()}
    return load_config(model=MODEL, flags={**flags, "net.kv_bytes_per_s": KV_BYTES_S})


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
                yield at, self._request(place, prompt, output)
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

    def _request(self, place: int, prompt: int, output: int) -> Request:
        output = min(output, LONGEST // 2)
        return Request(
            id=RequestId(str(place)),
            model="default",
            prompt=TracedPrompt(min(prompt, LONGEST - output)),
            sampling=Sampling(max_tokens=output),
            slo=self.slo,
            true_output=output,
        )


@functools.cache
def _lengths(path: Path) -> Empirical:
    return Empirical(path=path)


@dataclass
class Flips:
    """The search of one variant on one traffic."""

    variant: str
    offered: Turns
    digest: str = ""
    cost_model: str = ""
    _known: dict[int, Kept] = field(default_factory=dict)

    def kept(self, place: int) -> Kept:
        found = self._known.get(place)
        if found is None:
            finishes, found = Finishes(), Kept()
            offered = replace(self.offered, rate_per_s=STEP**place)
            simulated = simulate(
                config_of(self.variant), offered, has_gaps=False, listeners=(finishes, found)
            )
            self.digest, self.cost_model = finishes.digest(), simulated.sources[0].cost_model
            self._known[place] = found
        return found

    def attained(self, place: int) -> float:
        slo = self.offered.slo
        assert slo.ttft_s is not None and slo.tpot_s is not None
        return self.kept(place).attainment(slo.ttft_s, slo.tpot_s)

    def highest(self) -> float:
        return highest_rate(self.attained, low=LOW, high=HIGH, step=STEP, wanted=WANTED)

    def figures(self) -> Mapping[str, object]:
        rate = self.highest()
        return {"rate": rate, "finished": self.digest, "cost_model": self.cost_model}
