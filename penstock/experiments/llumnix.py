"""Llumnix: what moving running requests between replicas saves.

Source: Sun et al., Llumnix: dynamic scheduling for large language model serving (OSDI 2024); AlibabaPAI/llumnix (v1).
Its testbed was 16 A10s with LLaMA-7B; here 16 modelled ones, on conversations of the Azure trace (prompts up to 2,048
tokens) whose answers follow a power law, Poisson arrivals. Rates are shares of the rate at which dispatch by memory
alone (INFaaS++ in the paper) begins to preempt: `prepare` looks for the one where it preempts about one request in
thirteen.

    round-robin   in turns
    least-kv      the least used and wanted memory (INFaaS++)
    dispatch      the most freeness, nothing moves
    llumnix       the same, and requests move

Priorities: one request in ten is urgent; who is urgent is the same with and without headroom for them. Scaling: the
same traffic at half that rate on 4 to 16 replicas, scaled by freeness, with and without moves."""

from __future__ import annotations

import dataclasses
import functools
import math
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from penstock.core.events import Event, Finished, Reported
from penstock.core.moving import Migrated
from penstock.core.prompt import TracedPrompt
from penstock.core.rng import stream
from penstock.core.types import Request, RequestId, Sampling
from penstock.lab.experiment import (
    Experiment,
    Ratio,
    Row,
    Scale,
    Settings,
    Verdict,
    mean,
    number,
    outcome_of,
    paired,
)
from penstock.lab.simulate import simulate
from penstock.lab.trial import Finishes, deployment, read_requests
from penstock.traffic import TraceMeta
from penstock.traffic.arrivals import Poisson

MODEL, CARD, REPLICAS = "llama-3.1-8b", "a10g", 16
BLOCKS, BLOCK = 850, 16  # 13,600 tokens a replica
MAX_PROMPT, MAX_OUTPUT, MEAN_OUTPUT, TAIL = 4096, 4096, 256, 1.1
LEAST_OUTPUT = 57  # with that tail, cut off there, the mean is MEAN_OUTPUT
GB_S = 8.0  # 64 Gb/s between replicas
LOW, HIGH = 10.0, 20.0  # freeness of sources and targets, blocks a job
URGENT = 10  # one request in so many
VARIANTS: dict[str, dict[str, object]] = {
    "round-robin": {"route": "round-robin"},
    "least-kv": {"route": {"name": "llumnix", "metric": "kv_ratio"}},
    "dispatch": {"route": {"name": "llumnix", "metric": "steps"}},
    "llumnix": {
        "route": {"name": "llumnix", "metric": "steps"},
        "move": {"name": "llumnix", "headroom_blocks": 0, "low": LOW, "high": HIGH},
    },
    "llumnix, headroom": {
        "route": {"name": "llumnix", "metric": "steps"},
        "move": {"name": "llumnix", "low": LOW, "high": HIGH},
    },
}
LOADS = (0.8, 1.0, 1.2)
PREEMPTED = 0.075
FEWER, EARLIER, FASTER, SLOWER = 0.8, 3.0, 1.2, 1.05  # what the criterion asks


@functools.cache
def prompts_of(path: Path) -> tuple[int, ...]:
    found = (request.prompt.num_tokens for _, request in read_requests(path, 4096))
    return tuple(tokens for tokens in found if tokens <= MAX_PROMPT)


def output_of(uniform: float) -> int:
    """A Pareto of index TAIL from `least` on, cut off; its mean is about MEAN_OUTPUT."""
    drawn = LEAST_OUTPUT * math.pow(1 - uniform, -1 / TAIL)
    return max(1, min(MAX_OUTPUT, round(drawn)))


@dataclass(kw_only=True)
class Conversations:
    """`num` requests, Poisson."""

    path: Path
    num: int
    seed: int
    rate_per_s: float
    meta: TraceMeta = field(init=False)

    def __post_init__(self) -> None:
        self.meta = TraceMeta(f"{self.path.name}, power-law answers", "drawn", self.num, self.num)

    def __iter__(self) -> Iterator[tuple[float, Request]]:
        known = prompts_of(self.path)
        chance = stream(self.seed, "experiments", "llumnix")
        instants = Poisson(rate_per_s=self.rate_per_s).instants(self.seed)
        for place in range(self.num):
            prompt, output = known[chance.randrange(len(known))], output_of(chance.random())
            yield (
                next(instants),
                Request(
                    id=RequestId(f"talk-{place}"),
                    model="default",
                    prompt=TracedPrompt(prompt),
                    sampling=Sampling(max_tokens=MAX_OUTPUT),
                    priority=-1 if chance.randrange(URGENT) == 0 else 0,
                    true_output=output,
                ),
            )


class Books:
    """First tokens, time a later token took, preemptions, movements, and how long replicas were there."""

    def __init__(self) -> None:
        self.first_s, self.gap_s = array("d"), array("d")
        self.urgent_gap_s, self.usual_gap_s = array("d"), array("d")
        self.num_preempted = self.num_moved = 0
        self.pause_s = array("d")
        self._seen: dict[str, tuple[float, float]] = {}

    def emit(self, event: Event) -> None:
        if isinstance(event, Finished):
            self._finish(event)
        elif isinstance(event, Migrated) and event.outcome == "committed":
            self.num_moved += 1
            if event.pause_s is not None:
                self.pause_s.append(event.pause_s)
        elif isinstance(event, Reported) and event.report.is_alive:
            first, _ = self._seen.get(event.report.replica, (event.at, event.at))
            self._seen[event.report.replica] = (first, event.at)

    def _finish(self, event: Finished) -> None:
        if event.first_token_at is None or event.last_token_at is None:
            return
        self.first_s.append(event.first_token_at - event.arrived_at)
        self.num_preempted += bool(event.num_preemptions)
        if event.num_output > 1:
            gap_s = (event.last_token_at - event.first_token_at) / (event.num_output - 1)
            self.gap_s.append(gap_s)
            (self.urgent_gap_s if event.priority < 0 else self.usual_gap_s).append(gap_s)

    @property
    def replica_s(self) -> float:
        return sum(last - first for first, last in self._seen.values())


def run_one(variant: str, conversations: Conversations, **more: object) -> dict[str, object]:
    scaled = {"scale": "llumnix"} if "size" in more else {}
    config = deployment(
        {"preset": "vllm-v1", "order": "priority", **VARIANTS[variant], **scaled},
        model=MODEL,
        gpu=CARD,
        replicas=int(str(more.pop("replicas", REPLICAS))),
        cache={"num_blocks": BLOCKS, "block_size": BLOCK, "prefix": False},
        **more,
    )
    net = dataclasses.replace(config.net, latency_s=1e-4, kv_bytes_per_s=GB_S * 1e9)
    config = dataclasses.replace(config, net=net)
    books, finishes = Books(), Finishes()
    simulate(config, conversations, has_gaps=False, listeners=(books, finishes))
    return {
        "ttft_p50_s": float(np.percentile(books.first_s, 50)),
        "ttft_p99_s": float(np.percentile(books.first_s, 99)),
        "gap_p99_s": float(np.percentile(books.gap_s, 99)),
        "urgent_gap_s": float(np.mean(books.urgent_gap_s)),
        "usual_gap_s": float(np.mean(books.usual_gap_s)),
        "preempted": books.num_preempted / conversations.num,
        "num_moved": books.num_moved,
        "pause_p99_s": float(np.percentile(books.pause_s, 99)) if books.pause_s else None,
        "replica_s": books.replica_s,
        "num_finished": len(finishes.names),
        "finished": finishes.digest(),
    }


# ---------------------------------------------------------------------------- what is run


def prepare(scale: Scale) -> Settings:
    """The rate at which dispatch by memory preempts one request in thirteen."""
    path = scale.trace("azure_2023_conv.csv", "azure_2023_conv_200.csv")
    num = 1500 if scale.is_full else 400
    low, high = 4.0, 24.0
    for _ in range(6):
        rate = (low * high) ** 0.5
        found = run_one("least-kv", Conversations(path=path, num=num, seed=99, rate_per_s=rate))
        if number(found, "preempted") < PREEMPTED:
            low = rate
        else:
            high = rate
    return {"rate": round(low, 2)}


def plan(scale: Scale, prepared: Settings) -> Sequence[Settings]:
    rate, num = number(prepared, "rate"), 2000 if scale.is_full else 800
    loads = LOADS if scale.is_full else LOADS[1:2]
    runs: list[Settings] = [
        {
            "part": "load",
            "variant": variant,
            "load": load,
            "rate": rate * load,
            "num": num,
            "seed": seed,
        }
        for load in loads
        for variant in VARIANTS
        for seed in scale.seeds
    ]
    runs += [
        {
            "part": "scaling",
            "variant": variant,
            "rate": rate * low,
            "load": low,
            "num": num,
            "seed": seed,
        }
        for low in (0.5,)
        for variant in ("dispatch", "llumnix")
        for seed in scale.seeds
    ]
    return runs


def work(settings: Settings, scale: Scale) -> Mapping[str, object]:
    path = scale.trace("azure_2023_conv.csv", "azure_2023_conv_200.csv")
    conversations = Conversations(
        path=path,
        num=int(number(settings, "num")),
        seed=int(number(settings, "seed")),
        rate_per_s=number(settings, "rate"),
    )
    if settings["part"] == "load":
        return run_one(str(settings["variant"]), conversations)
    return run_one(
        str(settings["variant"]),
        conversations,
        replicas=REPLICAS,
        size={"least": 4, "most": REPLICAS},
    )


# ---------------------------------------------------------------------------- judging


def judge(rows: Sequence[Row]) -> Verdict:
    loads = sorted({row.number("load") for row in rows if row.get("part") == "load"})
    ratios = [ratio for load in loads for ratio in _at_load(rows, load)]
    best_at = max(loads, key=lambda load: mean(_earlier(rows, load, "llumnix")))
    best, fewer = _earlier(rows, best_at, "llumnix"), _fewer(rows, best_at)
    urgent, usual = _priorities(rows, loads[-1])
    moved, still = ({"part": "scaling", "variant": each} for each in ("llumnix", "dispatch"))
    cost = paired(rows, "replica_s", moved, still)
    ratios += [
        Ratio(
            name="priorities: urgent decode, without / with headroom",
            values=urgent,
            published="1.5",
        ),
        Ratio(name="priorities: usual decode, with / without headroom", values=usual),
        Ratio(name="scaling: replica-seconds, with / without moves", values=cost, published="0.64"),
        Ratio(
            name="scaling: P99 TTFT, with / without moves",
            values=paired(rows, "ttft_p99_s", moved, still),
        ),
    ]
    checks = [
        (
            mean(best) >= EARLIER,
            f"at load {best_at:g} P99 TTFT {mean(best):.2f}x better than by memory",
        ),
        (mean(fewer) >= FEWER, f"{mean(fewer):.0%} of preemptions gone there"),
        (
            mean(urgent) >= FASTER and mean(usual) <= SLOWER,
            f"urgent decodes {mean(urgent):.2f}x faster with headroom, usual ones {mean(usual):.2f}x as long",
        ),
    ]
    pauses = [row.number("pause_p99_s") for row in rows if row.get("variant") == "llumnix"]
    why = "; ".join(told for _, told in checks)
    why += f". Pauses of moved requests: P99 {mean(pauses) * 1e3:.0f} ms"
    why += f". Replica-seconds with moves {mean(cost):.2f} of those without"
    return Verdict(
        outcome=outcome_of(sum(held for held, _ in checks), 3), why=why, ratios=tuple(ratios)
    )


def _at_load(rows: Sequence[Row], load: float) -> list[Ratio]:
    found = [
        Ratio(
            name=f"load {load:g}: P99 TTFT, least-kv / {variant}",
            values=_earlier(rows, load, variant),
            published="up to 15" if variant == "llumnix" else "",
        )
        for variant in ("round-robin", "dispatch", "llumnix")
    ]
    return [
        *found,
        Ratio(name=f"load {load:g}: preemptions gone", values=_fewer(rows, load), unit=""),
    ]


def _earlier(rows: Sequence[Row], load: float, variant: str) -> tuple[float, ...]:
    at = {"part": "load", "load": load}
    return paired(rows, "ttft_p99_s", {**at, "variant": "least-kv"}, {**at, "variant": variant})


def _priorities(rows: Sequence[Row], load: float) -> tuple[tuple[float, ...], tuple[float, ...]]:
    """How much faster urgent requests decode with headroom for them, and how much longer usual ones take."""
    without = {"part": "load", "load": load, "variant": "llumnix"}
    having = {**without, "variant": "llumnix, headroom"}
    urgent = paired(rows, "urgent_gap_s", without, having)
    return urgent, paired(rows, "usual_gap_s", having, without)


def _fewer(rows: Sequence[Row], load: float) -> tuple[float, ...]:
    at = {"part": "load", "load": load}
    left = paired(rows, "preempted", {**at, "variant": "llumnix"}, {**at, "variant": "least-kv"})
    return tuple(1 - share for share in left)


EXPERIMENT = Experiment(
    name="llumnix",
    system="Llumnix: running requests move between replicas",
    source="Llumnix (OSDI 2024), AlibabaPAI/llumnix v1",
    claim="Against dispatch by memory (INFaaS++): P99 first tokens up to 15 times earlier (7.7 in the mean), urgent "
    "requests 1.5 times faster, 36 % fewer replicas at the same P99.",
    criterion=f"At the load where it helps most: P99 TTFT at least {EARLIER:g} times better than by memory and "
    f"{FEWER:.0%} of preemptions gone; with headroom urgent decodes {FASTER:g} times faster and usual ones at most "
    f"{SLOWER:g} times as long.",
    workload=f"{REPLICAS} replicas; Azure conversation prompts up to {MAX_PROMPT:,} tokens, power-law answers of mean "
    f"{MEAN_OUTPUT}, Poisson at {', '.join(f'{load:g}' for load in LOADS)} of the rate at which dispatch by memory "
    f"preempts {PREEMPTED:.1%} of the requests; one in {URGENT} urgent.",
    constants=(
        ("KV memory", f"{BLOCKS * BLOCK:,} tokens a replica in blocks of {BLOCK}, no prefix cache"),
        ("between replicas", f"{GB_S:g} GB/s each way, 0.1 ms; reports every 0.1 s"),
        ("SIMULATED", f"{MODEL} on modelled {CARD}s; scheduler time from the stored profile"),
    ),
    prepare=prepare,
    plan=plan,
    work=work,
    judge=judge,
    traces=("azure_2023_conv.csv",),
    compares_schedulers=False,
)
