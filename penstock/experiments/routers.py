"""Which router for which traffic: every router of the table on the same three kinds of prompts, with loads fresh and
old.

Source: none; it is the table of docs/cluster.md. The traffics (lab.routing):

    conversation  Mooncake's conversations: long prompts, two thirds new, a few hundred open talks
    tools         agents: two beginnings that half of all prompts share, drawn in the shares of Mooncake's tool trace
    unshared      Azure's conversations of 2023: short prompts of which nothing is known to be shared

What is counted is the share of first tokens within the promise (5 s, 5 s, 1 s) at a rate near what the fleet can take.
Routers have their defaults; SGLang's stands twice, since its default bounds are made for large fleets.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING

from penstock.experiments.dualmap import SAMPLE, TRACE
from penstock.lab.experiment import (
    Experiment,
    Outcome,
    Ratio,
    Row,
    Scale,
    Settings,
    Verdict,
    by_seed,
    mean,
    number,
    paired,
)
from penstock.lab.routing import TRAFFICS, from_trace, routed, tool_calls

if TYPE_CHECKING:
    from matplotlib.figure import Figure

AZURE, AZURE_SAMPLE = "azure_2023_conv.csv", "azure_2023_conv_200.csv"
VARIANTS: dict[str, dict[str, object]] = {
    "round-robin": {"name": "round-robin"},
    "least": {"name": "least"},
    "p2c": {"name": "p2c"},
    "least-tokens": {"name": "least-tokens"},
    "affinity": {"name": "affinity"},
    "prefix": {"name": "prefix"},
    "prefix, tuned": {"name": "prefix", "balance_abs": 4, "balance_rel": 1.2},
    "prefix-hash": {"name": "prefix-hash"},
    "session": {"name": "session"},
    "deepest-prefix": {"name": "deepest-prefix"},
    "kv-aware": {"name": "kv-aware"},
    "llm-d": {"name": "llm-d"},
    "dynamo": {"name": "dynamo"},
    "mooncake": {"name": "mooncake"},
    "ray-prefix": {"name": "ray-prefix"},
    "preble": {"name": "preble"},
    "dualmap": {"name": "dualmap"},
}
RATES = {"conversation": 4.5, "tools": 10.0, "unshared": 44.0}
SEEN = ("fresh", "1 s")
NEAR = 2.0  # points below the best that still count as the best


def plan(scale: Scale, prepared: Settings) -> Sequence[Settings]:
    return [
        {
            "variant": variant,
            "traffic": traffic,
            "regime": regime,
            "num": 4000 if scale.is_full else 2000,
            "seed": seed,
        }
        for traffic in TRAFFICS
        for regime in SEEN
        for variant in VARIANTS
        for seed in scale.seeds
    ]


def work(settings: Settings, scale: Scale) -> Mapping[str, object]:
    name, seed, num = (
        str(settings["traffic"]),
        int(number(settings, "seed")),
        int(number(settings, "num")),
    )
    traffic = TRAFFICS[name]
    if name == "tools":
        rows = tool_calls(num, seed, traffic.cut)
    elif name == "unshared":
        rows = from_trace(scale.trace(AZURE, AZURE_SAMPLE), num, seed, traffic.cut)
    else:
        rows = from_trace(scale.trace(TRACE, SAMPLE), num, seed, traffic.cut)
    return routed(
        VARIANTS[str(settings["variant"])],
        rows,
        traffic=traffic,
        regime=str(settings["regime"]),
        rate_per_s=RATES[name],
        warm_up=len(rows) // 8,
    )


def table(rows: Sequence[Row]) -> str:
    """Markdown: the share kept by each router, with the best of each column (and who is as good) in bold."""
    columns = [(traffic, regime) for traffic in TRAFFICS for regime in SEEN]
    kept = {
        (name, *column): mean(
            by_seed(rows, "kept", variant=name, traffic=column[0], regime=column[1]).values()
        )
        for name in VARIANTS
        for column in columns
    }
    tops = {column: max(kept[name, *column] for name in VARIANTS) for column in columns}
    lines = [
        "| router | " + " | ".join(f"{traffic}, {regime}" for traffic, regime in columns) + " |"
    ]
    lines.append("|---|" + "---:|" * len(columns))
    for name in VARIANTS:
        cells = []
        for column in columns:
            value = kept[name, *column]
            is_best = value >= tops[column] - NEAR
            cells.append(f"**{value:.1f}**" if is_best else f"{value:.1f}")
        lines.append(f"| {name} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def judge(rows: Sequence[Row]) -> Verdict:
    ratios, told = [], []
    for traffic in TRAFFICS:
        for regime in SEEN:
            where = {"traffic": traffic, "regime": regime}
            kept = {
                name: mean(by_seed(rows, "kept", variant=name, **where).values())
                for name in VARIANTS
            }
            top = max(kept, key=lambda name: kept[name])
            values = paired(rows, "kept", {"variant": top, **where}, {"variant": "least", **where})
            ratios.append(Ratio(name=f"{traffic}, {regime}: kept, {top} / least", values=values))
            good = [name for name in VARIANTS if kept[name] >= kept[top] - NEAR]
            told.append(f"{traffic}, {regime}: {', '.join(good)} ({kept[top]:.1f} %)")
    shares_pay = all(
        ratio.mean > 1 for ratio in ratios if not ratio.name.startswith("unshared") and ratio.values
    )
    outcome: Outcome = "reproduced" if shares_pay else "in part"
    why = f"within {NEAR:g} points of the best: {'; '.join(told)}\n\n{table(rows)}"
    return Verdict(outcome=outcome, why=why, ratios=tuple(ratios))


def draw(rows: Sequence[Row], figure: Figure) -> None:
    axes = figure.subplots(1, len(TRAFFICS), sharey=True)
    for ax, traffic in zip(axes, TRAFFICS, strict=True):
        for place, regime in enumerate(SEEN):
            where = {"traffic": traffic, "regime": regime}
            kept = [
                mean(by_seed(rows, "kept", variant=name, **where).values()) for name in VARIANTS
            ]
            heights = [number + 0.4 * place for number in range(len(VARIANTS))]
            ax.barh(heights, kept, height=0.4, label=regime)
        ax.set_yticks(range(len(VARIANTS)), list(VARIANTS), fontsize=7)
        ax.set_title(f"{traffic}, {RATES[traffic]:g}/s")
        ax.set_xlabel("promises kept, %")
    axes[0].legend(fontsize=7)


EXPERIMENT = Experiment(
    name="routers",
    system="Routers: which for which traffic",
    source="the routers' own sources, named in penstock/policy/route; traces of Mooncake and Azure",
    claim="Where prompts share beginnings, routers that know of them keep more promises than the shortest queue; where "
    "they do not, nothing is lost by them.",
    criterion="The best router keeps more first tokens within the promise than least outstanding, on both traffics "
    "that share, fresh and old; what is best for which is the result.",
    workload="Eight replicas, prompts only: Mooncake's conversations at 4.5 a second, drawn tool calls at 10, Azure's "
    "conversations of 2023 at 44.",
    constants=(
        ("step times", "OPT-13B on one A100-80G, DistServe's published fit; one prompt at a time"),
        ("routers", "their defaults; `prefix, tuned`: balance_abs 4, balance_rel 1.2"),
    ),
    traces=(TRACE, AZURE),
    compares_schedulers=False,
    plan=plan,
    work=work,
    judge=judge,
    draw=draw,
)
