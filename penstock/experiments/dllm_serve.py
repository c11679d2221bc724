"""dLLM-Serve: memory of logits, sparse keys and mixed phases, against an engine that keeps whole logits.

Source: "Taming the Memory Footprint Crisis" (chosen-ox/dLLM-Serve, commit aefbf0a): on an RTX 4090 and an L40S
1.61-1.81 and 1.60-1.74 times the throughput of a Fast-dLLM-type engine, and a tail about four times shorter under
contention.

What cannot be repeated here: the cards, LLaDA-8B and the workloads (LiveBench, Burst, OSC), whose lengths are not
published. What stands in: LLaDA-8B's shape on modelled cards (cost.diffusion), lognormal prompts of median 330 tokens
and answers of 256, for whose mean length every engine is sized. The batch that the baseline can afford is derived from
its own buffers, so everything hangs on how many bytes it holds for a logit: 18 (bf16 and two buffers in fp64, as
LLaDA's published sampler), 6 (a copy in fp32) or 2. Step by step the ladder is

    base       static batches, whole logits, all keys kept
    mixed      the same memory, but phases are mixed and an answer that ends is replaced at once
    dllm-1.0   logits in slices of 1024 rows besides
    dllm-0.5   half of the positions outside a block kept besides: dLLM-Serve; 0.25 a quarter

What memory can give is bounded: a batch of any size computes as long for a token as one that fills the card, and on
48 GB the baseline's own batch is close to that (`python -m benchmarks.canvas_bound`).

Whole sequences are computed twice a block by all of these, as dLLM-Serve does (full, then refresh). Fast-dLLM does it
once; `fast` is the baseline so, and `dllm-fast` dLLM-Serve so. That the engine's retention of 1 is exact, and that its
logits take what a slice takes, are tests of the engine (tests/engine/torch/test_canvases.py).
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from penstock.core.types import CanvasRule
from penstock.cost.diffusion import LLADA_8B, LOGIT_BYTES, CanvasMemory, Logits
from penstock.cost.hardware import card_of
from penstock.lab.canvases import Served, drawn_prompts, poisson, serve
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

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MEDIAN, SPREAD = 330, 0.6  # of prompts
MASKS = 256
LENGTH = round(MEDIAN * math.exp(SPREAD**2 / 2)) + MASKS  # the mean
CARDS = {"rtx-4090": 200, "l40s": 1200}  # and requests of a full run; quick ones take half
PUBLISHED = {"rtx-4090": "1.61-1.81x", "l40s": "1.60-1.74x"}
BATCH, FASTER = 3.0, 1.5  # what the criterion asks
LOAD = 0.8  # of what the baseline in fp64 serves
OURS, BASE = "dllm-0.5", "base-fp64"
WIDTHS = tuple(LOGIT_BYTES)
LADDER = (BASE, "mixed-fp64", "dllm-1.0", OURS, "dllm-0.25")
VARIANTS = (
    *LADDER,
    "base-fp32",
    "base-fp16",
    *[f"fast-{width}" for width in WIDTHS],
    "dllm-fast",
)


def engine_of(variant: str, card: str) -> Served:
    kind, _, told = variant.partition("-")
    is_fast = "fast" in (kind, told)
    if kind == "dllm":
        rule = CanvasRule(retention=0.5 if is_fast else float(told), delay=0 if is_fast else 1)
        logits = Logits()
    else:
        rule = CanvasRule(retention=1.0, delay=0 if is_fast else 1)
        logits = Logits(bytes_each=LOGIT_BYTES[told], row_cap=None)
    memory = CanvasMemory(shape=LLADA_8B, card=card_of(card), logits=logits, rule=rule)
    is_lockstep = kind in ("base", "fast")
    return Served(memory=memory, length=LENGTH, is_lockstep=is_lockstep, masks=MASKS)


def served(variant: str, card: str, seed: int, rate_per_s: float | None, scale: Scale) -> Settings:
    num = CARDS[card] if scale.is_full else CARDS[card] // 2
    prompts = drawn_prompts(num, seed, MEDIAN, SPREAD)
    return serve(
        engine_of(variant, card), list(zip(poisson(num, seed, rate_per_s), prompts, strict=True))
    )


def prepare(scale: Scale) -> Settings:
    """Answers a second of the baseline in fp64 while all wait."""
    return {
        card: round(number(served(BASE, card, 0, None, scale), "tokens_per_s") / MASKS, 4)
        for card in CARDS
    }


def plan(scale: Scale, prepared: Settings) -> Sequence[Settings]:
    found = []
    for card in CARDS:
        rate_per_s = round(LOAD * number(prepared, card), 4)
        for seed in scale.seeds:
            for load, variants in ((None, VARIANTS), (LOAD, (BASE, "mixed-fp64", OURS))):
                for variant in variants:
                    point = {"variant": variant, "card": card, "load": load, "seed": seed}
                    found.append({**point, "rate_per_s": rate_per_s if load else None})
    return found


def work(settings: Settings, scale: Scale) -> Mapping[str, object]:
    rate_per_s = None if settings["load"] is None else number(settings, "rate_per_s")
    seed = int(number(settings, "seed"))
    return served(str(settings["variant"]), str(settings["card"]), seed, rate_per_s, scale)


def judge(rows: Sequence[Row]) -> Verdict:
    """Batch and throughput on each card against the baseline in fp64; then what that hangs on."""
    ratios: list[Ratio] = []
    failed: list[str] = []
    for card in CARDS:
        batches = compared(rows, "batch", OURS, BASE, card)
        speeds = compared(rows, "tokens_per_s", OURS, BASE, card)
        ratios.append(Ratio(name=f"{card}: admissible batch", values=batches))
        ratios.append(
            Ratio(
                name=f"{card}: throughput, {OURS} / {BASE}",
                values=speeds,
                published=PUBLISHED[card],
            )
        )
        failed += [f"batch on {card}"] if mean(batches) < BATCH else []
        failed += [f"throughput on {card}"] if mean(speeds) < FASTER else []
        ratios += further(rows, card)
    num = 2 * len(CARDS)
    held = num - len(failed)
    why = f"{held} of {num} hold" + (f" (not: {'; '.join(failed)})" if failed else "")
    return Verdict(
        outcome=outcome_of(held, num), why=f"{why}; {hangs_on(rows)}", ratios=tuple(ratios)
    )


def further(rows: Sequence[Row], card: str) -> list[Ratio]:
    """Other baselines, and each rung of the ladder."""
    pairs = [(OURS, "base-fp32"), (OURS, "base-fp16"), ("dllm-fast", "fast-fp64")]
    pairs += [(OURS, "fast-fp64")]
    pairs += list(zip(LADDER[1:], LADDER, strict=False))
    found = [
        Ratio(
            name=f"{card}: throughput, {over} / {under}",
            values=compared(rows, "tokens_per_s", over, under, card),
        )
        for over, under in pairs
    ]
    for faster, published in (("mixed-fp64", ""), (OURS, "about 4x under contention")):
        tail = compared(rows, "e2e_p99_s", BASE, faster, card, LOAD)
        name = f"{card}: P99 at load {LOAD}, {BASE} / {faster}"
        found.append(Ratio(name=name, values=tail, published=published))
    return found


def hangs_on(rows: Sequence[Row]) -> str:
    """The claim's dependence on how wide the baseline's logits are, and on its program."""
    told = []
    for card in CARDS:
        sizes = [
            f"{width} {value(rows, f'base-{width}', card, 'batch'):.0f}"
            for width in reversed(WIDTHS)
        ]
        speeds = [
            f"{mean(compared(rows, 'tokens_per_s', OURS, f'base-{width}', card)):.2f}x"
            for width in reversed(WIDTHS)
        ]
        fast = mean(compared(rows, "tokens_per_s", OURS, "fast-fp64", card))
        told.append(
            f"{card}: batch {value(rows, OURS, card, 'batch'):.0f} against {', '.join(sizes)}, "
            f"throughput {', '.join(speeds)}; {fast:.2f}x against fp64 with one refresh a block"
        )
    return "; ".join(told)


def compared(
    rows: Sequence[Row],
    figure: str,
    over: str,
    under: str,
    card: str,
    load: float | None = None,
) -> tuple[float, ...]:
    return paired(rows, figure, at(over, card, load), at(under, card, load))


def at(variant: str, card: str, load: float | None = None) -> dict[str, object]:
    return {"variant": variant, "card": card, "load": load}


def value(rows: Sequence[Row], variant: str, card: str, figure: str) -> float:
    return mean(by_seed(rows, figure, **at(variant, card)).values())


def draw(rows: Sequence[Row], figure: Figure) -> None:
    axes = figure.subplots(1, 2)
    for ax, name, label in zip(
        axes, ("batch", "tokens_per_s"), ("admissible batch", "tokens a second"), strict=True
    ):
        for card in CARDS:
            values = [value(rows, variant, card, name) for variant in VARIANTS]
            ax.plot(VARIANTS, values, marker="o", linestyle="none", label=card)
        ax.set_ylabel(label)
        ax.set_yscale("log")
        ax.tick_params(axis="x", labelrotation=60)
        ax.grid(alpha=0.3)
    axes[0].legend()


EXPERIMENT = Experiment(
    name="dllm-serve",
    system="dLLM-Serve",
    source="Taming the Memory Footprint Crisis (chosen-ox/dLLM-Serve)",
    claim="With logits in slices, half of the keys and mixed phases a diffusion language model serves more answers at "
    "once, and more tokens a second, than an engine that keeps whole logits.",
    criterion=f"On a card of 24 GB and on one of 48 GB: at least {BATCH:g} times the admissible batch and at least "
    f"{FASTER:g} times the throughput of a static batch whose size follows from logits of whole sequences in fp64.",
    workload=f"Prompts lognormal (median {MEDIAN}, spread {SPREAD}), answers of {MASKS} tokens, all written; all at "
    f"once, and Poisson at {LOAD} of what the baseline in fp64 serves.",
    constants=(
        ("model", "LLaDA-8B: 8.02e9 weights in bf16, 524,288 bytes of keys and values a position"),
        ("memory", "0.8 of the card (published), 0.5 GB of it for the runtime (assumed)"),
        ("bytes a logit", "baseline 18, 6 or 2; ours 10, in slices of 1024 rows"),
        ("program", "blocks of 32, 32 steps: full, refresh, 30 x reuse; fast: refresh, 31 x reuse"),
    ),
    compares_schedulers=False,
    prepare=prepare,
    plan=plan,
    work=work,
    judge=judge,
    draw=draw,
)
