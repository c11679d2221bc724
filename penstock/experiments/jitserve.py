"""JITServe: as much service as each request needs to be in time, against orders by arrival, deadline and slack.

Source: JITServe (readers' notes of the paper; UIUC-MLSys/JITServe, a fork of vLLM). They served four models on 16
A100s: chat, deep research, agentic code and math at the arrivals of a Microsoft trace, with the P95 of a commercial API
for promises, and report 1.4 to 6.3 times the goodput of others, 3 to 9 % below that of known lengths. Here the mix, its
promises and its limits are those of an independent simulation of the same policies: half of the arrivals are streams
(first token in 2 s, then one every 100 ms), three of ten answers are due in 20 s, the others are agent runs of 3 to 6
calls in a row with 13.3 s for each and half a second of a tool between them; ShareGPT's lengths; bursty arrivals; 64
sequences and 512 tokens a step. Prompts of ShareGPT's lengths come without text, so no predictor can be learned from
them: lengths are the conditional quantiles of recent answers, and what a better predictor would bring is bracketed by
one that knows (no predictor is better) and one whose error is lognormal.

Goodput: see penstock.lab.promised. Load is a share of what first come, first served writes a second when far more than
that is asked for, in arrivals of the mean number of tokens.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING

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
from penstock.lab.promised import in_time, requests_of
from penstock.lab.promised_mix import (
    GUESS,
    MOST_TOKENS,
    TAUGHT,
    TAUGHT_RUNS,
    change_of,
    offers_of,
)
from penstock.lab.trial import deployment

if TYPE_CHECKING:
    from matplotlib.figure import Figure

TRACE = "sharegpt_lengths.csv"
SEQUENCES, STEP_TOKENS = 64, 512
WINDOW_S = 200.0
LOADS = (1.0, 1.4, 2.0)
PAST = LOADS[1:]
BETTER = {1.4: 1.4, 2.0: 2.0}  # of the goodput of FCFS, by load
NEAR_TRUTH, VIOLATED = 0.9, 0.07

VLLM = {"name": "vllm-v1", "max_jobs": SEQUENCES, "max_tokens": STEP_TOKENS}
JIT = {"name": "jit", "max_sequences": SEQUENCES, "max_tokens": STEP_TOKENS}
DENSITY = {"name": "jit-density", "slots": SEQUENCES, "step_tokens": STEP_TOKENS}
POLICIES: dict[str, dict[str, object]] = {
    "vllm-512": {"batch": VLLM},
    "vllm-2048": {"batch": {**VLLM, "max_tokens": 2048}},
    "sglang": {"preset": "sglang", "batch": {"name": "sglang", "max_jobs": SEQUENCES}},
    "edf": {"batch": VLLM, "order": "edf"},
    "s-edf": {"batch": VLLM, "order": "slack-edf"},
    "jitserve": {"preset": "jitserve", "batch": JIT, "order": DENSITY},
}
MORE: dict[str, dict[str, object]] = {
    "s-edf P95": {"batch": VLLM, "order": {"name": "slack-edf", "quantile": 0.95}},
    "jit-density": {"batch": VLLM, "order": DENSITY},
    "by bandwidth": {"batch": {**JIT, "rank_by": "bandwidth"}, "order": DENSITY},
    "jitserve, guess": POLICIES["jitserve"],
    "jitserve, true": POLICIES["jitserve"],
    "s-edf, true": POLICIES["s-edf"],
    "sjf, true": {"batch": VLLM, "order": {"name": "sjf", "patience_s": None}},
}
QUICK = ("jitserve, true",)


# ---------------------------------------------------------------------------- running


def trace_of(scale: Scale) -> Path | None:
    return None if scale.data is None and not scale.is_full else scale.trace(TRACE)


def prepare(scale: Scale) -> Settings:
    """Tokens a second that FCFS writes far beyond saturation, and what that is in arrivals."""
    trace = trace_of(scale)
    offers = offers_of(trace, 0, 20.0, 60.0)
    tokens = sum(one.true_output or 0 for _, item in offers for one in requests_of(item))
    config = deployment(POLICIES["vllm-512"])
    found = in_time(config, offers, window_s=60.0, change=change_of("vllm-512", trace, 0))
    rate = number(found, "tokens_per_s")
    return {"tokens_per_s": round(rate, 1), "arrivals_per_s": round(rate * len(offers) / tokens, 3)}


def plan(scale: Scale, prepared: Settings) -> Sequence[Settings]:
    points = [
        (variant, load) for load in (LOADS if scale.is_full else PAST[:1]) for variant in POLICIES
    ]
    if scale.is_full:
        points += [(variant, load) for load in PAST for variant in MORE]
    else:
        points += [(variant, PAST[0]) for variant in QUICK]
    return [
        {
            "variant": variant,
            "load": load,
            "rate_per_s": round(load * number(prepared, "arrivals_per_s"), 4),
            "window_s": WINDOW_S,
            "seed": seed,
        }
        for variant, load in points
        for seed in scale.seeds
    ]


def work(settings: Settings, scale: Scale) -> Mapping[str, object]:
    variant, trace = str(settings["variant"]), trace_of(scale)
    seed, window_s = int(number(settings, "seed")), number(settings, "window_s")
    policy = POLICIES.get(variant) or MORE[variant]
    offers = offers_of(trace, seed, number(settings, "rate_per_s"), window_s)
    change = change_of(variant, trace, seed)
    return in_time(deployment(policy), offers, window_s=window_s, change=change)


# ---------------------------------------------------------------------------- judging


def judge(rows: Sequence[Row]) -> Verdict:
    ratios: list[Ratio] = []
    held: dict[str, list[bool]] = {}

    def compare(load: float, other: str, published: str = "") -> float:
        over, under = ({"variant": name, "load": load} for name in ("jitserve", other))
        values = paired(rows, "good_tokens_per_s", over, under)
        name = f"load {load}: good tokens, jitserve / {other}"
        ratios.append(Ratio(name=name, values=values, published=published))
        return mean(values)

    told = []
    for load in PAST:
        here = [row for row in rows if row.fits({"load": load})]
        if not here:
            continue
        held.setdefault("more than FCFS by the factor", []).append(
            compare(load, "vllm-512", "1.4-6.3") >= BETTER[load]
        )
        for other in ("edf", "s-edf"):
            held.setdefault(f"at least {other}", []).append(compare(load, other) >= 1)
        for other in sorted({str(row.get("variant")) for row in here} & set(MORE)):
            ratio = compare(load, other, "0.91-0.97" if other == "jitserve, true" else "")
            if other == "jitserve, true":
                held.setdefault("within a tenth of true lengths", []).append(ratio >= NEAR_TRUTH)
        bound = at(rows, "violated", "jitserve", load)
        held.setdefault("bound violated in at most 7 %", []).append(bound <= VIOLATED)
        told.append(_told(rows, load, bound))
    num_held, num_all = sum(map(sum, held.values())), sum(map(len, held.values()))
    found = [f"{name} at {sum(each)} of {len(each)}" for name, each in held.items()]
    why = f"{'; '.join(found)}. {'. '.join(told)}"
    return Verdict(outcome=outcome_of(num_held, num_all), why=why, ratios=tuple(ratios))


def at(rows: Sequence[Row], figure: str, variant: str, load: float) -> float:
    return mean(by_seed(rows, figure, variant=variant, load=load).values())


def _told(rows: Sequence[Row], load: float, bound: float) -> str:
    """Good tokens a second, good requests and those of the worst class of every variant."""
    names = [
        name
        for name in (*POLICIES, *MORE)
        if by_seed(rows, "good_requests", variant=name, load=load)
    ]
    each = [
        f"{name} {at(rows, 'good_tokens_per_s', name, load):.0f} "
        f"({at(rows, 'good_requests', name, load):.0%}, {at(rows, 'worst_class', name, load):.0%})"
        for name in names
    ]
    return (
        f"Load {load}, good tokens/s (good requests, of the worst class): {', '.join(each)}; "
        f"the P95 bound was violated in {bound:.1%}"
    )


def draw(rows: Sequence[Row], figure: Figure) -> None:
    axes = figure.subplots(1, 2)
    for ax, name, label in zip(
        axes,
        ("good_tokens_per_s", "worst_class"),
        ("good tokens/s", "good requests of the worst class"),
        strict=True,
    ):
        for variant in POLICIES:
            here = [row for row in rows if row.fits({"variant": variant})]
            loads = sorted({row.number("load") for row in here})
            values = [
                [row.number(name) for row in here if row.number("load") == load] for load in loads
            ]
            ax.plot(loads, [mean(each) for each in values], marker="o", label=variant)
            ax.fill_between(loads, [min(v) for v in values], [max(v) for v in values], alpha=0.15)
        ax.set_xlabel("load, share of saturation")
        ax.set_ylabel(label)
        ax.set_ylim(bottom=0)
        ax.grid(alpha=0.3)
    axes[0].legend()


EXPERIMENT = Experiment(
    name="jitserve",
    system="JITServe: just enough service for each to be in time",
    source="JITServe (readers' notes of the paper) and UIUC-MLSys/JITServe",
    claim="Reserving each request the bandwidth it needs by a conservative length bound, and serving those first that "
    "earn most, gives 1.4 to 6.3 times the goodput of other schedulers and comes within 3 to 9 % of known lengths.",
    criterion="Good tokens a second, at 1.4 and 2.0 times saturation: at least 1.4 and 2 times those of first come, "
    "first served (vllm-512); at least those of EDF and S-EDF; at least 0.9 times its own with true lengths; and the "
    f"P95 bound is violated in at most {VIOLATED:.0%} of the times that it is asked for.",
    workload="Half streams (2 s, 100 ms a token), 30 % answers due in 20 s, 20 % agent runs of 3 to 6 calls (13.3 s a "
    "call); ShareGPT lengths, gamma arrivals of shape 0.5; a window of 200 s.",
    constants=(
        ("a step", f"{SEQUENCES} sequences, {STEP_TOKENS} tokens"),
        (
            "answers",
            f"max_tokens {MOST_TOKENS}; lengths of the trace with 4 tokens or more, up to 4,096 in all",
        ),
        ("history", f"{TAUGHT} answers and {TAUGHT_RUNS} agent runs of the trace's other half"),
        ("guess", f"true length times a lognormal error, sigma {GUESS:g} (ours)"),
        (
            "paused jobs",
            "keep their memory, which is not scarce here; the source swaps them to host memory",
        ),
        ("SIMULATED", "Llama-3.1-8B on a modelled A100-80G, scheduler time from the stored table"),
    ),
    prepare=prepare,
    plan=plan,
    work=work,
    judge=judge,
    draw=draw,
    traces=(TRACE,),
)
