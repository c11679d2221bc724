"""Infinite-LLM: replicas that keep context for each other, against one big instance and against refusing long requests.

Source: Infinite-LLM / DistAttention (arXiv:2401.02669), known from what others wrote of it; there is no code. Its
testbed was 4 x 8 A100s; here eight modelled A100-80G with LLaMA2-7B, whose memory holds about 115,000 positions each.
Requests are conversations of the Azure trace and, one in forty, one of 100,000 to 500,000 tokens (drawn evenly in the
logarithm, with the answer of a conversation), Poisson arrivals. In time is a request whose first token came within
TTFT_S and TTFT_PER_TOKEN_S for each token of its prompt, about twice what one card with enough memory would take, and
whose later ones took TPOT_S in the mean. Of one prompt at most half a step's budget is computed at a time, everywhere.

    no-lending    eight replicas; what does not fit into one is refused
    llumnix       the same, and running requests move to where there is memory
    tp8-N         all eight cards as one replica, N tokens a step
    admission     eight replicas that lend, to requests longer than a memory alone
    lending       the same, and policy move "infinite-llm" lends for requests that run; between machines: 0.2 ms there
                  and back, 10 GB/s
    lending-near  the same with 0.02 ms and 200 GB/s, as inside a machine

Throughput at equal SLO is the highest of the rates at which 90 % of the conversations and 90 % of the long ones are in
time: nothing for who refuses the latter, so tokens of requests in time are compared too. Part "fits" has no request
that is longer than a memory (one in twenty has 30,000 to 100,000 tokens): what the policy alone is worth.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from penstock.core.events import Event, Finished, Refused
from penstock.core.lending import Loaned, Spilled
from penstock.core.prompt import TracedPrompt
from penstock.core.rng import stream
from penstock.core.types import Request, RequestId, Sampling
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
from penstock.lab.simulate import simulate
from penstock.lab.trial import Finishes, deployment, read_requests
from penstock.traffic import TraceMeta
from penstock.traffic.arrivals import Poisson

if TYPE_CHECKING:
    from matplotlib.figure import Figure

    from penstock.assemble.config import Config

TRACE, SAMPLE = "azure_2023_conv.csv", "azure_2023_conv_200.csv"
MODEL, CARD, REPLICAS = "llama-2-7b-1m", "a100-80g", 8
BLOCK, BUDGET, CONTEXT_BUDGET = 16, 1024, 16_384
KINDS = {
    "long": (0.025, 100_000, 500_000),
    "fits": (0.05, 30_000, 100_000),
}  # share, shortest, longest
TTFT_S, TTFT_PER_TOKEN_S, TPOT_S, SHARE = 2.0, 1e-3, 0.2, 0.9
FAR = {"latency_s": 1e-4, "kv_bytes_per_s": 10e9}
NEAR = {"latency_s": 1e-5, "kv_bytes_per_s": 200e9}
BIG = {"tp8-1024": 1024, "tp8-2048": 2048}
LENDING: dict[str, Mapping[str, float]] = {"admission": FAR, "lending": FAR, "lending-near": NEAR}
RATES = {"long": (0.35, 0.7, 1.0, 1.4, 2.0), "fits": (8.0, 16.0)}
RUN = {
    "long": ("no-lending", "llumnix", *BIG, "lending", "lending-near"),
    "fits": ("no-lending", "llumnix", "lending-near"),
}
LONGER, MORE = 4.0, 1.2  # what the criterion asks


@functools.cache
def conversations(path: Path) -> tuple[tuple[int, int], ...]:
    found = (request for _, request in read_requests(path, 4096))
    return tuple((each.prompt.num_tokens, each.true_output or 1) for each in found)


@dataclass(kw_only=True)
class Mixed:
    """`num` requests, of which exactly a share are long ones, at random places."""

    path: Path
    kind: str
    num: int
    seed: int
    rate_per_s: float
    meta: TraceMeta = field(init=False)

    def __post_init__(self) -> None:
        self.meta = TraceMeta(f"{self.path.name} and long ones", "drawn", self.num, self.num)

    def __iter__(self) -> Iterator[tuple[float, Request]]:
        known, chance = conversations(self.path), stream(self.seed, "experiments", "infinite-llm")
        instants = Poisson(rate_per_s=self.rate_per_s).instants(self.seed)
        share, shortest, longest = KINDS[self.kind]
        long = set(chance.sample(range(self.num), round(share * self.num)))
        for place in range(self.num):
            prompt, output = known[chance.randrange(len(known))]
            if place in long:
                prompt = round(shortest * (longest / shortest) ** chance.random())
            yield (
                next(instants),
                request_of(f"{'long' if place in long else 'talk'}-{place}", prompt, output),
            )


def request_of(name: str, prompt: int, output: int) -> Request:
    return Request(
        id=RequestId(name),
        model="default",
        prompt=TracedPrompt(prompt),
        sampling=Sampling(max_tokens=1024),
        true_output=min(output, 1024),
    )


class Books:
    """Who was in time, by class, and the tokens of those."""

    def __init__(self) -> None:
        self.in_time = {"talk": 0, "long": 0}
        self.tokens = self.refused = self.loans = self.spilled = 0
        self.last_at = 0.0

    def emit(self, event: Event) -> None:
        if isinstance(event, Finished):
            self._finish(event)
        elif isinstance(event, Refused) and event.who.startswith("fleet"):
            self.refused += 1
        elif isinstance(event, Loaned):
            self.loans += event.error is None
        elif isinstance(event, Spilled):
            self.spilled += event.num_blocks

    def _finish(self, event: Finished) -> None:
        first, last = event.first_token_at, event.last_token_at
        if event.reason not in ("stop", "length") or first is None or last is None:
            return
        self.last_at = max(self.last_at, last)
        is_late = first - event.arrived_at > TTFT_S + TTFT_PER_TOKEN_S * event.num_prompt
        is_late |= last - first > TPOT_S * max(1, event.num_output - 1)
        if not is_late:
            self.in_time[event.request.partition("-")[0]] += 1
            self.tokens += event.num_prompt + event.num_output


def fleet(variant: str, budget: int | None = None) -> Config:
    budget = budget or BIG.get(variant, BUDGET)
    batch = {"max_tokens": budget, "long_prefill_tokens": budget // 2}
    policy: dict[str, Any] = {"preset": "vllm-v1", "batch": batch}
    policy["route"] = {"name": "llumnix", "metric": "steps"}
    net = LENDING.get(variant, FAR)
    if variant == "llumnix":
        policy["move"] = {"name": "llumnix", "urgent_blocks": None}
    elif variant in LENDING and variant != "admission":
        policy["move"] = {"name": "infinite-llm", "hop_s": 2 * 32 * net["latency_s"]}
    config = deployment(
        policy,
        model=MODEL,
        gpu=CARD,
        replicas=1 if variant in BIG else REPLICAS,
        lends=variant in LENDING,
        cache={"block_size": BLOCK, "prefix": False},
        executor__tensor_parallel=REPLICAS if variant in BIG else 1,
    )
    link = dataclasses.replace(
        config.net, latency_s=net["latency_s"], kv_bytes_per_s=net["kv_bytes_per_s"]
    )
    return dataclasses.replace(config, net=link)


def run_one(variant: str, mixed: Mixed) -> dict[str, object]:
    books, finishes = Books(), Finishes()
    simulate(fleet(variant), mixed, has_gaps=False, listeners=(books, finishes))
    num_long = round(KINDS[mixed.kind][0] * mixed.num)
    return {
        "talk_share": books.in_time["talk"] / (mixed.num - num_long),
        "long_share": books.in_time["long"] / num_long,
        "tokens_per_s": books.tokens / max(books.last_at, 1e-9),
        "num_refused": books.refused,
        "num_loans": books.loans,
        "num_spilled": books.spilled,
        "num_finished": len(finishes.names),
        "finished": finishes.digest(),
    }


@dataclass
class One:
    """A single request."""

    num_prompt: int
    meta: TraceMeta = field(default_factory=lambda: TraceMeta("one", "drawn", 1, 1))

    def __iter__(self) -> Iterator[tuple[float, Request]]:
        yield 1.0, request_of("long-0", self.num_prompt, 1)


def longest_context(variant: str) -> int:
    """The longest prompt that an idle fleet answers, to a percent."""
    low, high = 1_000, 1_000_000
    while high > 1.01 * low:
        middle = round(math.sqrt(low * high))
        finishes = Finishes()
        config = fleet(variant, CONTEXT_BUDGET)
        simulate(config, One(middle), has_gaps=False, listeners=(finishes,))
        low, high = (middle, high) if finishes.names else (low, middle)
    return low


# ---------------------------------------------------------------------------- what is run


def plan(scale: Scale, prepared: Settings) -> Sequence[Settings]:
    num = 400 if scale.is_full else 120
    runs: list[Settings] = [
        {"part": part, "variant": variant, "rate": rate, "num": num, "seed": seed}
        for part, variants in RUN.items()
        for variant in variants
        for rate in (RATES[part] if scale.is_full else RATES[part][1:2])
        for seed in scale.seeds
    ]
    runs += [
        {"part": "long", "variant": "admission", "rate": rate, "num": num, "seed": seed}
        for rate in RATES["long"][3:4]
        for seed in scale.seeds
    ]
    return runs + [
        {"part": "context", "variant": variant, "seed": seed}
        for variant in ("no-lending", "tp8-1024", "lending")
        for seed in scale.seeds
    ]


def work(settings: Settings, scale: Scale) -> Mapping[str, object]:
    variant, part = str(settings["variant"]), str(settings["part"])
    if part == "context":
        return {"context": longest_context(variant)}
    mixed = Mixed(
        path=scale.trace(TRACE, SAMPLE),
        kind=part,
        num=int(number(settings, "num")),
        seed=int(number(settings, "seed")),
        rate_per_s=number(settings, "rate"),
    )
    return run_one(variant, mixed)


# ---------------------------------------------------------------------------- judging


def highest(rows: Sequence[Row], part: str, variant: str) -> dict[object, float]:
    """By seed, the highest rate up to which both classes are in time; 0 where there is none."""
    found: dict[object, float] = {}
    where = {"part": part, "variant": variant}
    mine = [row for row in rows if row.fits(where)]
    for seed in {row.get("seed") for row in mine}:
        found[seed] = 0.0
        for row in sorted(mine, key=lambda each: each.number("rate")):
            if row.get("seed") != seed:
                continue
            if min(row.number("talk_share"), row.number("long_share")) < SHARE:
                break
            found[seed] = row.number("rate")
    return found


def over(above: Mapping[object, float], below: Mapping[object, float]) -> tuple[float, ...]:
    return tuple(above[seed] / below[seed] for seed in sorted(above, key=str) if below[seed] > 0)


def judge(rows: Sequence[Row]) -> Verdict:
    context = {"part": "context"}
    longer = paired(
        rows, "context", {**context, "variant": "lending"}, {**context, "variant": "no-lending"}
    )
    rates = {each: highest(rows, "long", each) for each in RUN["long"]}
    big = max(BIG, key=lambda each: mean(rates[each].values()))
    ratios = [
        Ratio(name="longest context, lending / one instance", values=longer, published="2 to 19")
    ]
    ratios += [
        Ratio(
            name=f"rate with both classes in time, {each} / {big}",
            values=over(rates[each], rates[big]),
            published="1.4 to 3.4",
        )
        for each in ("lending", "lending-near")
    ]
    ratios += _tokens(rows, "long", "lending-near", ("no-lending", "llumnix", big))
    ratios += _tokens(rows, "fits", "lending-near", ("no-lending", "llumnix"))
    more = {each: mean(ratio.values) for each, ratio in zip(LENDING_RUN, ratios[1:3], strict=True)}
    best = max(more.values())
    told = ", ".join(f"{each} {mean(found.values()):.2g}" for each, found in rates.items())
    lost = mean(
        by_seed(rows, "talk_share", part="long", rate=RATES["long"][1], variant="lending").values()
    )
    why = (
        f"an idle fleet takes {mean(longer):.1f}x the context of one instance; requests a second with {SHARE:.0%} of "
        f"both classes in time: {told}; with round trips of 0.2 ms {lost:.0%} of the conversations are in time at "
        f"{RATES['long'][1]:g} requests a second; {MORE:g}x is reached with the network of "
        + (" and ".join([each for each, value in more.items() if value >= MORE]) or "neither")
    )
    held = (mean(longer) >= LONGER) + (best >= MORE)
    return Verdict(outcome=outcome_of(held, 2), why=why, ratios=tuple(ratios))


LENDING_RUN = ("lending", "lending-near")


def _tokens(rows: Sequence[Row], part: str, variant: str, others: Sequence[str]) -> list[Ratio]:
    """Tokens a second of requests in time, at every rate."""
    rates = sorted({row.number("rate") for row in rows if row.get("part") == part})
    return [
        Ratio(
            name=f"{part}, {rate:g} a second: tokens in time, {variant} / {other}",
            values=paired(
                rows,
                "tokens_per_s",
                {"part": part, "rate": rate, "variant": variant},
                {"part": part, "rate": rate, "variant": other},
            ),
            published="1.35 to 1.73" if part == "fits" and other == "no-lending" else "",
        )
        for rate in rates[-2:]
        for other in others
    ]


def draw(rows: Sequence[Row], figure: Figure) -> None:
    axes = figure.subplots(1, 2, sharey=True)
    for ax, share in zip(axes, ("talk_share", "long_share"), strict=True):
        for variant in RUN["long"]:
            rates = sorted(
                {r.number("rate") for r in rows if r.fits({"part": "long", "variant": variant})}
            )
            values = [
                100 * mean(by_seed(rows, share, part="long", variant=variant, rate=rate).values())
                for rate in rates
            ]
            ax.plot(rates, values, marker="o", label=variant)
        ax.set_xlabel("requests a second")
        ax.set_title("conversations" if share == "talk_share" else "long requests")
        ax.grid(alpha=0.3)
    axes[0].set_ylabel("in time, %")
    axes[0].legend()


EXPERIMENT = Experiment(
    name="infinite-llm",
    system="Infinite-LLM: replicas keep context for each other",
    source="Infinite-LLM / DistAttention, arXiv:2401.02669, as others tell of it; no code",
    claim="Contexts 2 to 19 times as long; 1.35 to 1.73 times the throughput of several instances on short mixes, 1.4 "
    "to 3.4 times that of one instance over all cards on long ones.",
    criterion=f"Longest context at least {LONGER:g} times that of one of {REPLICAS} instances, and at least {MORE:g} "
    f"times the highest rate at which {SHARE:.0%} of the conversations and of the long requests are in time, against "
    "the best whole-cluster instance (instances that do not lend refuse the long ones, so they have no such rate).",
    workload=f"Azure conversations and {KINDS['long'][0]:.1%} requests of {KINDS['long'][1]:,} to {KINDS['long'][2]:,} "
    f"tokens, or {KINDS['fits'][0]:.0%} of {KINDS['fits'][1]:,} to {KINDS['fits'][2]:,}, log-uniform, Poisson; "
    f"in time: TTFT {TTFT_S:g} s and {1e3 * TTFT_PER_TOKEN_S:g} ms a token of the prompt, TPOT {TPOT_S:g} s.",
    constants=(
        ("between replicas", "0.2 ms there and back, 10 GB/s; lending-near 0.02 ms, 200 GB/s"),
        ("a step", f"{BUDGET} tokens, of one prompt at most half; tp8-N: N"),
        (
            "cost",
            f"roofline of {MODEL} on {REPLICAS} {CARD}, all-reduce of tp8 over NVLink; attention as sim.lending",
        ),
        ("context", f"prompts of an idle fleet, steps of {CONTEXT_BUDGET:,} tokens"),
    ),
    plan=plan,
    work=work,
    judge=judge,
    draw=draw,
    traces=(TRACE,),
    compares_schedulers=False,
)
