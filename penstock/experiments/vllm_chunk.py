"""vLLM's token budget: 512 against 2,048 tokens a step, first tokens against gaps.

Source: vLLM v1 (vllm 0.33, v1/core/sched/scheduler.py, max_num_batched_tokens) with chunked prefill, after
Sarathi-Serve (Agrawal et al., OSDI 2024): a smaller budget bounds how long a step with a prompt in it takes, so decodes
stall less, and prompts need more steps, each of which reads the weights again, so first tokens come later.

What stands in for the original: Llama-3.1-8B on a modelled A100-80G, lengths and order of the Azure 2023 conversation
trace, Poisson arrivals. No published figure belongs to exactly this setting: the claim is the direction of both
effects, and the ratios are ours. A second card (H100) shows whether it hangs on the first one's constants.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from penstock.core.types import Request, Slo
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
from penstock.lab.trial import SCHEDULERS, Offered, deployment, saturation, trial
from penstock.traffic.arrivals import Poisson

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TRACE, SAMPLE = "azure_2023_conv.csv", "azure_2023_conv_200.csv"
CARDS = ("a100-80g", "h100")
LOADS = (0.3, 0.5, 0.7, 0.9, 1.0, 1.2, 1.5, 2.0)
CORE = (0.5, 0.7, 0.9)  # the loads the criterion speaks of
SHORT = 1000  # prompt tokens of the tight class
NUM = 1500
LONGER_GAP, LATER_TOKEN = 1.5, 1.1  # what the criterion asks


def promise(request: Request) -> Slo:
    """Two classes, so that a scheduler cannot shine by starving long prompts."""
    if request.prompt.num_tokens <= SHORT:
        return Slo(ttft_s=0.5, tpot_s=0.06)
    return Slo(ttft_s=2.0, tpot_s=0.06)


def offered(scale: Scale, num: int, seed: int, rate_per_s: float | None) -> Offered:
    return Offered(
        trace=scale.trace(TRACE, SAMPLE),
        num=num,
        seed=seed,
        rate_per_s=rate_per_s,
        process=Poisson(rate_per_s=rate_per_s or 1.0),
        promises=promise,
    )


def num_requests(scale: Scale) -> int:
    return NUM if scale.data is not None else 100


def prepare(scale: Scale) -> Settings:
    """Saturation of vLLM at 2,048 on each card, requests a second."""
    some = offered(scale, num_requests(scale), 0, None)
    return {
        card: round(saturation(deployment(SCHEDULERS["vllm-2048"], gpu=card), some), 2)
        for card in (CARDS if scale.is_full else CARDS[:1])
    }


def plan(scale: Scale, prepared: Settings) -> Sequence[Settings]:
    loads: dict[str, tuple[float, ...]] = {card: CORE for card in prepared}
    if scale.is_full:
        loads["a100-80g"] = LOADS
    return [
        {
            "variant": variant,
            "card": card,
            "load": load,
            "rate_per_s": round(load * number(prepared, card), 4),
            "num": num_requests(scale),
            "seed": seed,
        }
        for card in prepared
        for load in loads[card]
        for variant in SCHEDULERS
        for seed in scale.seeds
    ]


def work(settings: Settings, scale: Scale) -> Mapping[str, object]:
    config = deployment(SCHEDULERS[str(settings["variant"])], gpu=str(settings["card"]))
    num, seed = int(number(settings, "num")), int(number(settings, "seed"))
    return trial(config, offered(scale, num, seed, number(settings, "rate_per_s")))


def judge(rows: Sequence[Row]) -> Verdict:
    """Both directions at every core load, on every card."""
    ratios: list[Ratio] = []
    failed: list[str] = []
    cards = sorted({str(row.get("card")) for row in rows})
    for card, load in itertools.product(cards, CORE):
        over = {"variant": "vllm-2048", "card": card, "load": load}
        under = {"variant": "vllm-512", "card": card, "load": load}
        gaps = paired(rows, "itl_p99_s", over, under)
        first = paired(rows, "ttft_mean_s", under, over)
        ratios.append(Ratio(name=f"{card}, load {load}: P99 gap, 2048 / 512", values=gaps))
        ratios.append(Ratio(name=f"{card}, load {load}: mean TTFT, 512 / 2048", values=first))
        if mean(gaps) < LONGER_GAP or mean(first) < LATER_TOKEN:
            failed.append(f"{card} at {load}")
    held = len(cards) * len(CORE) - len(failed)
    worst = [f"{name} {at(rows, 'worst_class', name, 0.7):.0%}" for name in SCHEDULERS]
    why = f"both hold at {held} of {held + len(failed)} points"
    why += f" (not: {', '.join(failed)})" if failed else ""
    why += f"; attainment of the worst class on {CARDS[0]} at 0.7: {', '.join(worst)}"
    return Verdict(outcome=outcome_of(held, held + len(failed)), why=why, ratios=tuple(ratios))


def at(rows: Sequence[Row], figure: str, variant: str, load: float) -> float:
    """Mean over seeds on the first card."""
    where = {"variant": variant, "card": CARDS[0], "load": load}
    return mean(by_seed(rows, figure, **where).values())


def draw(rows: Sequence[Row], figure: Figure) -> None:
    axes = figure.subplots(1, 2)
    for ax, name, label in zip(
        axes, ("itl_p99_s", "ttft_p99_s"), ("P99 gap, s", "P99 TTFT, s"), strict=True
    ):
        for variant in SCHEDULERS:
            here = [row for row in rows if row.fits({"variant": variant, "card": CARDS[0]})]
            loads = sorted({row.number("load") for row in here})
            values = [
                [row.number(name) for row in here if row.number("load") == load] for load in loads
            ]
            middle = [mean(each) for each in values]
            ax.plot(loads, middle, marker="o", label=variant)
            ax.fill_between(loads, [min(v) for v in values], [max(v) for v in values], alpha=0.15)
        ax.set_xlabel("load, share of saturation")
        ax.set_ylabel(label)
        ax.set_yscale("log")
        ax.grid(alpha=0.3)
    axes[0].legend()


EXPERIMENT = Experiment(
    name="vllm-chunk",
    system="vLLM v1: token budget 512 against 2,048",
    source="vLLM v1 scheduler; chunked prefill after Sarathi-Serve (OSDI 2024)",
    claim="A smaller token budget shortens the gaps between tokens and lengthens the wait for the first one.",
    criterion="At 0.5, 0.7 and 0.9 of saturation, on both cards: P99 gap at 2,048 at least "
    f"{LONGER_GAP} times that at 512, and mean TTFT at 512 at least {LATER_TOKEN} times that at 2,048.",
    workload=f"Azure 2023 conversation, {NUM} requests a run, Poisson; two classes by prompt length "
    f"(up to {SHORT}: TTFT 0.5 s, longer: 2 s; TPOT 0.06 s).",
    constants=(
        ("model", "Llama-3.1-8B, bf16, tensor parallel 1"),
        ("cards", "A100-80G; H100 as a check"),
    ),
    traces=(TRACE,),
    prepare=prepare,
    plan=plan,
    work=work,
    judge=judge,
    draw=draw,
)
