"""FlowPrefill: prompts interrupted at operators, against chunks of any size and against no preemption.

Source: FlowPrefill (HSIEHCHIACHI/FlowPrefill, commit 1ca0fec, on vLLM 0.11; abstract: up to 5.6 times the goodput).
Their trace and cards are not here. What stands in: one modelled A100-80G that prefills Llama-3.1-8B for a
prefill-decode pair, so every request asks for one token; four classes of theirs with their promises, 62, 13, 20 and
5 % of the requests

    text    LMSYS prompts                       first token within 0.25 s
    image   600 to 1,200 tokens                 0.5 s
    search  Azure conversation prompts          4 s     (they: code prompts, which are not here)
    file    Mooncake prompts, up to 32,000      6 s

Poisson arrivals. Max goodput is the highest rate at which 90 % of the requests, or of every class, keep their
promise, where a straight line between two rates, 1.3 times apart, crosses it. All variants order by S-EDF; "filled"
gives the rest of a chunk to the next prompts as vLLM does, and "head only" runs one prompt at a time in chunks, with
short ones beside it as FlowPrefill has them. Everything hangs on what a small chunk costs, which is the roofline's
(cost.roofline).
That a real forward stops within two operators, resumes bit for bit and pays under 2 % for being able to is measured on
the engine: `python benchmarks/preemption.py`, tests/engine/torch.
"""

from __future__ import annotations

import csv
import functools
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from penstock.assemble import Config
from penstock.core.prompt import TracedPrompt
from penstock.core.rng import stream
from penstock.core.types import Request, RequestId, Sampling, Slo
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
)
from penstock.lab.trial import SCHEDULERS, deployment, trial
from penstock.traffic import TraceMeta
from penstock.traffic.arrivals import Poisson

if TYPE_CHECKING:
    from matplotlib.figure import Figure

FILES = ("lmsys_lengths.csv", "azure_2023_conv.csv", "mooncake_conversation.jsonl")
CLASSES = (("text", 0.62, 0.25), ("image", 0.13, 0.5), ("search", 0.20, 4.0), ("file", 0.05, 6.0))
LONGEST = 32_000
RATES = tuple(round(1.0 * 1.3**step, 3) for step in range(16))  # 1 to 51 requests a second
WHOLE = 1 << 15
EDF = {"preset": "vllm-v1", "order": "slack-edf"}
VARIANTS: dict[str, dict[str, object]] = {
    **SCHEDULERS,
    "no preemption": {
        "preset": "flow-prefill",
        "batch": {"name": "flow-prefill", "max_tokens": WHOLE, "max_suspended": 0},
    },
    "filled 8192": {**EDF, "batch": {"name": "vllm-v1", "max_tokens": 8192}},
    "filled 1024": {**EDF, "batch": {"name": "vllm-v1", "max_tokens": 1024}},
    "head 8192": {
        "preset": "flow-prefill",
        "batch": {"name": "flow-prefill", "max_tokens": 8192, "max_suspended": 0},
    },
    "head 2048": {
        "preset": "flow-prefill",
        "batch": {"name": "flow-prefill", "max_tokens": 2048, "max_suspended": 0},
    },
    "head 512": {
        "preset": "flow-prefill",
        "batch": {"name": "flow-prefill", "max_tokens": 512, "max_suspended": 0},
    },
    "flow-prefill": {"preset": "flow-prefill"},
}
QUICK = (*SCHEDULERS, "no preemption", "head 2048", "flow-prefill")
CHUNKED = ("vllm-512", "s-edf", "filled 1024", "filled 8192", "head 512", "head 2048", "head 8192")
KEPT = 0.9
OVER_WHOLE, OVER_CHUNKS = 4.0, 1.4  # what the criterion asks, of every class


@dataclass(kw_only=True)
class Prompts:
    """`num` requests of the four classes, Poisson at `rate_per_s`."""

    folder: Path | None
    num: int
    seed: int
    rate_per_s: float
    meta: TraceMeta = field(init=False)

    def __post_init__(self) -> None:
        self.meta = TraceMeta("four classes", "drawn", self.num, self.num)

    def __iter__(self) -> Iterator[tuple[float, Request]]:
        chance = stream(self.seed, "experiments", "flow-prefill")
        instants = Poisson(rate_per_s=self.rate_per_s).instants(self.seed)
        for place, at in enumerate(islice(instants, self.num)):
            drawn, kind, promise = chance.random(), "file", CLASSES[-1][2]
            for name, share, ttft_s in CLASSES:
                drawn -= share
                if drawn < 0:
                    kind, promise = name, ttft_s
                    break
            yield (
                at,
                Request(
                    id=RequestId(f"{kind}-{place}"),
                    model="default",
                    prompt=TracedPrompt(self._tokens(kind, chance.random())),
                    sampling=Sampling(max_tokens=1),
                    slo=Slo(ttft_s=promise),
                    tenant=kind,
                    true_output=1,
                ),
            )

    def _tokens(self, kind: str, u: float) -> int:
        if kind == "image":
            return 600 + round(600 * u)
        if self.folder is None:  # the means of the three, each spread over a factor of four
            typical = {"text": 92, "search": 1155, "file": 12_000}[kind]
            return min(LONGEST, round(typical * (0.4 + 1.2 * u)))
        found = prompts_of(self.folder, {"text": 0, "search": 1, "file": 2}[kind])
        return found[int(u * len(found))]


@functools.cache
def prompts_of(folder: Path, which: int) -> tuple[int, ...]:
    path = folder / "traces" / FILES[which]
    with path.open(newline="") as file:
        if path.suffix == ".jsonl":
            sizes = [int(json.loads(line)["input_length"]) for line in file]
        else:
            sizes = [int(row["ContextTokens"]) for row in islice(csv.DictReader(file), 20_000)]
    return tuple(min(LONGEST, max(1, size)) for size in sizes)


def plan(scale: Scale, prepared: Settings) -> Sequence[Settings]:
    rates = RATES if scale.is_full else RATES[1::2]
    names = VARIANTS if scale.is_full else QUICK
    return [
        {
            "variant": variant,
            "rate_per_s": rate,
            "num": 1000 if scale.is_full else 500,
            "seed": seed,
        }
        for rate in rates
        for variant in names
        for seed in scale.seeds
    ]


def made(variant: str) -> Config:
    return deployment(VARIANTS[variant])


def work(settings: Settings, scale: Scale) -> Mapping[str, object]:
    offered = Prompts(
        folder=scale.data,
        num=int(number(settings, "num")),
        seed=int(number(settings, "seed")),
        rate_per_s=number(settings, "rate_per_s"),
    )
    return trial(made(str(settings["variant"])), offered)


def most(rows: Sequence[Row], variant: str, seed: int, figure: str) -> float:
    """The highest rate before the share that keeps its promise first falls below KEPT; the lowest rate when none does.

    Between the last rate that keeps it and the first that does not, the share is taken as a line."""
    here = [row for row in rows if row.fits({"variant": variant, "seed": seed})]
    here.sort(key=lambda row: row.number("rate_per_s"))
    best, before = here[0].number("rate_per_s"), 1.0
    for row in here:
        share, rate = row.number(figure), row.number("rate_per_s")
        if share < KEPT:
            if before > KEPT and rate > best:
                return best + (rate - best) * (before - KEPT) / (before - share)
            return best
        best, before = rate, share
    return best


def judge(rows: Sequence[Row]) -> Verdict:
    """Against no preemption, and against the best of the chunk sizes, seed by seed."""
    seeds = sorted({int(row.number("seed")) for row in rows})
    names = sorted({str(row.get("variant")) for row in rows})
    chunked = [name for name in CHUNKED if name in names]
    ratios: list[Ratio] = []
    means: dict[str, tuple[float, float]] = {}
    for figure, label in (("attainment", "by count"), ("worst_class", "every class")):
        rates = {name: [most(rows, name, seed, figure) for seed in seeds] for name in names}
        for name in names:
            means[name] = (*means.get(name, ()), mean(rates[name]))[:2]
        ours, whole = rates["flow-prefill"], rates["no preemption"]
        chunks = [max(rates[name][at] for name in chunked) for at in range(len(seeds))]
        over_whole = tuple(a / b for a, b in zip(ours, whole, strict=True))
        over_chunks = tuple(a / b for a, b in zip(ours, chunks, strict=True))
        ratios.append(Ratio(name=f"{label}: max rate over no preemption", values=over_whole))
        ratios.append(Ratio(name=f"{label}: max rate over the best chunks", values=over_chunks))
    held = (mean(ratios[2].values) >= OVER_WHOLE) + (mean(ratios[3].values) >= OVER_CHUNKS)
    told = ", ".join(f"{name} {means[name][0]:.1f} / {means[name][1]:.1f}" for name in names)
    why = f"{held} of 2 hold; max requests a second by count / of every class: {told}"
    return Verdict(outcome=outcome_of(held, 2), why=why, ratios=tuple(ratios))


def draw(rows: Sequence[Row], figure: Figure) -> None:
    axes = figure.subplots(1, 2, sharey=True)
    for ax, name, label in zip(
        axes, ("attainment", "worst_class"), ("all requests", "the worst class"), strict=True
    ):
        for variant in ("no preemption", "filled 1024", "head 2048", "head 512", "flow-prefill"):
            here = [row for row in rows if row.fits({"variant": variant})]
            rates = sorted({row.number("rate_per_s") for row in here})
            values = [
                mean([row.number(name) for row in here if row.number("rate_per_s") == rate])
                for rate in rates
            ]
            ax.plot(rates, values, marker=".", label=variant)
        ax.axhline(KEPT, color="grey", linewidth=0.8)
        ax.set_xscale("log")
        ax.set_xlabel("requests a second")
        ax.set_title(label)
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("share that keeps its promise")
    axes[0].legend()


EXPERIMENT = Experiment(
    name="flow-prefill",
    system="FlowPrefill",
    source="FlowPrefill (HSIEHCHIACHI/FlowPrefill)",
    claim="Prompts that are interrupted at operators serve more requests within their promises than prompts in chunks "
    "of any size (published: up to 5.6 times the goodput).",
    criterion=f"Highest rate at which {KEPT:.0%} of every class keep their promise: at least {OVER_WHOLE:g} times that "
    f"without preemption and {OVER_CHUNKS:g} times that of the best chunk size.",
    workload="Four classes of prompts (text 62 %, image 13 %, search 20 %, file 5 %), first tokens promised within "
    "0.25, 0.5, 4 and 6 s, one token each, Poisson.",
    constants=(
        ("model", "Llama-3.1-8B, bf16, tensor parallel 1"),
        ("card", "A100-80G, prefill only"),
    ),
    traces=FILES,
    plan=plan,
    work=work,
    judge=judge,
    draw=draw,
)
