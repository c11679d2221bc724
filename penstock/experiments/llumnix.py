"""Llumnix: what moving running requests between replicas saves.

Source: Sun et al., Llumnix: dynamic scheduling for large language model serving (OSDI 2024), and its artifact. Its
testbed was 16 A10s with LLaMA-7B and whole prompts in a step; here 16 modelled ones. Lengths of the paper are drawn
from its power laws by their published quantiles, between which they are log-linear (the means come out within 2 % of
those told):

    load        prompts and answers of mean 512 (L-L), Poisson, at shares of the rate up to which dispatch by memory
                (INFaaS++) gives first tokens within CALM_S in the mean, which `prepare` looks for
    azure       prompts of Azure's conversations, answers of mean 256, in the same way at that rate
    priorities  mean 128 (S-S), Gamma arrivals of CV 4 at the paper's 26 a second; one request in ten is urgent
    scaling     as load, at 0.6 of its rate, on 4 to 16 replicas, scaled by freeness, with and without moves

What replicas do is in lab.llumnix_fleet. Runs are as long as several of the longest answers, which take four minutes:
in shorter ones a fleet takes far more than it could for long, and then everything waits everywhere. So it was here at
first: 1,000 requests at 10.7 a second, where dispatch by memory preempted 7.5 % of them, and moves saved 12 to 19 % of
these. In runs of 3,000 the fleet is beyond what it can serve at half of that rate (seed 100: at 5 a second mean first
tokens after 24 s, and half of the replicas without room for whoever is next in 57 % of the time). What moves can save
is what is avoidable: there was room, in all, for everybody who waited.

Thresholds are the artifact's for distributions whose answers are long (10 blocks a job). They and the rule for the rate
were looked at with seeds from 97 on only. What headroom can win is little at the paper's rate: an urgent request alone
takes 33 ms a token on this card, and 35 to 37 among all others (mean of a run), 1.09 times at most. Requests do move
for it, over a thousand a run. At 2.6 and 3.7 times that rate headroom made them no faster (0.96 and 0.97 times on seed
100), while it cost usual ones a quarter.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

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
from penstock.lab.llumnix_fleet import BLOCK, BLOCKS, CARD, GB_S, REPLICAS, run_one
from penstock.lab.power_laws import URGENT, Conversations

URGENT_RATE, URGENT_CV = 26.0, 4.0
LOADS = (0.9, 1.0, 1.1, 1.2)
OTHERS = ("round-robin", "dispatch")
CALM_S = 1.0  # mean first token; one that waits for nobody takes 0.17 s
LOOKED_AT = (97, 98, 99)  # seeds of the search for the rate
FEWER, EARLIER, FASTER, SLOWER = 0.8, 3.0, 1.2, 1.05  # what the criterion asks

# ---------------------------------------------------------------------------- what is run


LOAD_LENGTHS = (512, 512)  # mean of prompts (None: Azure's) and of answers
AZURE_LENGTHS = (None, 256)
URGENT_LENGTHS = (128, 128)


def prepare(scale: Scale) -> Settings:
    """The highest rates at which dispatch by memory is calm."""
    return {
        "rate": _rate(scale, LOAD_LENGTHS, 2.0, 8.0),
        "azure_rate": _rate(scale, AZURE_LENGTHS, 3.0, 18.0),
    }


def _rate(scale: Scale, lengths: tuple[int | None, int], low: float, high: float) -> float:
    for _ in range(5):
        rate = (low * high) ** 0.5
        found = [
            run_one("least-kv", _conversations(scale, lengths, num=num, seed=seed, rate_per_s=rate))
            for seed in (LOOKED_AT if scale.is_full else LOOKED_AT[:1])
            for num in [_num(scale)]
        ]
        if mean([number(each, "ttft_mean_s") for each in found]) <= CALM_S:
            low = rate
        else:
            high = rate
    return round(low, 2)


def _num(scale: Scale) -> int:
    return 3000 if scale.is_full else 300


def _conversations(
    scale: Scale,
    lengths: tuple[int | None, int],
    *,
    num: int,
    seed: int,
    rate_per_s: float,
    cv: float | None = None,
) -> Conversations:
    prompts, answers = lengths
    path = None
    if prompts is None:
        path = scale.trace("azure_2023_conv.csv", "azure_2023_conv_200.csv")
    return Conversations(
        num=num,
        seed=seed,
        rate_per_s=rate_per_s,
        answers=answers,
        prompts=prompts,
        path=path,
        cv=cv,
    )


def plan(scale: Scale, prepared: Settings) -> Sequence[Settings]:
    rate, azure = number(prepared, "rate"), number(prepared, "azure_rate")
    num = _num(scale)
    loads = LOADS if scale.is_full else (1.0,)
    kinds: list[tuple[str, str, float, float, int]] = [
        ("load", variant, load, rate * load, num)
        for load in loads
        for variant in ("least-kv", "llumnix", *(OTHERS if load == 1.0 else ()))
    ]
    kinds += [("azure", variant, 1.0, azure, num) for variant in ("least-kv", "llumnix")]
    kinds += [("priorities", name, 1.0, URGENT_RATE, num) for name in ("plain", "headroom")]
    kinds += [("scaling", name, 0.6, rate * 0.6, num) for name in ("dispatch", "llumnix")]
    return [
        {"part": part, "variant": variant, "load": load, "rate": at, "num": count, "seed": seed}
        for part, variant, load, at, count in kinds
        for seed in scale.seeds
    ]


def work(settings: Settings, scale: Scale) -> Mapping[str, object]:
    part = str(settings["part"])
    lengths = {"azure": AZURE_LENGTHS, "priorities": URGENT_LENGTHS}.get(part, LOAD_LENGTHS)
    conversations = _conversations(
        scale,
        lengths,
        num=int(number(settings, "num")),
        seed=int(number(settings, "seed")),
        rate_per_s=number(settings, "rate"),
        cv=URGENT_CV if part == "priorities" else None,
    )
    variant = str(settings["variant"])
    if part != "scaling":
        return run_one(variant, conversations)
    return run_one(variant, conversations, replicas=REPLICAS, size={"least": 4, "most": REPLICAS})


# ---------------------------------------------------------------------------- judging


def judge(rows: Sequence[Row]) -> Verdict:
    loads = sorted({row.number("load") for row in rows if row.get("part") == "load"})
    places = [("load", load) for load in loads] + [("azure", 1.0)]
    ratios = [ratio for part, load in places for ratio in _at(rows, part, load)]
    best_at = max(loads, key=lambda load: mean(_earlier(rows, "load", load)))
    best, fewer = _earlier(rows, "load", best_at), _fewer(rows, "load", best_at)
    urgent = _paired(rows, "priorities", 1.0, "urgent_gap_s", "plain", "headroom")
    usual = _paired(rows, "priorities", 1.0, "usual_gap_s", "headroom", "plain")
    cost = _paired(rows, "scaling", 0.6, "replica_s", "llumnix", "dispatch")
    late = _paired(rows, "scaling", 0.6, "ttft_p99_s", "llumnix", "dispatch")
    ratios += [
        _ratio("priorities: urgent decode, without / with headroom", urgent, "1.2 to 1.5"),
        _ratio("priorities: usual decode, with / without headroom", usual, "up to 1.02"),
        _ratio("scaling: replica-seconds, with / without moves", cost, "0.64"),
        _ratio("scaling: P99 TTFT, with / without moves", late),
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
    why = "; ".join(told for _, told in checks)
    why += f". Replica-seconds with moves {mean(cost):.2f} of those without. {_where(rows, places)}"
    return Verdict(
        outcome=outcome_of(sum(held for held, _ in checks), 3), why=why, ratios=tuple(ratios)
    )


def _where(rows: Sequence[Row], places: Sequence[tuple[str, float]]) -> str:
    """Why it is as it is: where first tokens wait, and whether there is anywhere to move."""
    told = []
    for part, load in places:
        figures = []
        for variant in ("least-kv", "llumnix"):
            at = [
                row
                for row in rows
                if (row.get("part"), row.get("load"), row.get("variant")) == (part, load, variant)
            ]
            ttft, gone, avoidable, full = (
                mean([row.number(name) for row in at])
                for name in ("ttft_p99_s", "preempted", "avoidable", "full")
            )
            figures.append(
                f"{variant} P99 TTFT {ttft:.1f} s, {gone:.1%} preempted ({avoidable:.0%} avoidable), full {full:.0%}"
            )
        told.append(f"{part} {load:g}: {', '.join(figures)}")
    return "; ".join(told)


def _ratio(name: str, values: tuple[float, ...], published: str = "", unit: str = "x") -> Ratio:
    return Ratio(name=name, values=values, published=published, unit=unit)


def _at(rows: Sequence[Row], part: str, load: float) -> list[Ratio]:
    found = [
        _ratio(f"{part} {load:g}: P99 TTFT, least-kv / {each}", _earlier(rows, part, load, each))
        for each in (OTHERS if (part, load) == ("load", 1.0) else ())
    ]
    slow = _paired(rows, part, load, "gap_p99_s", "least-kv", "llumnix")
    mean_s = _paired(rows, part, load, "ttft_mean_s", "least-kv", "llumnix")
    return [
        *found,
        _ratio(
            f"{part} {load:g}: P99 TTFT, least-kv / llumnix",
            _earlier(rows, part, load),
            "up to 14.8",
        ),
        _ratio(f"{part} {load:g}: mean TTFT, least-kv / llumnix", mean_s, "up to 7.7"),
        _ratio(f"{part} {load:g}: P99 of mean gaps, least-kv / llumnix", slow, "up to 2"),
        _ratio(f"{part} {load:g}: preemptions gone", _fewer(rows, part, load), unit=""),
    ]


def _paired(
    rows: Sequence[Row], part: str, load: float, figure: str, over: str, under: str
) -> tuple[float, ...]:
    at = {"part": part, "load": load}
    return paired(rows, figure, {**at, "variant": over}, {**at, "variant": under})


def _earlier(
    rows: Sequence[Row], part: str, load: float, variant: str = "llumnix"
) -> tuple[float, ...]:
    return _paired(rows, part, load, "ttft_p99_s", "least-kv", variant)


def _fewer(rows: Sequence[Row], part: str, load: float) -> tuple[float, ...]:
    left = _paired(rows, part, load, "preempted", "llumnix", "least-kv")
    return tuple(1 - share for share in left)


EXPERIMENT = Experiment(
    name="llumnix",
    system="Llumnix: running requests move between replicas",
    source="Llumnix (OSDI 2024), AlibabaPAI/llumnix v1",
    claim="Against dispatch by memory (INFaaS++): P99 first tokens up to 15 times earlier (mean ones 7.7), urgent "
    "requests 1.5 times faster, 36 % fewer replicas at the same P99.",
    criterion=f"At the load where it helps most: P99 TTFT at least {EARLIER:g} times better than by memory and "
    f"{FEWER:.0%} of preemptions gone; with headroom urgent decodes {FASTER:g} times faster and usual ones at most "
    f"{SLOWER:g} times as long.",
    workload=f"{REPLICAS} replicas; prompts and answers of mean 512 by the paper's power laws (L-L), Poisson at "
    f"{', '.join(f'{load:g}' for load in LOADS)} of the rate up to which dispatch by memory gives first tokens within "
    f"{CALM_S:g} s in the mean of three other seeds, 3,000 requests; Azure's prompts with answers of mean 256 in the "
    f"same way; for priorities mean 128 (S-S) at {URGENT_RATE:g}/s, Gamma CV {URGENT_CV:g}, one in {URGENT} urgent.",
    constants=(
        ("KV memory", f"{BLOCKS * BLOCK:,} tokens a replica in blocks of {BLOCK}, no prefix cache"),
        ("between replicas", f"{GB_S:g} GB/s each way, 0.1 ms; reports every 0.1 s"),
        (
            "SIMULATED",
            f"LLaMA-7B on modelled {CARD}s, whole prompts in a step; scheduler time from the stored profile",
        ),
    ),
    prepare=prepare,
    plan=plan,
    work=work,
    judge=judge,
    traces=("azure_2023_conv.csv",),
    compares_schedulers=False,
)
