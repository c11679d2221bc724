"""Layered prefill: prompts through groups of layers against chunks of tokens, on a mixture and on a dense model.

Source: "From Tokens to Layers" (scale-snu/layered-prefill, commit 427f441; its README: Qwen3-30B-A3B on two H100, arXiv
summaries at 1.5 requests a second, mean TTFT 1,019 to 713 ms, TPOT 19.7 to 15.1 ms, against vLLM 0.10.2 at 512 tokens).

What stands in for the original: the modelled shape of Qwen3-30B-A3B on two H100-80G, whose steps load as many experts
of a layer as their rows are expected to reach (cost.coverage), and lengths of arXiv summaries from vidur's file, their
prompts 3.55 times as long so that they have the published mean of 9.2 thousand tokens. Qwen3-8B on one H100 is the
dense model. Loads are shares of what vLLM at 512 tokens serves. That a real mixture of experts loads fewer experts when
its prompts pass by groups, and computes the same, is a test of the engine (tests/engine/torch/test_layered.py).
"""

from __future__ import annotations

import csv
import functools
import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from penstock.assemble import Config
from penstock.core.prompt import TracedPrompt
from penstock.core.types import Request, RequestId, Sampling, Slo
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
from penstock.lab.trial import SCHEDULERS, STRETCHES, deployment, served_per_s, trial
from penstock.traffic import TraceMeta
from penstock.traffic.arrivals import Poisson

if TYPE_CHECKING:
    from matplotlib.figure import Figure

LENGTHS = "arxiv_summarization_lengths.csv"
LONGER, MOST_PROMPT, MOST_OUTPUT = 3.55, 32_000, 2048
TYPICAL = (9200, 290)  # of the published workload; taken for all rows where the file is absent
MODELS: dict[str, dict[str, object]] = {
    "moe": {"model": "qwen3-30b-a3b", "gpu": "h100", "executor__tensor_parallel": 2},
    "dense": {"model": "qwen3-8b", "gpu": "h100"},
}
VARIANTS = SCHEDULERS | {"layered": {"preset": "layered"}}
LOADS = (0.5, 0.7, 0.9)
LONG = 8000  # prompt tokens of the second class
FEWER, TAIL = 0.8, 0.65  # what the criterion asks


@dataclass(kw_only=True)
class Prompts:
    """`num` requests with lengths of the file, Poisson arrivals at `rate_per_s` in the mean; None: all at once."""

    path: Path | None
    num: int
    seed: int
    rate_per_s: float | None
    meta: TraceMeta = field(init=False)

    def __post_init__(self) -> None:
        self.meta = TraceMeta(LENGTHS, "lengths", self.num, self.num)

    def __iter__(self) -> Iterator[tuple[float, Request]]:
        lengths = (TYPICAL,) * self.num if self.path is None else read_lengths(self.path)
        start = self.seed % STRETCHES * (len(lengths) - self.num) // (STRETCHES - 1)
        instants: Iterator[float] = itertools.repeat(0.0)
        if self.rate_per_s is not None:
            instants = Poisson(rate_per_s=self.rate_per_s).instants(self.seed)
        rows = zip(instants, lengths[start : start + self.num], strict=False)
        for place, (at, (prompt, output)) in enumerate(rows):
            yield (
                at,
                Request(
                    id=RequestId(f"arxiv-{start + place}"),
                    model="default",
                    prompt=TracedPrompt(prompt),
                    sampling=Sampling(max_tokens=MOST_OUTPUT),
                    slo=Slo(ttft_s=2.0 if prompt <= LONG else 6.0, tpot_s=0.05),
                    true_output=output,
                ),
            )


@functools.cache
def read_lengths(path: Path) -> tuple[tuple[int, int], ...]:
    """(prompt, output) tokens, prompts made longer."""
    with path.open(newline="") as file:
        rows = csv.DictReader(file)
        return tuple(
            (
                min(MOST_PROMPT, round(LONGER * int(row["num_prefill_tokens"]))),
                min(MOST_OUTPUT, max(1, int(row["num_decode_tokens"]))),
            )
            for row in islice(rows, 20_000)
        )


def offered(scale: Scale, seed: int, rate_per_s: float | None) -> Prompts:
    path = None if scale.data is None else scale.data / "traces" / LENGTHS
    num = 600 if scale.is_full else 150
    return Prompts(path=path, num=num, seed=seed, rate_per_s=rate_per_s)


def made(model: str, variant: str) -> Config:
    return deployment(VARIANTS[variant], **MODELS[model])  # type: ignore[arg-type]


def prepare(scale: Scale) -> Settings:
    """Saturation of vLLM at 512 tokens a step on each model, requests a second."""
    found = {}
    for model in MODELS:
        rate = served_per_s(made(model, "vllm-512"), offered(scale, 0, None))
        found[model] = round(rate, 3)
    return found


def plan(scale: Scale, prepared: Settings) -> Sequence[Settings]:
    loads = LOADS if scale.is_full else LOADS[1:2]
    return [
        {
            "variant": variant,
            "model": model,
            "load": load,
            "rate_per_s": round(load * number(prepared, model), 4),
            "seed": seed,
        }
        for model in MODELS
        for load in loads
        for variant in VARIANTS
        for seed in scale.seeds
    ]


def work(settings: Settings, scale: Scale) -> Mapping[str, object]:
    rate_per_s, seed = number(settings, "rate_per_s"), int(number(settings, "seed"))
    config = made(str(settings["model"]), str(settings["variant"]))
    return trial(config, offered(scale, seed, rate_per_s))


def judge(rows: Sequence[Row]) -> Verdict:
    """Both faster on the mixture, the tail beside chunks of 2,048, and slower on the dense model, at every load."""
    ratios: list[Ratio] = []
    failed: list[str] = []
    loads = sorted({row.number("load") for row in rows})
    for load in loads:
        moe = {"model": "moe", "load": load}
        ours, small, large = ({"variant": v, **moe} for v in ("layered", "vllm-512", "vllm-2048"))
        first = paired(rows, "ttft_mean_s", ours, small)
        gaps = paired(rows, "tpot_mean_s", ours, small)
        tail = paired(rows, "itl_p99_s", ours, large)
        later = paired(rows, "ttft_mean_s", ours, large)
        dense = paired(
            rows,
            "ttft_mean_s",
            {"variant": "layered", "model": "dense", "load": load},
            {"variant": "vllm-512", "model": "dense", "load": load},
        )
        told = (
            ("mean TTFT, layered / 512", first, mean(first) <= FEWER),
            ("mean TPOT, layered / 512", gaps, mean(gaps) <= FEWER),
            ("P99 gap, layered / 2,048", tail, mean(tail) <= TAIL),
            ("mean TTFT, layered / 2,048", later, True),
            ("dense: mean TTFT, layered / 512", dense, mean(dense) > 1.0),
        )
        for name, values, is_met in told:
            ratios.append(Ratio(name=f"load {load}: {name}", values=values))
            if not is_met:
                failed.append(f"{name} at {load}")
    num = 4 * len(loads)
    held = num - len(failed)
    why = f"{held} of {num} hold" + (f" (not: {'; '.join(failed)})" if failed else "")
    rates = [f"{name} {figure(rows, name):.2f} s" for name in VARIANTS]
    why += f"; mean TTFT on the mixture at {loads[len(loads) // 2]}: {', '.join(rates)}"
    return Verdict(outcome=outcome_of(held, num), why=why, ratios=tuple(ratios))


def figure(rows: Sequence[Row], variant: str) -> float:
    """Mean TTFT over seeds at the middle load."""
    loads = sorted({row.number("load") for row in rows})
    where = {"variant": variant, "model": "moe", "load": loads[len(loads) // 2]}
    return mean(by_seed(rows, "ttft_mean_s", **where).values())


def draw(rows: Sequence[Row], figure: Figure) -> None:
    axes = figure.subplots(1, 2)
    for ax, name, label in zip(
        axes, ("ttft_mean_s", "itl_p99_s"), ("mean TTFT, s", "P99 gap, s"), strict=True
    ):
        for variant in VARIANTS:
            here = [row for row in rows if row.fits({"variant": variant, "model": "moe"})]
            loads = sorted({row.number("load") for row in here})
            values = [
                [row.number(name) for row in here if row.number("load") == load] for load in loads
            ]
            ax.plot(loads, [mean(each) for each in values], marker="o", label=variant)
            ax.fill_between(loads, [min(v) for v in values], [max(v) for v in values], alpha=0.15)
        ax.set_xlabel("load, share of what vLLM at 512 tokens serves")
        ax.set_ylabel(label)
        ax.set_yscale("log")
        ax.grid(alpha=0.3)
    axes[0].legend()


EXPERIMENT = Experiment(
    name="layered",
    system="Layered prefill",
    source="From Tokens to Layers (scale-snu/layered-prefill)",
    claim="On a mixture of experts, prompts that pass by groups of layers get first tokens and later ones sooner than "
    "in chunks of tokens (published: TTFT -30 %, TPOT -23 %); on a dense model they do not.",
    criterion="At every load: mean TTFT and mean TPOT at most 0.8 times those of chunks of 512 tokens, P99 gap at most "
    "0.65 times that of chunks of 2,048, and on the dense model a later first token than with 512.",
    workload="Lengths of arXiv summaries, prompts 3.55 times as long (mean 9.2 thousand tokens), Poisson; two classes "
    f"by prompt length (up to {LONG}: TTFT 2 s, longer: 6 s; TPOT 0.05 s).",
    constants=(
        ("mixture", "Qwen3-30B-A3B, bf16, two H100-80G"),
        ("dense model", "Qwen3-8B, bf16, one H100-80G"),
    ),
    traces=(LENGTHS,),
    prepare=prepare,
    plan=plan,
    work=work,
    judge=judge,
    draw=draw,
)
