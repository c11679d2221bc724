"""ElasticMoE: devices that join a running replica, against another replica and a restart, behind a step in load.

Source: ElasticMoE (arXiv:2510.02613), its table of scale times from DP3 to DP4 and its claim of scaling up to nine
times faster than the best baseline. There is no code.

What cannot be repeated: 384 Ascend 910C with an interconnect between memories. A modelled replica divides its steps
over A100s (cost.divided), Qwen3-30B-A3B stands for the paper's mixtures, and the scale times are those of the table:

    elastic           2.43 s beside serving, then two devices more
    horizontal        another replica of two devices after 62.78 s, an engine that was not initialised before
    horizontal-fast   the same after 22 s: nine times the elastic time, the best baseline of the claim
    restart           67.40 s without service, then two devices more; what it held is not lost here, as it would be

All ask the same estimator (scale "elastic"), and end with four devices. Requests are Azure's conversations, in time
when TTFT and TPOT are at most 1 s; judged are those that arrive within 120 s of the step. KV memory does not grow
with the devices of one replica, while another replica brings its own: that favours the baselines.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.core.events import Event, Served
from penstock.core.prompt import TracedPrompt
from penstock.core.reshaping import Reshaped
from penstock.core.rng import stream
from penstock.core.types import Request, RequestId
from penstock.lab.experiment import (
    Experiment,
    Ratio,
    Row,
    Scale,
    Settings,
    Verdict,
    by_seed,
    mean,
    number,
    outcome_of,
    paired,
)
from penstock.lab.simulate import simulate
from penstock.lab.trial import SCHEDULERS, Finishes, deployment, read_requests, served_per_s
from penstock.traffic import TraceMeta

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from penstock.assemble.config import Config

TRACE, SAMPLE = "azure_2023_conv.csv", "azure_2023_conv_200.csv"
MODEL, CARD, DEVICES, MORE = "qwen3-30b-a3b", "a100-80g", 2, 2
BLOCKS = 40_000  # of 16 tokens: memory is not what the step runs into
BEFORE, AFTER = 0.5, 1.5  # of what two devices serve at saturation
STEP_AT_S, WATCHED_S = 30.0, 120.0
TTFT_S = TPOT_S = 1.0
SCALE_S = {"elastic": 2.43, "horizontal": 62.78, "horizontal-fast": 22.0, "restart": 67.40}
NUM_AT_ONCE = 1500
FEWER = 3.0  # times the missed requests of the elastic replica


@dataclass(kw_only=True)
class StepLoad:
    """Requests of a trace, drawn with replacement, at one rate and from STEP_AT_S on at another."""

    trace: Path
    rates: tuple[float, float]
    seed: int
    meta: TraceMeta = field(init=False)

    def __post_init__(self) -> None:
        self.meta = TraceMeta(str(self.trace), "step")

    def __iter__(self) -> Iterator[tuple[float, Request]]:
        chance, at = stream(self.seed, "experiments", "elastic-moe"), 0.0
        for place, request in enumerate(drawn(self.trace, self.seed)):
            at += chance.expovariate(self.rates[at >= STEP_AT_S])
            if at > STEP_AT_S + WATCHED_S:
                return
            yield at, request
            self.meta.rows_read = self.meta.rows_kept = place + 1
            self.meta.last_at_s = at


@dataclass(kw_only=True)
class AtOnce:
    """`num` of them at 0 s."""

    trace: Path
    num: int
    meta: TraceMeta = field(init=False)

    def __post_init__(self) -> None:
        self.meta = TraceMeta(str(self.trace), "at once", self.num, self.num)

    def __iter__(self) -> Iterator[tuple[float, Request]]:
        return ((0.0, request) for request in islice(drawn(self.trace, 0), self.num))


def drawn(trace: Path, seed: int) -> Iterator[Request]:
    rows = [request for _, request in read_requests(trace, 4096)]
    chance = stream(seed, "experiments", "elastic-moe", "requests")
    for place in itertools.count():
        one = rows[chance.randrange(len(rows))]
        prompt = TracedPrompt(one.prompt.num_tokens)
        yield dataclasses.replace(one, id=RequestId(f"r{place}"), prompt=prompt)


class Missed:
    """Counts the requests that arrived behind the step, and those of them that were late."""

    def __init__(self) -> None:
        self.num = self.late = self.before = self.changes = 0

    def emit(self, event: Event) -> None:
        if isinstance(event, Reshaped):
            self.changes += not event.error
        if not isinstance(event, Served):
            return
        is_late = event.ttft_s is None or event.is_refused or event.ttft_s > TTFT_S
        if event.ttft_s is not None and event.num_output > 1:
            rest_s = event.at - event.arrived_at - event.ttft_s
            is_late |= rest_s / (event.num_output - 1) > TPOT_S
        if event.arrived_at < STEP_AT_S:
            self.before += is_late
        else:
            self.num, self.late = self.num + 1, self.late + is_late


def fleet(variant: str) -> Config:
    scale_s, is_more = SCALE_S[variant], variant.startswith("horizontal")
    executor: dict[str, Any] = {"expert_devices": DEVICES, "reshape_s": scale_s}
    executor["reshape_stops"] = variant == "restart"
    policy = {
        "name": "elastic",
        "ttft_s": TTFT_S,
        "step": MORE,
        "least_devices": DEVICES,
        "most_devices": DEVICES + MORE,
        "adds": "replicas" if is_more else "devices",
    }
    more: dict[str, Any] = {}
    if is_more:
        executor["start_s"] = scale_s
        more["size"] = {"least": 1, "most": 2}
    found = deployment(
        {**SCHEDULERS["vllm-2048"], "route": "least", "scale": policy},
        model=MODEL,
        gpu=CARD,
        cache__num_blocks=BLOCKS,
        **{f"executor__{name}": value for name, value in executor.items()},
        **more,
    )
    return found


def prepare(scale: Scale) -> Settings:
    """What two devices serve a second at saturation."""
    config = deployment(
        SCHEDULERS["vllm-2048"],
        model=MODEL,
        gpu=CARD,
        cache__num_blocks=BLOCKS,
        executor__expert_devices=DEVICES,
    )
    return {
        "rate_per_s": round(
            served_per_s(config, AtOnce(trace=scale.trace(TRACE, SAMPLE), num=NUM_AT_ONCE)), 2
        )
    }


def plan(scale: Scale, prepared: Settings) -> Sequence[Settings]:
    return [
        {"variant": variant, "rate_per_s": number(prepared, "rate_per_s"), "seed": seed}
        for variant in SCALE_S
        for seed in scale.seeds
    ]


def work(settings: Settings, scale: Scale) -> Mapping[str, object]:
    rate = number(settings, "rate_per_s")
    load = StepLoad(
        trace=scale.trace(TRACE, SAMPLE),
        rates=(BEFORE * rate, AFTER * rate),
        seed=int(number(settings, "seed")),
    )
    missed, finishes = Missed(), Finishes()
    found = simulate(fleet(str(settings["variant"])), load, listeners=(missed, finishes))
    return {
        "missed": missed.late,
        "attainment": 1 - missed.late / max(1, missed.num),
        "missed_before": missed.before,
        "num_watched": missed.num,
        "num_changes": missed.changes,
        "num_finished": found.figures.all.num_finished,
        "finished": finishes.digest(),
    }


def judge(rows: Sequence[Row]) -> Verdict:
    ratios = []
    for variant in ("horizontal", "horizontal-fast", "restart"):
        values = paired(rows, "missed", {"variant": variant}, {"variant": "elastic"})
        ratios.append(Ratio(name=f"missed requests, {variant} / elastic", values=values))
    share = {each: mean(by_seed(rows, "attainment", variant=each).values()) for each in SCALE_S}
    held = mean(ratios[0].values) >= FEWER
    told = ", ".join(f"{each} {value:.1%}" for each, value in share.items())
    return Verdict(
        outcome=outcome_of(int(held), 1),
        why=f"in time of those that came within {WATCHED_S:g} s of the step: {told}",
        ratios=tuple(ratios),
    )


def draw(rows: Sequence[Row], figure: Figure) -> None:
    ax = figure.subplots()
    for place, variant in enumerate(SCALE_S):
        values = list(by_seed(rows, "attainment", variant=variant).values())
        ax.scatter([place] * len(values), [100 * each for each in values])
    ax.set_xticks(range(len(SCALE_S)), list(SCALE_S))
    ax.set_ylabel("requests in time, %")
    ax.grid(alpha=0.3)


EXPERIMENT = Experiment(
    name="elastic-moe",
    system="ElasticMoE: devices join a running replica",
    source="ElasticMoE, arXiv:2510.02613, table of scale times; no code",
    claim="A replica that takes devices in while it serves keeps its promises through a step in load that costs "
    "another replica, or a restart, many requests.",
    criterion=f"A new replica after {SCALE_S['horizontal']:g} s misses at least {FEWER:g} times as many requests "
    f"within {WATCHED_S:g} s of the step.",
    workload=f"Azure conversations, Poisson at {BEFORE:g} and from {STEP_AT_S:g} s on {AFTER:g} times what two devices "
    f"serve at saturation; TTFT and TPOT {TTFT_S:g} s.",
    constants=(
        ("scale times", ", ".join(f"{name} {value:g} s" for name, value in SCALE_S.items())),
        ("KV memory of a replica", f"{BLOCKS:,} blocks of 16 tokens, whatever its devices"),
        ("devices", f"{DEVICES} {CARD}, and {MORE} more"),
    ),
    compares_schedulers=False,
    prepare=prepare,
    plan=plan,
    work=work,
    judge=judge,
    draw=draw,
)
