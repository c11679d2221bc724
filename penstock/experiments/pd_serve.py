"""P/D-Serve: prompts go where somebody takes them at once, and roles follow what traffic asks for.

Source: P/D-Serve (2024), on Ascend devices; known from descriptions, most of its figures are normalised.

Two of its three parts are asked for here; the third, KV sent in one piece, is a matter of real memory and not of this
simulator.

    forwarding   8 replicas that prefill, each one prompt at a time; a promise of 1 s; whoever would be late is refused
                 before it is computed, under every policy. Reports of load are 0.1 or 1 s old, or corrected by what was
                 sent since (ledger), or fresh; on-demand sees none, and asks. "ideal" is no policy but a queue worked
                 out here: everybody goes where the work ends first, known to the millisecond, and whoever would be late
                 there is refused on arrival. (In earlier results "fresh" stood for it, 4 points below: there a prompt
                 counts in a replica's load until it is refused, and one under way counts whole)
    ratio        8 replicas with roles; conversations, then code. Static 4:4 against roles that follow, and against the
                 best static split of each half (oracle), which nobody can know. Conversations are served well by
                 4:4, code by 6:2 or 7:1 only, so all is won or lost by how soon roles change; the window of `balance`
                 was chosen on seeds 100 and 101

NOTED are shares of requests within the promise from a smaller simulation of the same rules, on the whole code trace.
Of that trace the repository holds 191 requests. Lengths are drawn from these; arrivals come in bursts (on_off) whose
index of dispersion at 60 s is the trace's, 160, played faster to reach a load.

Steps cost what DistServe published for OPT-13B on one A100-80G, extrapolated past its 2,048 positions, on a shape that
holds such prompts; decodes below 95 jobs, and constants of both kinds of step taken as one.
"""

from __future__ import annotations

import tempfile
from collections.abc import Mapping, Sequence
from functools import cache
from heapq import heapreplace
from itertools import islice
from pathlib import Path
from typing import TYPE_CHECKING

from penstock.assemble import Config, load_config
from penstock.cost.linear_five import read_linear_five
from penstock.cost.profile import Profile
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
)
from penstock.lab.sent import TPOT_S, TTFT_S, Kept, Sent
from penstock.lab.simulate import simulate
from penstock.traffic.arrivals import OnOff, Poisson
from penstock.traffic.lengths import Empirical

if TYPE_CHECKING:
    from matplotlib.figure import Figure

CONV, CONV_SAMPLE, CODE_SAMPLE = (
    "azure_2023_conv.csv", "azure_2023_conv_200.csv", "azure_2023_code_191.csv",
)  # fmt: skip
REPLICAS, LONGEST = 8, 7436  # the longest prompt of the code trace
RATE, DISPERSION, ON_SHARE = 2.57, 160.0, 0.25  # of the code trace, at 60 s; the share is a guess
MEAN_ON_S = 17.4  # gives that dispersion, see OnOff
LOADS = (0.36, 0.71)
IDEAL = "ideal"
FORWARDING: dict[
    str, tuple[dict[str, object], float]
] = {  # policy and counts, seconds between reports
    "round-robin": ({"route": "round-robin"}, 0.1),
    "shortest, 0.1 s": ({"route": "least-tokens", "counts": False}, 0.1),
    "shortest, 1 s": ({"route": "least-tokens", "counts": False}, 1.0),
    "ledger, 1 s": ({"route": "least-tokens", "counts": True}, 1.0),
    IDEAL: ({}, 0.0),
    "on-demand": ({"route": {"name": "on-demand", "retry_s": 0.02}, "max_open": 1}, 1.0),
    "fresh": ({"route": "least-tokens", "counts": True}, 0.005),
}
NOTED = {  # load: percent within the promise, in the order of FORWARDING as far as it goes
    0.36: (83.4, 77.6, 72.6, 85.8, 85.8, 85.7),
    0.71: (72.8, 63.0, 56.8, 75.7, 75.8, 75.5),
}
RATIOS: dict[str, dict[str, object] | None] = {
    "static 4:4": None,
    "balance": {
        "name": "pd-ratio",
        "fixed_s": 0.02,
        "token_s": 1.3e-4,
        "step_s": 0.045,
        "window_s": 4,
        "every_s": 1,
        "most": 3,
    },
    "trend": {"name": "pd-ratio", "rule": "trend", "window_s": 15, "every_s": 2},
}
SPLITS = {"conv": (2, 3, 4), "code": (5, 6, 7)}  # replicas that prefill, tried for the oracle
RATES = {"conv": 13.0, "code": 18.0}  # requests/s
FAR, NEAR, GAIN = 10.0, 1.0, 1.4


@cache
def step_terms() -> tuple[tuple[str, float], ...]:
    """OPT-13B on one card, in the terms of a profile: exact for whole prompts alone, and for decodes below 95."""
    file = read_linear_five()
    row = next(
        row for row in file.row if (row.engine, row.model, row.tp) == ("distserve", "opt-13b", 1)
    )
    (first, each, square), (_, context, job) = row.prefill, row.few
    ms = {
        "step": first + file.step_ms,
        "prefill_context": each - square + file.token_ms,
        "prefill_pairs": 2 * square,
        "decode_context": context + file.token_ms,
        "decode_to_4": job,
        "decode_to_16": job,
        "decode_past_16": job,
    }
    return tuple((name, 1e-3 * value) for name, value in ms.items())


def prompt_s(tokens: int) -> float:
    terms = dict(step_terms())
    pairs = tokens * (tokens + 1) / 2
    return terms["step"] + terms["prefill_context"] * tokens + terms["prefill_pairs"] * pairs


@cache
def lengths_of(phase: str, scale: Scale) -> Empirical:
    path = SAMPLES / CODE_SAMPLE if phase == "code" else scale.trace(CONV, CONV_SAMPLE)
    pairs = Empirical(path=path).table().tolist()
    return Empirical.of((min(prompt, LONGEST), output) for prompt, output in pairs)


def burst(load: float, num: int, seed: int, scale: Scale) -> Sent:
    """Code prompts alone, in bursts, so that 8 replicas are at work `load` of the time."""
    lengths = lengths_of("code", scale)
    pairs = lengths.first(num, seed).tolist()
    service_s = mean(prompt_s(prompt) for prompt, _ in lengths.table().tolist())
    speed = load * REPLICAS / service_s / RATE
    process = OnOff(
        on_rate_per_s=RATE / ON_SHARE,
        mean_on_s=MEAN_ON_S,
        mean_off_s=MEAN_ON_S * (1 / ON_SHARE - 1),
    )
    instants = islice(process.instants(seed), num)
    return Sent([(at / speed, prompt, 1) for at, (prompt, _) in zip(instants, pairs, strict=True)])


def spliced(phases: Sequence[str], span_s: float, seed: int, scale: Scale) -> Sent:
    """Poisson, one phase after the other, `span_s` each."""
    rows: list[tuple[float, int, int]] = []
    for place, phase in enumerate(phases):
        num = round(RATES[phase] * span_s)
        instants = islice(Poisson(rate_per_s=RATES[phase]).instants(seed + place), num)
        pairs = lengths_of(phase, scale).first(num, seed).tolist()
        rows += [
            (span_s * place + at, prompt, output)
            for at, (prompt, output) in zip(instants, pairs, strict=True)
        ]
    return Sent(sorted(rows))


def fleet_of(folder: Path, report_s: float, **more: object) -> Config:
    profile = folder / "opt-13b.json"
    told = Profile(
        model="opt-13b",
        num_layers=32,
        steps=dict(step_terms()),
        num_steps=0,
        mape=0.0,
        left_out=0.0,
    )
    told.save(profile)
    settings: dict[str, object] = {
        "name": "default",
        "replicas": REPLICAS,
        "executor": {"kind": "modelled", "gpu": "a100-80g", "profile": str(profile)},
        "cache": {"prefix": False},
        **more,
    }
    flags = {f"fleet.0.{name}": value for name, value in settings.items()}
    net = {"net.latency_s": 0.001, "net.report_s": report_s, "net.bytes_per_s": 20e9}
    return load_config(model="llama-3.1-8b", flags={**flags, **net})


def in_time(rows: Sequence[tuple[float, int, int]]) -> int:
    """Prompts that are, where each goes to the replica that is free first and none is begun that would be late."""
    free_at, num = [0.0] * REPLICAS, 0
    for at, prompt, _ in rows:
        end = max(at, free_at[0]) + prompt_s(prompt)
        if end <= at + TTFT_S:
            heapreplace(free_at, end)
            num += 1
    return num


def forwarded(settings: Settings, scale: Scale, folder: Path) -> float:
    """Per cent of all that came."""
    num = int(number(settings, "num"))
    sent = burst(number(settings, "load"), num, int(number(settings, "seed")), scale)
    if settings["variant"] == IDEAL:
        return 100 * in_time(sent.rows) / num
    told, report_s = FORWARDING[str(settings["variant"])]
    more = dict(told)
    terms = dict(step_terms())
    policy: dict[str, object] = {
        "preset": "vllm-v1",
        "batch": {"name": "prefill-first", "max_jobs": 1, "max_tokens": 1 << 20},
        "admit": {
            "name": "in-time",
            "fixed_s": terms["step"],
            "token_s": terms["prefill_context"] + terms["prefill_pairs"] / 2,
            "square_s": terms["prefill_pairs"] / 2,
        },
        "route": more.pop("route"),
    }
    if "counts" in more:
        more["dispatch"] = {"counts": more.pop("counts"), "foresees": report_s < 0.01}
    config = fleet_of(folder, report_s, policy=policy, **more)
    kept = Kept()
    simulate(config, sent, has_gaps=False, listeners=(kept,))
    return 100 * kept.num / num


def served(settings: Settings, scale: Scale, folder: Path) -> tuple[int, int]:
    """Requests within both promises, of the first half and of the second (or of the only phase)."""
    variant, span_s = str(settings["variant"]), number(settings, "span_s")
    phases = [str(settings["phase"])] if "phase" in settings else ["conv", "code"]
    prefill = int(number(settings, "prefill")) if "prefill" in settings else REPLICAS // 2
    policy: dict[str, object] = {
        "preset": "vllm-v1",
        "batch": {"name": "prefill-first", "max_tokens": 8192, "max_jobs": 94},
        "route": "least",
    }
    scaler = RATIOS.get(variant)
    more: dict[str, object] = {}
    if scaler is not None:
        policy["scale"] = scaler
        more["size"] = {"least": REPLICAS, "most": REPLICAS}
    config = fleet_of(
        folder,
        0.1,
        policy=policy,
        roles={"prefill": prefill, "decode": REPLICAS - prefill},
        **more,
    )
    kept = Kept(split_at=span_s)
    sent = spliced(phases, span_s, int(number(settings, "seed")), scale)
    simulate(config, sent, has_gaps=False, listeners=(kept,))
    return kept.by_half[0], kept.by_half[1]


def plan(scale: Scale, prepared: Settings) -> Sequence[Settings]:
    num, span_s = (400, 45.0) if scale.is_full else (150, 15.0)
    loads = LOADS if scale.is_full else LOADS[1:2]
    found: list[Settings] = []
    for seed in scale.seeds:
        found += [
            {"part": "forwarding", "variant": name, "load": load, "num": num, "seed": seed}
            for load in loads
            for name in FORWARDING
        ]
        part = {"part": "ratio", "span_s": span_s, "seed": seed}
        found += [{**part, "variant": name} for name in RATIOS]
        found += [
            {**part, "variant": "static", "phase": phase, "prefill": split}
            for phase, splits in SPLITS.items()
            for split in splits
        ]
    return found


def work(settings: Settings, scale: Scale) -> Mapping[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        if settings["part"] == "forwarding":
            return {"within": forwarded(settings, scale, Path(folder))}
        first, second = served(settings, scale, Path(folder))
        return {"kept": first + second, "first": first, "second": second}


# ---------------------------------------------------------------------------- the verdict


def within(rows: Sequence[Row], load: float, name: str) -> dict[object, float]:
    return by_seed(rows, "within", part="forwarding", load=load, variant=name)


def oracle(rows: Sequence[Row]) -> dict[object, float]:
    """Kept by the best static split of each phase, by seed."""
    total: dict[object, float] = {}
    for phase, splits in SPLITS.items():
        best: dict[object, float] = {}
        for split in splits:
            for seed, kept in by_seed(
                rows, "kept", variant="static", phase=phase, prefill=split
            ).items():
                best[seed] = max(best.get(seed, 0.0), kept)
        for seed, kept in best.items():
            total[seed] = total.get(seed, 0.0) + kept
    return total


def judge(rows: Sequence[Row]) -> Verdict:
    ratios: list[Ratio] = []
    far, near = [], []
    for load in LOADS:
        asked = within(rows, load, "on-demand")
        for place, name in enumerate(FORWARDING):
            shares = within(rows, load, name)
            if shares:
                noted = f"{NOTED[load][place]} (noted)" if place < len(NOTED[load]) else ""
                values = tuple(shares.values())
                ratios.append(
                    Ratio(
                        name=f"load {load}: within, {name}",
                        values=values,
                        published=noted,
                        unit="%",
                    )
                )
        if asked:
            far.append(mean(asked.values()) - mean(within(rows, load, "shortest, 1 s").values()))
            near.append(mean(asked.values()) - mean(within(rows, load, IDEAL).values()))
    static = by_seed(rows, "kept", part="ratio", variant="static 4:4")
    known = {name: by_seed(rows, "kept", part="ratio", variant=name) for name in RATIOS}
    known["oracle"] = oracle(rows)
    gains = {}
    for name, kept in known.items():
        if name != "static 4:4" and static:
            values = tuple(
                kept[seed] / static[seed] for seed in sorted(static, key=str) if static[seed]
            )
            ratios.append(
                Ratio(name=f"conversations, then code: kept, {name} / static 4:4", values=values)
            )
            gains[name] = mean(values)
    best = max(gains.get("balance", 0.0), gains.get("trend", 0.0))
    parts = {
        f"on-demand at least {FAR:g} points above queues told 1 s late, at every load": min(far)
        >= FAR,
        f"on-demand within {NEAR:g} point of the ideal": max(map(abs, near)) <= NEAR,
        f"roles that follow keep at least {GAIN:g} times what 4:4 keeps": best >= GAIN,
    }
    why = "; ".join(f"{part}: {'yes' if holds else 'no'}" for part, holds in parts.items())
    why += (
        f". Points above late queues: {', '.join(f'{each:.1f}' for each in far)}; from the ideal: "
    )
    why += ", ".join(f"{each:+.1f}" for each in near)
    return Verdict(
        outcome=outcome_of(sum(parts.values()), len(parts)), why=why, ratios=tuple(ratios)
    )


def draw(rows: Sequence[Row], figure: Figure) -> None:
    """Within the promise by load, and what was kept by who decides the ratio."""
    left, right = figure.subplots(1, 2)
    for name in FORWARDING:
        known = [(load, within(rows, load, name)) for load in LOADS]
        points = [(load, mean(shares.values())) for load, shares in known if shares]
        left.plot(*zip(*points, strict=True), marker="o", label=name)
    left.set_xlabel("load of the prefill replicas")
    left.set_ylabel(f"per cent with a first token within {TTFT_S:g} s")
    left.legend(fontsize=8)
    kept = {name: by_seed(rows, "kept", part="ratio", variant=name) for name in RATIOS}
    kept["oracle"] = oracle(rows)
    right.bar(list(kept), [mean(each.values()) for each in kept.values()])
    right.set_ylabel("requests within both promises")


EXPERIMENT = Experiment(
    name="pd-serve",
    system="P/D-Serve: on-demand forwarding, and a P:D ratio that follows",
    source="P/D-Serve (2024)",
    claim="Asking replicas one after the other instead of trusting reports of their queues raises the share "
    "of first tokens in time by up to 42 points, and tuning the ratio of prefill to decode the throughput by 60 %.",
    criterion=f"At each of two loads on-demand keeps at least {FAR:g} points more than the shortest queue by "
    f"reports of 1 s, and is within {NEAR:g} point of the ideal, which knows to the millisecond where work ends first; "
    f"on conversations, then code, roles that follow keep at least {GAIN:g} times as many requests within both "
    f"promises as 4:4.",
    workload="Forwarding: 400 prompts of Azure's code trace (lengths drawn from 191), in bursts, 8 prefill replicas. "
    "Ratio: 45 s of conversations at 13/s, then 45 s of code at 18/s, Poisson, 8 replicas.",
    constants=(
        ("step times", "published for OPT-13B, DistServe's engine, on one A100-80G; extrapolated past 2,048 positions"),
        ("promises", f"TTFT {TTFT_S:g} s, TPOT {TPOT_S:g} s; in forwarding whoever would be late is refused unserved"),
        ("arrivals", "on_off, a quarter of the time on, index of dispersion 160 at 60 s as the code trace's"),
        ("links", "1 ms each way (a refusal costs 2), KV at 20 GB/s; asked again every 20 ms, and when one ended"),
    ),
    traces=(CONV,),
    plan=plan,
    work=work,
    judge=judge,
    draw=draw,
    compares_schedulers=False,
)  # fmt: skip
