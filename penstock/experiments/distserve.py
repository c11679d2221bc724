"""DistServe: prefill and decode on devices of their own serve more requests a device within their promises.

Source: DistServe (OSDI 2024), LLMServe/DistServe; its figures come from an engine and from a simulator, of which the
step times are published (cost.linear_five) and the rules are few enough to be written anew (lab.phases).

What is asked anew is how much of the gain is the placement's. The publication compares its own engine, disaggregated,
with vLLM of 2023, colocated: two engines with different step times. Here every comparison is also made with *one* set
of step times on both sides. So "colocated, vLLM" repeats the published comparison, and "colocated" is the fair one.

    rate a device    the highest Poisson rate, of the best degrees of parallelism, at which the P90 of TTFT and the P90
                     of TPOT are each kept; OPT-13B on up to 4 devices, OPT-66B on up to 16 (colocated: 8)

NOTED are figures of the published simulator itself, run once, with one seed and other draws of the same traces; ours
are to lie near them. Their 300 conversations of ShareGPT are not here: ours have answers of the same mean, and prompts
of 857 tokens in the mean in place of 729, so these are shortened in proportion (whole, they bring the four rates at
0.2 s and 0.1 s down from 0.67, 0.58, 0.92 and 0.96 to 0.46, 0.40, 0.79 and 0.84). Chunks of 2,048 tokens are the
baseline that came after the publication; its simulator lets decodes ride beside them for nothing, so they are also
judged paying for themselves.

The evaluator is one of queues. So pairs of unequal degree at their highest rates are also run in the whole simulator
(lab.placed_trial), with blocks, admission, roles, the hand-over under DistServe's bound on what was pulled, and blocks
that go from more devices to fewer or the other way; what both say of the tails is compared, and decides nothing.

What cannot be repeated: the published runs on 32 A100; traces of HumanEval and LongBench; all of the code trace, of
which the repository holds the first 191 requests (lengths are drawn from these).
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import TYPE_CHECKING

from penstock.lab.experiment import (
    SAMPLES,
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
from penstock.lab.highest_rate import highest_rate
from penstock.lab.placed_trial import simulated_tails
from penstock.lab.placement import CHUNK, Asked, Judge, hardware, placement_link, spec_of
from penstock.policy.place import Parallel, Site, Unit
from penstock.traffic.lengths import Empirical

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONV, CONV_SAMPLE, CODE_SAMPLE = (
    "azure_2023_conv.csv", "azure_2023_conv_200.csv", "azure_2023_code_191.csv",
)  # fmt: skip
CHAT = "vllm_logs/RTX4090_Llama-3.1-8B/requests.jsonl"  # 300 conversations of ShareGPT, answers written anew
CHAT_MEAN = 729  # tokens of a prompt in the noted runs
LONGEST, NUM = 2048, 400
SIMULATED = "simulated"
PAIRS = {"opt-13b": ((2, 1), (1, 2), (1, 4)), "opt-66b": ((4, 2), (8, 4), (2, 4))}  # degrees
PROMISE = {"opt-13b": (0.25, 0.06), "opt-66b": (2.5, 0.06)}  # at which the pairs are compared
BELOW, PULL_SHARE = 0.9, 0.05
STEP, LOW, HIGH = 1.05, -80, 57  # rates a device: 0.02 to 16
WON, NEAR = 1.2, 0.1

VARIANTS = {  # what steps cost, and how phases are placed
    "disaggregated": ("distserve", True),
    "colocated, vLLM": ("distserve-vllm", True),
    "colocated": ("distserve", True),
    "chunked": ("distserve", True),
    "chunked, paid": ("distserve", False),
}
TTFTS, TPOTS = (0.4, 1.0, 2.5, 5.0), (0.03, 0.06, 0.1, 0.15)
Promise = tuple[float, float]
SURFACE: tuple[Promise, ...] = tuple((ttft, tpot) for ttft in TTFTS for tpot in TPOTS)
NOTED: dict[tuple[str, str, Promise], tuple[float, float, float, float]] = {
    # workload, model, promise: disaggregated, colocated (vLLM), colocated, chunked; requests/s a device
    ("sharegpt", "opt-13b", (0.2, 0.1)): (0.81, 0.69, 1.06, 1.00),
    ("sharegpt", "opt-13b", (0.25, 0.04)): (0.53, 0.38, 0.63, 0.69),
    ("conv", "opt-13b", (0.2, 0.1)): (1.63, 1.00, 2.06, 2.44),
    ("conv", "opt-13b", (0.25, 0.04)): (1.16, 0.72, 1.28, 1.56),
    ("conv", "opt-13b", (1.0, 0.03)): (1.06, 0.19, 1.06, 1.34),
    ("code", "opt-13b", (0.4, 0.06)): (0.06, 0.28, 0.81, 0.69),
    ("conv", "opt-66b", (0.4, 0.1)): (0.35, 0.27, 0.53, 0.63),
    ("conv", "opt-66b", (2.5, 0.15)): (0.77, 0.37, 0.59, 0.70),
    ("conv", "opt-66b", (2.5, 0.06)): (0.45, 0.16, 0.33, 0.41),
}
CASES = tuple(dict.fromkeys((workload, model) for workload, model, _ in NOTED))
DEVICES = {"opt-13b": (4, 4), "opt-66b": (16, 8)}  # apart, together


def told_of(promise: Promise) -> str:
    return f"{promise[0]:g}/{promise[1]:g}"


def promises_of(workload: str, model: str) -> list[Promise]:
    noted = [each for here, name, each in NOTED if (here, name) == (workload, model)]
    return noted + [each for each in SURFACE if workload == "conv" and each not in noted]


@cache
def lengths_of(workload: str, scale: Scale) -> Empirical:
    if workload == "code":
        return Empirical(path=SAMPLES / CODE_SAMPLE)
    if workload == "sharegpt":
        rows = [json.loads(line) for line in scale.trace(CHAT).read_text().splitlines()]
        factor = CHAT_MEAN * len(rows) / sum([row["input_toks"] for row in rows])
        return Empirical.of(
            (max(1, round(factor * row["input_toks"])), row["output_toks"]) for row in rows
        )
    pairs = Empirical(path=scale.trace(CONV, CONV_SAMPLE)).table().tolist()
    return Empirical.of((prompt, output) for prompt, output in pairs if prompt <= LONGEST)


def plan(scale: Scale, prepared: Settings) -> Sequence[Settings]:
    """A run for each variant, workload and model; all promises share its simulations."""
    found: list[Settings] = []
    num = 400 if scale.is_full else 60
    for workload, model in CASES if scale.is_full else CASES[1:2]:
        for seed in scale.seeds:
            for variant in VARIANTS:
                found.append(
                    {
                        "variant": variant,
                        "workload": workload,
                        "model": model,
                        "num": num,
                        "seed": seed,
                    }
                )
    return found + [
        {"variant": SIMULATED, "workload": "conv", "model": model, "num": num, "seed": seed}
        for model in (PAIRS if scale.is_full else ("opt-13b",))
        for seed in scale.seeds
    ]


@dataclass
class Search:
    """The highest rate a device of one unit; tried rates are remembered for all promises."""

    judge: Judge
    unit: Unit
    _known: dict[int, Promise] = field(default_factory=dict)

    def margin(self, place: int, promise: Promise) -> float:
        """How far both tails are below their promises, as a factor; at least 1 is kept."""
        if place not in self._known:
            self._known[place] = self.judge.tails(self.unit, STEP**place * self.unit.devices)
        ttft_s, tpot_s = self._known[place]
        return min(promise[0] / ttft_s, promise[1] / max(tpot_s, 1e-9))

    def highest(self, promise: Promise) -> float:
        return highest_rate(
            lambda place: self.margin(place, promise), low=LOW, high=HIGH, step=STEP, wanted=1.0
        )


def units_of(variant: str, model: str, judge: Judge) -> list[Unit]:
    facts, (apart, together) = judge.hardware.model, DEVICES[model]
    found = [Parallel(tp) for tp in facts.degrees or () if facts.can_be(Parallel(tp))]
    if variant == "disaggregated":
        return [
            Unit(way="disaggregated", parallel=first, decode=second)
            for first in found
            for second in found
            if first.devices + second.devices <= apart
        ]
    chunk = CHUNK if variant.startswith("chunked") else None
    return [
        Unit(way="colocated" if chunk is None else "chunked", parallel=each, chunk=chunk)
        for each in found
        if each.devices <= together
    ]


def compared(model: str, asked: Asked) -> dict[str, object]:
    """Tails of pairs in the whole simulator over those of the queues, a little below the highest rate of these."""
    judge = Judge(
        hardware=hardware(model, spec_of("a100-80g", "distserve")),
        asked=asked,
        transfer=placement_link(Site()),
    )
    told: dict[str, object] = {"cost_model": judge.hardware.source}
    for first, second in PAIRS[model]:
        unit = Unit(way="disaggregated", parallel=Parallel(first), decode=Parallel(second))
        rate = BELOW * unit.devices * Search(judge, unit).highest(PROMISE[model])
        if not rate:
            continue  # it keeps the promise at no rate that was asked for
        queues = judge.tails(unit, rate)
        whole = simulated_tails(
            asked, rate, tables="distserve", model=model,
            tp=first, decode_tp=second, pull_share=PULL_SHARE,
        )  # fmt: skip
        for name, ours, theirs in zip(("ttft", "tpot"), whole, queues, strict=True):
            told[f"{name} {first}:{second}"] = ours / theirs
    return told


def work(settings: Settings, scale: Scale) -> Mapping[str, object]:
    variant, workload, model = (str(settings[name]) for name in ("variant", "workload", "model"))
    tables, is_published = VARIANTS.get(variant, ("", False))
    asked = Asked(
        lengths=lengths_of(workload, scale),
        ttft_s=1.0,
        tpot_s=1.0,
        num=int(number(settings, "num")),
        seed=int(number(settings, "seed")),
        longest=None if workload == "code" else LONGEST,
    )
    if variant == SIMULATED:
        return compared(model, asked)
    judge = Judge(
        hardware=hardware(model, spec_of("a100-80g", tables)),
        asked=asked,
        is_published=is_published,
    )
    searches = [Search(judge, unit) for unit in units_of(variant, model, judge)]
    told: dict[str, object] = {"cost_model": judge.hardware.source}
    for promise in promises_of(workload, model):
        rates = {str(search.unit): search.highest(promise) for search in searches}
        best = max(rates, key=lambda name: rates[name])
        told[f"rate {told_of(promise)}"] = rates[best]
        told[f"unit {told_of(promise)}"] = best
    return told


# ---------------------------------------------------------------------------- the verdict


def rate_ratio(
    rows: Sequence[Row], case: tuple[str, str, Promise], under: str
) -> tuple[float, ...]:
    """Disaggregated over another variant, seed by seed."""
    workload, model, promise = case
    where = {"workload": workload, "model": model}
    apart = {**where, "variant": "disaggregated"}
    return paired(rows, f"rate {told_of(promise)}", apart, {**where, "variant": under})


def noted_figures(rows: Sequence[Row]) -> tuple[list[str], int, int]:
    """Lines of ours beside the noted, how many are near, and of how many."""
    lines, near, total = [], 0, 0
    for (workload, model, promise), noted in NOTED.items():
        told = []
        for variant, figure in zip(VARIANTS, noted, strict=False):
            ours = by_seed(
                rows, f"rate {told_of(promise)}", variant=variant, workload=workload, model=model
            )
            if not ours:
                continue
            middle = mean(ours.values())
            is_near = abs(middle / figure - 1) <= NEAR or min(ours.values()) <= figure <= max(
                ours.values()
            )
            near, total = near + is_near, total + 1
            told.append(f"{middle:.2f} ({figure:.2f}{'' if is_near else ', far'})")
        if told:
            lines.append(f"{model} {workload} {told_of(promise)}: {', '.join(told)}")
    return lines, near, total


def cells(rows: Sequence[Row], model: str, under: str) -> dict[Promise, float]:
    """Mean ratio of disaggregated rates to others', over the surface."""
    found = {}
    for promise in SURFACE:
        ratios = rate_ratio(rows, ("conv", model, promise), under)
        if ratios:
            found[promise] = mean(ratios)
    return found


def judge(rows: Sequence[Row]) -> Verdict:
    lines, near, total = noted_figures(rows)
    ratios = [
        Ratio(
            name=f"{model} {workload} {told_of(promise)}: disaggregated / {under}",
            values=rate_ratio(rows, (workload, model, promise), under),
            published=f"{noted[0] / noted[place]:.2f} (noted)",
        )
        for (workload, model, promise), noted in NOTED.items()
        for place, under in ((1, "colocated, vLLM"), (2, "colocated"), (3, "chunked"))
    ]
    ratios += whole_over_queues(rows)
    told, parts = [], {f"noted figures within {NEAR:.0%} or among our seeds": near == total}
    for model in DEVICES:
        fair, paid = cells(rows, model, "colocated"), cells(rows, model, "chunked, paid")
        if not fair:
            continue
        won = [promise for promise, ratio in fair.items() if ratio >= WON]
        over = [promise for promise in won if paid.get(promise, 0.0) > 1]
        parts[f"{model}: at least {WON:g} somewhere with equal step times"] = bool(won)
        if model == "opt-66b":
            parts[f"{model}: and more than chunks there"] = bool(over)
        lost = [promise for promise, ratio in fair.items() if ratio < 1]
        told.append(
            f"{model}, equal step times: at least {WON:g} at {listed(won)}; below 1 at {listed(lost)}; from "
            f"{min(fair.values()):.2f} to {max(fair.values()):.2f}; of the won, above chunks that pay: {listed(over)}"
        )
    why = "; ".join(f"{part}: {'yes' if holds else 'no'}" for part, holds in parts.items())
    why += f". {near} of {total} noted figures are near. {'. '.join(told)}. Rates a device, ours (noted): "
    return Verdict(
        outcome=outcome_of(sum(parts.values()), len(parts)),
        why=why + "; ".join(lines),
        ratios=tuple(each for each in ratios if each.values),
    )


def whole_over_queues(rows: Sequence[Row]) -> list[Ratio]:
    """What the simulator says over what the queues say, of pairs of unequal degree."""
    return [
        Ratio(
            name=f"{model}, prefill tp {first} + decode tp {second}: P90 {name}, simulator / queues",
            values=tuple(
                by_seed(rows, f"{name.lower()} {first}:{second}", variant=SIMULATED, model=model).values()
            ),
        )
        for model, pairs in PAIRS.items()
        for first, second in pairs
        for name in ("TTFT", "TPOT")
    ]  # fmt: skip


def listed(promises: Sequence[Promise]) -> str:
    return ", ".join(map(told_of, promises)) or "none"


def draw(rows: Sequence[Row], figure: Figure) -> None:
    """The ratio over the promises, for both models; the line is where neither wins."""
    models = [model for model in ("opt-13b", "opt-66b") if cells(rows, model, "colocated")]
    unders = ("colocated", "chunked, paid")
    axes = figure.subplots(len(models), len(unders), squeeze=False)
    for line, model in zip(axes, models, strict=True):
        for ax, under in zip(line, unders, strict=True):
            known = cells(rows, model, under)
            grid = [[known.get((ttft, tpot), float("nan")) for tpot in TPOTS] for ttft in TTFTS]
            ax.imshow(grid, cmap="RdBu", vmin=0.4, vmax=1.6, origin="lower", aspect="auto")
            ax.contour(grid, levels=[1.0], colors="black")
            for y, values in enumerate(grid):
                for x, value in enumerate(values):
                    ax.text(x, y, f"{value:.2f}", ha="center", va="center", fontsize=8)
            ax.set_xticks(range(len(TPOTS)), [f"{1e3 * each:g}" for each in TPOTS])
            ax.set_yticks(range(len(TTFTS)), [f"{each:g}" for each in TTFTS])
            ax.set_xlabel("TPOT promised, ms")
            ax.set_ylabel("TTFT promised, s")
            ax.set_title(f"{model}: disaggregated / {under}", fontsize=9)


EXPERIMENT = Experiment(
    name="distserve",
    system="DistServe: prefill and decode apart, placed for goodput",
    source="DistServe (OSDI 2024), LLMServe/DistServe",
    claim="Placing prefill and decode on devices of their own, each with the parallelism that suits it, serves up "
    "to 4.48 times the requests a device within TTFT and TPOT (7.4 times in the final version), over vLLM.",
    criterion=f"With equal step times on both sides, at least {WON:g} times the rate a device of the best colocated "
    "plan at some promise of the surface, for each of both models; for OPT-66B also more than the best chunked plan "
    f"that pays for its decodes; and the figures noted from the published simulator within {NEAR:.0%} of our mean or "
    "among our seeds.",
    workload="Poisson, 400 requests a try; lengths of Azure's conversations up to 2,048 prompt tokens, of 300 ShareGPT "
    f"conversations (prompts shortened to a mean of {CHAT_MEAN}) and of 191 requests of Azure's code trace. Highest "
    "rate a device with the P90 of TTFT and of TPOT kept; promises: those noted, and 0.4 to 5 s by 30 to 150 ms.",
    constants=(
        ("step times", "published fits to A100-80G: DistServe's engine on both sides, vLLM's for 'colocated, vLLM'"),
        ("evaluator", "queues of two phases under the published simulator's rules: 50,000 context positions a decode "
         "step, jobs take turns, KV moves in no time, no scheduler; 'chunked, paid': the card's memory, oldest first"),
        ("devices", "OPT-13B: up to 4; OPT-66B: up to 16 apart, 8 together; no pipelines"),
        ("chunks", f"{CHUNK} tokens, prompts first"),
    ),
    traces=(CONV, CHAT),
    plan=plan,
    work=work,
    judge=judge,
    draw=draw,
    compares_schedulers=False,
)  # fmt: skip
