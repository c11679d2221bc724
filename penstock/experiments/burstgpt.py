"""BurstGPT: what Poisson arrivals hide.

Source: Wang et al., BurstGPT: a real-world workload dataset to optimize LLM serving systems (KDD 2025; HPMLL/BurstGPT).
Its claim for serving systems: they are tuned on Poisson arrivals, and under real bursts at the same mean rate their
latencies degrade, and another scheduler or policy may be the best one.

What stands in for the original: BurstGPT's rows are not in the repository, so other published traces are played: Azure
2023 conversation, Mooncake conversation, and clients of two of ServeGen's classes as their published laws replay them.
Each with its own arrivals ("real"), with BurstGPT's generator fitted to it (Gamma gaps with a new law every 60 s), with
Gamma gaps of CV 2 and 4, and with Poisson arrivals: the same requests in the same order at the same mean rate, on the
same modelled GPU, for the same four schedulers.
"""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
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
from penstock.lab.trial import (
    SCHEDULERS,
    Offered,
    Process,
    deployment,
    read_requests,
    saturation,
    trial,
)
from penstock.traffic.arrivals import Gamma, Poisson
from penstock.traffic.fit import fit_arrivals
from penstock.traffic.statistics import dispersion

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass(frozen=True, kw_only=True)
class Workload:
    """A trace and what its requests are promised: by prompt length, so that nobody shines by starving long ones."""

    file: str
    sample: str | None
    num: int
    short_tokens: int
    short_s: float
    long_s: float
    tpot_s: float

    def promise(self, request: Request) -> Slo:
        is_short = request.prompt.num_tokens <= self.short_tokens
        return Slo(ttft_s=self.short_s if is_short else self.long_s, tpot_s=self.tpot_s)


WORKLOADS = {
    "azure": Workload(
        file="azure_2023_conv.csv",
        sample="azure_2023_conv_200.csv",
        num=3000,
        short_tokens=1000,
        short_s=1.0,
        long_s=2.0,
        tpot_s=0.075,
    ),
    "mooncake": Workload(
        file="mooncake_conversation.jsonl",
        sample=None,
        num=1000,
        short_tokens=8000,
        short_s=5.0,
        long_s=20.0,
        tpot_s=0.15,
    ),
    "servegen-large": Workload(
        file="servegen/language_m-large",
        sample=None,
        num=3000,
        short_tokens=500,
        short_s=1.0,
        long_s=2.0,
        tpot_s=0.075,
    ),
    "servegen-r1": Workload(
        file="servegen/reason_deepseek-r1",
        sample=None,
        num=1000,
        short_tokens=1000,
        short_s=2.0,
        long_s=10.0,
        tpot_s=0.075,
    ),
}
ARRIVALS = ("poisson", "real", "burstgpt", "gamma-2", "gamma-4")
SWEPT = ("poisson", "real")  # with all loads and schedulers
LOADS = (0.5, 0.7, 0.9)
ENOUGH = 2  # traces
AT = 0.7  # the load that the criterion speaks of
WORSE, FLIP = (
    2.0,
    0.005,
)  # ratio of P99 TTFT; least difference in attainment, both ways, that counts as a change of rank


def process_of(
    arrivals: str, workload: Workload, scale: Scale, rate_per_s: float
) -> Process | None:
    """None: the trace's own instants."""
    if arrivals == "real":
        return None
    if arrivals == "poisson":
        return Poisson(rate_per_s=rate_per_s)
    if arrivals == "burstgpt":
        rows = read_requests(scale.trace(workload.file, workload.sample), 4096)
        return fit_arrivals([at for at, _ in rows])
    return Gamma(rate_per_s=rate_per_s, cv=float(arrivals.removeprefix("gamma-")))


def offered(
    scale: Scale, workload: Workload, seed: int, rate_per_s: float | None, process: Process | None
) -> Offered:
    return Offered(
        trace=scale.trace(workload.file, workload.sample),
        num=num_of(scale, workload),
        seed=seed,
        rate_per_s=rate_per_s,
        process=process,
        promises=workload.promise,
    )


def num_of(scale: Scale, workload: Workload) -> int:
    if scale.data is None:
        return 100
    return workload.num if scale.is_full else workload.num // 8


def workloads(scale: Scale) -> dict[str, Workload]:
    """Without the published traces only what the repository holds a piece of."""
    return {name: each for name, each in WORKLOADS.items() if scale.data or each.sample}


def prepare(scale: Scale) -> Settings:
    """Saturation of vLLM at 2,048 under each trace's requests, a second."""
    config = deployment(SCHEDULERS["vllm-2048"])
    return {
        name: round(saturation(config, offered(scale, each, 0, None, None)), 3)
        for name, each in workloads(scale).items()
    }


def plan(scale: Scale, prepared: Settings) -> Sequence[Settings]:
    few = LOADS if scale.is_full else (AT,)
    return [
        {
            "variant": variant,
            "workload": name,
            "arrivals": arrivals,
            "load": load,
            "rate_per_s": round(load * number(prepared, name), 4),
            "seed": seed,
        }
        for name in prepared
        for arrivals in ARRIVALS
        for load in (few if arrivals in SWEPT else (AT,))
        for variant in (SCHEDULERS if arrivals in SWEPT else ("vllm-2048",))
        for seed in scale.seeds
    ]


def work(settings: Settings, scale: Scale) -> Mapping[str, object]:
    workload = WORKLOADS[str(settings["workload"])]
    rate = number(settings, "rate_per_s")
    process = process_of(str(settings["arrivals"]), workload, scale, rate)
    traffic = offered(scale, workload, int(number(settings, "seed")), rate, process)
    figures = trial(deployment(SCHEDULERS[str(settings["variant"])]), traffic)
    gap_s = 1 / rate  # bins in mean gaps, so that one figure speaks for all loads
    return {**figures, "dispersion_20_gaps": dispersion(traffic.instants, 20 * gap_s)}


def flips(rows: Sequence[Row], workload: str) -> list[str]:
    """Pairs of schedulers whose order by attainment under real arrivals is the other one than under Poisson."""
    found = []
    for load, (one, other) in itertools.product(LOADS, itertools.combinations(SCHEDULERS, 2)):
        ahead = []
        for arrivals in ("poisson", "real"):
            where = {"workload": workload, "arrivals": arrivals, "load": load}
            first = by_seed(rows, "attainment", variant=one, **where)
            second = by_seed(rows, "attainment", variant=other, **where)
            ahead.append([first[seed] - second[seed] for seed in first])
        poisson, real = ahead
        if (
            poisson
            and mean(poisson) * mean(real) < 0
            and min(abs(mean(poisson)), abs(mean(real))) > FLIP
        ):
            before, after = (one, other) if mean(poisson) > 0 else (other, one)
            found.append(
                f"at {load} {before} leads {after} by {abs(mean(poisson)):.1%} under Poisson and trails by "
                f"{abs(mean(real)):.1%}"
            )
    return found


def judge(rows: Sequence[Row]) -> Verdict:
    ratios: list[Ratio] = []
    told, degraded, reordered = [], 0, 0
    for name in sorted({str(row.get("workload")) for row in rows}):
        at = {"workload": name, "load": AT}
        for variant, arrivals in itertools.product(
            SCHEDULERS, ("real", "burstgpt", "gamma-2", "gamma-4")
        ):
            if variant != "vllm-2048" and arrivals != "real":
                continue
            here = {**at, "variant": variant}
            values = paired(
                rows, "ttft_p99_s", {**here, "arrivals": arrivals}, {**here, "arrivals": "poisson"}
            )
            ratios.append(
                Ratio(
                    name=f"{name} at {AT}, {variant}: P99 TTFT, {arrivals} / Poisson", values=values
                )
            )
        worse = [
            mean(each.values)
            for each in ratios
            if each.name.startswith(name) and "real" in each.name
        ]
        changed = flips(rows, name)
        spread = [
            mean(
                by_seed(
                    rows, "dispersion_20_gaps", variant="vllm-2048", arrivals=each, **at
                ).values()
            )
            for each in ("real", "poisson")
        ]
        told.append(
            f"{name} (index of dispersion over 20 mean gaps {spread[0]:.1f}, Poisson {spread[1]:.1f}): P99 TTFT "
            f"{min(worse):.2g} to {max(worse):.2g} times Poisson's; "
            + (f"the order changes: {'; '.join(changed)}" if changed else "no change of order")
        )
        degraded += min(worse) >= WORSE
        reordered += bool(changed)
    held = min(degraded, ENOUGH) + min(reordered, ENOUGH)
    return Verdict(outcome=outcome_of(held, 2 * ENOUGH), why=". ".join(told), ratios=tuple(ratios))


def draw(rows: Sequence[Row], figure: Figure) -> None:
    names = sorted({str(row.get("workload")) for row in rows})
    axes = figure.subplots(1, len(names), squeeze=False)[0]
    for ax, name in zip(axes, names, strict=True):
        for arrivals, line in (("poisson", "--"), ("real", "-")):
            for colour, variant in enumerate(SCHEDULERS):
                where = {"workload": name, "arrivals": arrivals, "variant": variant}
                loads = [load for load in LOADS if by_seed(rows, "attainment", load=load, **where)]
                values = [
                    mean(by_seed(rows, "attainment", load=load, **where).values()) for load in loads
                ]
                ax.plot(
                    loads,
                    values,
                    line,
                    color=f"C{colour}",
                    marker="o",
                    label=f"{variant}, {arrivals}",
                )
        ax.axhline(0.9, color="grey", linewidth=1)
        ax.set_title(name)
        ax.set_xlabel("load, share of saturation")
        ax.set_ylabel("attainment")
        ax.set_ylim(0, 1.02)
        ax.grid(alpha=0.3)
    axes[0].legend(fontsize="small")


EXPERIMENT = Experiment(
    name="burstgpt",
    system="BurstGPT: real bursts against Poisson arrivals",
    source="BurstGPT (KDD 2025), HPMLL/BurstGPT",
    claim="At equal mean rate, real arrivals degrade every scheduler against Poisson, and change which one is best.",
    criterion=f"On at least two traces, at {AT} of saturation: P99 TTFT under real arrivals at least {WORSE:g} times "
    f"Poisson's for each of the four schedulers; and two of them change places in attainment (by more "
    f"than {FLIP:.1%} both ways) at some load.",
    workload="Azure 2023 conversation (3,000 requests a run), Mooncake conversation (1,000), clients of ServeGen's "
    "m-large (3,000) and deepseek-r1 (1,000); arrivals: real, BurstGPT's generator fitted, Gamma CV 2 and 4, Poisson, "
    "all stretched to one mean rate.",
    constants=(
        ("model", "Llama-3.1-8B on one A100-80G"),
        *(
            (
                f"promises, {name}",
                f"TTFT {each.short_s:g} s up to {each.short_tokens:,} prompt tokens, else {each.long_s:g} s; "
                f"TPOT {each.tpot_s:g} s",
            )
            for name, each in WORKLOADS.items()
        ),
    ),
    traces=tuple(each.file for each in WORKLOADS.values()),
    prepare=prepare,
    plan=plan,
    work=work,
    judge=judge,
    draw=draw,
)
