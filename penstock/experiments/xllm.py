"""xLLM: roles that follow the load, offline work in what online work leaves, experts dealt out anew.

Source: xLLM (JD, 2025; report arXiv:2510.14686) and jd-opensource/xllm, xllm-service. Claims that need no
accelerator, each a part of its own:

    roles      8 replicas, either promised first tokens and paces kept by 90 % of the answers: the highest mean rate of
               roles that change (route and scale "xllm") over fixed splits under least load, on traffic like Azure's
               code trace, on its conversations, and on one after the other
    offline    online conversations at a rate that one replica keeps its promises at, beside a supply of offline prompts
               without end: offline tokens a second in what each step leaves (batch "leftover") over those of offline
               work that runs only while nobody is online
    evictions  little memory and many conversations: admission that looks 256 tokens ahead against one that takes
               whoever fits now; how often jobs are preempted in a crowd, and the rate at which promises are kept
    experts    peak over mean load of devices, experts placed by EPLB from half of the sequences and tested on the other

The source compares with "minimal load" and does not say in which split; here it is the even one, which is what a fleet
has that knows nothing of its traffic. At first the gate of 1.3 was over the *best* fixed split, found by trying all on
the traffic itself. No roles can pass that: prompts of the code trace are some five times the work of its answers, so
all eight replicas, busy all the time, would hardly serve a fifth more than 6:2 (lab.stage_work; `why` has the figures).
Roles that change must not serve less than the best split, though.

What cannot be repeated: Ascend devices, JD's traffic, and Azure's code trace whole: the repository holds 191 requests
of it, which lengths are drawn from; that it comes in bursts is imitated by switching arrivals on and off. The encode
role is an experiment of its own (xllm_encode).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from penstock.core.types import Slo
from penstock.lab.beside import OFFLINE, beside
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
from penstock.lab.expert_balance import DEVICES, PLANS, Balance
from penstock.lab.role_flips import Turns, flips, work_of
from penstock.lab.stage_work import StageWork
from penstock.lab.zero_evict import ADMISSIONS, crowd

CONV, CONV_SAMPLE, CODE_SAMPLE = (
    "azure_2023_conv.csv", "azure_2023_conv_200.csv", "azure_2023_code_191.csv",
)  # fmt: skip
TRAFFIC = {"code": ("code",), "conv": ("conv",), "shift": ("conv", "code")}
SPLITS = {
    "code": ("7:1", "6:2", "5:3", "4:4"),
    "conv": ("5:3", "4:4", "3:5", "2:6"),
    "shift": ("6:2", "5:3", "4:4", "3:5"),
}
PROMISE = Slo(ttft_s=1.0, tpot_s=0.05)
EVEN = "4:4"
WON = {"code": 1.3, "conv": 1.0}  # over the even split
OFFLINE_WON, ONLINE_KEPT = 1.5, 0.99
RATE_KEPT = 0.97  # of what is served without looking ahead
EXPERTS_WON = {8: 1.35, 16: 1.7}


def plan(scale: Scale, prepared: Settings) -> Sequence[Settings]:
    found: list[Settings] = []
    for seed in scale.seeds:
        for traffic, splits in SPLITS.items():
            for variant in ("xllm", *splits, "together"):
                num = (200 if traffic == "shift" else 400) if scale.is_full else 150
                found.append({"part": "roles", "traffic": traffic, "variant": variant,
                              "num": num, "seed": seed})  # fmt: skip
        for variant in OFFLINE:
            num = 200 if scale.is_full else 60
            found.append({"part": "offline", "variant": variant, "num": num, "seed": seed})
        for variant in ADMISSIONS:
            num = 300 if scale.is_full else 80
            found.append({"part": "evictions", "variant": variant, "num": num, "seed": seed})
        if scale.data is not None:
            found.append({"part": "experts", "variant": "eplb", "seed": seed})
    return found


def work(settings: Settings, scale: Scale) -> Mapping[str, object]:
    seed, variant = int(number(settings, "seed")), str(settings["variant"])
    if settings["part"] == "experts":
        return Balance(scale, seed).figures()
    conv = scale.trace(CONV, CONV_SAMPLE)
    num = int(number(settings, "num"))
    if settings["part"] == "offline":
        return beside(variant, conv=conv, num=num, seed=seed)
    if settings["part"] == "evictions":
        return crowd(variant, conv=conv, num=num, seed=seed)
    offered = Turns(
        kinds=TRAFFIC[str(settings["traffic"])],
        code=SAMPLES / CODE_SAMPLE,
        conv=conv,
        num=num,
        rate_per_s=1.0,
        seed=seed,
        slo=PROMISE,
    )
    work = work_of(offered)
    return {**flips(variant, offered).figures(), **work._asdict()}


# ---------------------------------------------------------------------------- the verdict


def best_split(rows: Sequence[Row], traffic: str) -> str | None:
    """The fixed roles with the highest mean rate."""
    rates = {
        split: mean(by_seed(rows, "rate", part="roles", traffic=traffic, variant=split).values())
        for split in SPLITS[traffic]
    }
    known = {split: rate for split, rate in rates.items() if rate == rate}
    return max(known, key=lambda split: known[split]) if known else None


def roles_ratios(rows: Sequence[Row], traffic: str) -> list[Ratio]:
    """Changing roles over the best fixed ones, over all others, and over no roles at all."""
    best = best_split(rows, traffic)
    if best is None:
        return []
    published = {"code": "1.67 (over minimal load)", "conv": "1.1 (over minimal load)"}
    here: dict[str, object] = {"part": "roles", "traffic": traffic}
    return [
        Ratio(
            name=f"{traffic}: rate, roles that change / {under}",
            values=paired(rows, "rate", {**here, "variant": "xllm"}, {**here, "variant": under}),
            published=published.get(traffic, "") if under == EVEN else "",
        )
        for under in (best, *(split for split in SPLITS[traffic] if split != best), "together")
    ]


def bound_told(rows: Sequence[Row], traffic: str) -> str:
    """How much more than fixed splits any roles could serve, by the work of prompts and answers alone."""
    where: dict[str, object] = {"part": "roles", "traffic": traffic, "variant": "xllm"}
    prompts, answers = (by_seed(rows, name, **where) for name in StageWork._fields)
    if not prompts:
        return f"{traffic}: the work of its stages was not noted"
    told = []
    for split in SPLITS[traffic]:
        first, _, second = split.partition(":")
        most = mean(
            StageWork(prompts[seed], answers[seed]).most_over(int(first), int(second))
            for seed in prompts
        )
        told.append(f"{split} {most:.2f}")
    ratio = mean(prompts[seed] / answers[seed] for seed in prompts)
    return (
        f"{traffic}: prompts are {ratio:.2f} times the work of answers, which allows any roles at most so many times "
        f"the rate of {', '.join(told)}"
    )


def experts_ratio(rows: Sequence[Row], plan: str, devices: int) -> Ratio:
    where = {"part": "experts"}
    before = by_seed(rows, f"contiguous {devices}", **where)
    after = by_seed(rows, f"{plan} {devices}", **where)
    values = tuple(before[seed] / after[seed] for seed in sorted(before, key=str))
    return Ratio(name=f"{devices} devices: peak load, contiguous / {plan}", values=values)


def experts_told(rows: Sequence[Row]) -> str:
    """The table of peaks over means."""
    lines = []
    for devices in DEVICES:
        told = []
        for each in PLANS:
            known = by_seed(rows, f"{each} {devices}", part="experts")
            told.append(f"{each} {mean(known.values()):.3f}")
        lines.append(f"{devices} devices: {', '.join(told)}")
    return "Peak over mean: " + "; ".join(lines)


def offline_told(rows: Sequence[Row]) -> str:
    told = []
    for variant in OFFLINE:
        where = {"part": "offline", "variant": variant}
        tokens = mean(by_seed(rows, "offline_tokens_per_s", **where).values())
        kept = mean(by_seed(rows, "attainment", **where).values())
        told.append(f"{variant} {tokens:.0f} tokens/s at {100 * kept:.1f} % online")
    return "Offline: " + "; ".join(told)


def evictions_told(rows: Sequence[Row]) -> tuple[Ratio, Mapping[str, bool], str]:
    """The ratio of rates, what holds, and how often jobs were preempted; "" where that part was not run."""
    looking, greedy = ({"part": "evictions", "variant": name} for name in ADMISSIONS)
    ratio = Ratio(
        name="rate: admission 256 tokens ahead / of whoever fits",
        values=paired(rows, "rate", looking, greedy),
    )
    if not ratio.values:
        return ratio, {}, ""
    evicted = [by_seed(rows, "preemptions", **where).values() for where in (looking, greedy)]
    holds = {
        "evictions: none": not any(evicted[0]),
        f"evictions: at least {RATE_KEPT:g} of the rate": ratio.mean >= RATE_KEPT,
    }
    pairs = zip(ADMISSIONS, evicted, strict=True)
    told = ", ".join(f"{name} {mean(times):.1f}" for name, times in pairs)
    return ratio, holds, f"Preemptions in a crowd: {told}"


def judge(rows: Sequence[Row]) -> Verdict:
    ratios: list[Ratio] = []
    parts: dict[str, bool] = {}
    told: list[str] = []
    for traffic in SPLITS:
        found = roles_ratios(rows, traffic)
        ratios += found
        if found and traffic in WON:
            even = next(each for each in found if each.name.endswith(EVEN))
            parts[f"{traffic}: at least {WON[traffic]:g} times the even split"] = (
                even.mean >= WON[traffic]
            )
            parts[f"{traffic}: no less than the best fixed roles"] = found[0].mean >= 1.0
            told.append(bound_told(rows, traffic))
    pair = [{"part": "offline", "variant": name} for name in ("leftover", "only when idle")]
    gained = Ratio(
        name="offline tokens/s: leftover / only when idle",
        values=paired(rows, "offline_tokens_per_s", *pair),
        published="up to 3 (offline throughput)",
    )
    if gained.values:
        ratios.append(gained)
        kept = by_seed(rows, "attainment", **pair[0])
        # Of all seeds together: "only when idle" writes next to nothing with some of them.
        ours, theirs = (
            sum(by_seed(rows, "offline_tokens_per_s", **each).values()) for each in pair
        )
        parts[f"offline: at least {OFFLINE_WON:g} times, over all seeds"] = (
            ours >= OFFLINE_WON * theirs
        )
        parts[f"offline: {100 * ONLINE_KEPT:.0f} % of online promises kept"] = (
            mean(kept.values()) >= ONLINE_KEPT
        )
        told.append(offline_told(rows))
    ratio, passed, said = evictions_told(rows)
    if said:
        ratios.append(ratio)
        parts |= passed
        told.append(said)
    if by_seed(rows, "contiguous 8", part="experts"):
        for devices, least in EXPERTS_WON.items():
            ratios.append(experts_ratio(rows, "held-out", devices))
            parts[f"experts: at least {least:g} on {devices} devices"] = ratios[-1].mean >= least
            ratios.append(experts_ratio(rows, "other tasks", devices))
        told.append(experts_told(rows))
    why = "; ".join(f"{part}: {'yes' if holds else 'no'}" for part, holds in parts.items())
    return Verdict(
        outcome=outcome_of(sum(parts.values()), len(parts)),
        why=". ".join([why, *told]),
        ratios=tuple(each for each in ratios if each.values),
    )


EXPERIMENT = Experiment(
    name="xllm",
    system="xLLM: dynamic roles, offline work beside online, expert balance",
    source="xLLM (JD, 2025), jd-opensource/xllm and xllm-service",
    claim="Roles that follow the load serve 1.67 times the requests of minimal load on Azure's code trace and 1.1 "
    "times on its conversations; offline work beside online work yields up to 3 times the offline throughput; "
    "experts are rebalanced while serving.",
    criterion=f"Roles: on code at least {WON['code']:g} times the rate of an even split under least load, on "
    f"conversations at least {WON['conv']:g} times, and on both no less than the best fixed split. "
    f"Offline: at least {OFFLINE_WON:g} times the tokens of 'only when idle' with {100 * ONLINE_KEPT:.0f} % of online "
    "promises kept. Evictions: none where admission looks ahead, at 0.97 of the rate at least. Experts: peak load over "
    "contiguous at least 1.35 times lower on 8 devices and 1.7 on 16, on tokens that the plan was not made from.",
    workload="Roles: 400 requests (shift: 200 and 200), 90 % within 1 s and 50 ms; code: lengths of 191 requests, "
    "Poisson in stays of 10 s with pauses of 20 s; conversations: Azure's own arrivals, stretched; prompts cut at "
    "2,048 with their answers. Offline: 200 conversations, 0.5 a second, 1 s and 60 ms. Evictions: 300 "
    "conversations, 1,000 blocks, 2 s and 60 ms; preemptions at 3.1 a second. Experts: routing of four tasks in five "
    "layers, halves drawn by seed.",
    constants=(
        ("replicas", "OPT-13B on A100-80G each, step times that DistServe published; 200 GB/s for keys and values"),
        ("fixed roles", "least requests on either side, chunks of 2,048 tokens, as all others"),
        ("packing", "decode replicas up to 0.7 of the promised pace (source: 1.0)"),
        ("EPLB", "one redundant slot a device; 'lpt' without one; in-sample plans know the tested tokens"),
    ),
    traces=(CONV, "expert_traces/intent_layer2.txt.gz"),
    plan=plan,
    work=work,
    judge=judge,
    compares_schedulers=False,
)  # fmt: skip
