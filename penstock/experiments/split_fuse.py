"""Dynamic SplitFuse: forwards of one size against whole prompts first, by what callers are served in time.

Source: DeepSpeed-FastGen (DeepSpeed-MII commit 8abdd98; Microsoft's account of it, November 2023): clients in a closed
loop, 512 requests, prompts and answers normal with a spread of 30 %, against vLLM of that time, which computes whole
prompts first. Effective throughput counts the answers whose first token came within prompt tokens / 512 s and whose
gaps kept up: their exponential average (span 16, as pandas weighs it) is at every token below 1/2, 1/4 or 1/6 s, as in
the authors' script (benchmarks/inference/mii, validate_token_ema_latency_SLA).

What stands in for the original: Llama-2-70B on four modelled A100-80G, one executor for all, so that kernels are equal
and only the scheduling differs. The published ratios hold kernels and the host of vLLM 0.2 as well, which cannot be
told apart here. Each client asks for its own share of the requests, one after another; prompts end at 3,800 tokens,
since the model holds 4,096."""

from __future__ import annotations

from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from penstock.core.events import Arrived, Completed, Event, Finished
from penstock.core.prompt import TracedPrompt
from penstock.core.rng import stream
from penstock.core.types import ProgramId, Request, RequestId, Sampling, Slo
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
from penstock.lab.trial import SCHEDULERS, Finishes, deployment
from penstock.report.summary import spread_of
from penstock.traffic import Call, TraceMeta, Workflow

if TYPE_CHECKING:
    from matplotlib.figure import Figure

MIXES = {
    "1200/60": (1200, 60),
    "1200/128": (1200, 128),
    "2600/60": (2600, 60),
    "2600/128": (2600, 128),
}
SPREAD, LONGEST_PROMPT = 0.3, 3800
CLIENTS = (1, 4, 8, 16, 32)
CROWDED = (16, 32)  # the clients that the criterion speaks of
RATES = (2, 4, 6)  # tokens a second that an answer must keep up with
PROMPT_RATE, SPAN = 512, 16
NUM = 512
MAIN: dict[str, dict[str, object]] = {
    "prefill-first": {"preset": "prefill-first"},
    "split-fuse": {"preset": "split-fuse"},
    "vllm-768": {"preset": "vllm-v1", "batch": {"max_tokens": 768}},
    "vllm-2048": SCHEDULERS["vllm-2048"],
}
VARIANTS = MAIN | SCHEDULERS
CALMER, CALMER_TAIL, MORE, POINTS = 3.0, 2.5, 1.2, 7  # what the criterion asks
SAME = 0.01  # differences up to which two schedulers are called equal


@dataclass(kw_only=True)
class Clients:
    """`clients` callers, each with its share of `num` requests: the next is sent when the last has been answered."""

    mix: str
    clients: int
    num: int
    seed: int
    meta: TraceMeta = field(init=False)

    def __post_init__(self) -> None:
        self.meta = TraceMeta(self.mix, "drawn", self.num, self.num)

    def __iter__(self) -> Iterator[tuple[float, Workflow]]:
        requests = list(self._requests())
        for client in range(self.clients):
            own = requests[client :: self.clients]
            calls = [
                Call(request=request, after=(place - 1,) if place else ())
                for place, request in enumerate(own)
            ]
            yield (
                0.0,
                Workflow(id=ProgramId(f"client-{client}"), kind="program", calls=tuple(calls)),
            )

    def _requests(self) -> Iterator[Request]:
        num_prompt, num_output = MIXES[self.mix]
        chance = stream(self.seed, "experiments", "split-fuse", self.mix)
        for place in range(self.num):
            prompt = round(chance.gauss(num_prompt, SPREAD * num_prompt))
            prompt = min(max(prompt, 1), LONGEST_PROMPT)
            output = max(round(chance.gauss(num_output, SPREAD * num_output)), 1)
            yield Request(
                id=RequestId(f"{self.mix}-{place}"),
                model="default",
                prompt=TracedPrompt(prompt),
                sampling=Sampling(max_tokens=output),
                slo=Slo(ttft_s=prompt / PROMPT_RATE, tpot_s=1 / 4),
                true_output=output,
            )


@dataclass(slots=True)
class Pace:
    """How an answer came: its first token, and the slowest that its average gap has been."""

    arrived_at: float
    num_prompt: int
    last_at: float | None = None
    is_prompt: bool = False  # the first token came in time
    slowest_s: float = 0.0
    _sum: float = 0.0
    _weight: float = 0.0

    def hear(self, at: float) -> None:
        if self.last_at is None:
            self.is_prompt = at - self.arrived_at <= self.num_prompt / PROMPT_RATE
        else:
            keep = 1 - 2 / (SPAN + 1)
            self._sum = at - self.last_at + keep * self._sum
            self._weight = 1 + keep * self._weight
            self.slowest_s = max(self.slowest_s, self._sum / self._weight)
        self.last_at = at


class Effective:
    """Counts the answers that were served in time, and keeps all gaps."""

    def __init__(self) -> None:
        self.paces: dict[tuple[str, int], Pace] = {}  # by replica and seq; a fleet's own never come
        self.gaps_s: array[float] = array("d")
        self._ended_at = 0.0

    def emit(self, event: Event) -> None:
        if isinstance(event, Completed):
            for seq, tokens, _, _ in event.outputs:
                pace = self.paces.get((event.who, seq))
                for at in event.ends if pace and tokens else ():
                    assert pace is not None and tokens == len(event.ends)
                    if pace.last_at is not None:
                        self.gaps_s.append(at - pace.last_at)
                    pace.hear(at)
        elif isinstance(event, Arrived):
            self.paces[event.who, event.seq] = Pace(event.at, event.num_prompt)
        elif isinstance(event, Finished):
            self._ended_at = event.at

    def rate_per_s(self, tokens_per_s: float) -> float:
        num = sum(
            pace.is_prompt and pace.slowest_s < 1 / tokens_per_s for pace in self.paces.values()
        )
        return num / self._ended_at


def plan(scale: Scale, prepared: Settings) -> Sequence[Settings]:
    mixes = list(MIXES) if scale.is_full else ["2600/60", "1200/128"]
    return [
        {
            "variant": variant,
            "mix": mix,
            "clients": clients,
            "num": NUM if scale.is_full else 96,
            "seed": seed,
        }
        for mix in mixes
        for clients in (CLIENTS if scale.is_full else (4, 16))
        for variant in (VARIANTS if clients in CROWDED else MAIN)
        for seed in scale.seeds
    ]


def work(settings: Settings, scale: Scale) -> Mapping[str, object]:
    config = deployment(
        VARIANTS[str(settings["variant"])],
        model="llama-2-70b",
        executor__tensor_parallel=4,
        cache__prefix=False,
    )
    clients = Clients(
        mix=str(settings["mix"]),
        clients=int(number(settings, "clients")),
        num=int(number(settings, "num")),
        seed=int(number(settings, "seed")),
    )
    finishes, effective = Finishes(), Effective()
    found = simulate(config, clients, has_gaps=False, listeners=(finishes, effective))
    gaps, all_of = spread_of(effective.gaps_s), found.figures.all
    return {
        "rate_per_s": all_of.num_finished / found.figures.duration_s,
        **{f"effective_{rate}_per_s": effective.rate_per_s(rate) for rate in RATES},
        **{f"gap_{part}_s": getattr(gaps, part) for part in ("mean", "p50", "p95", "p99", "max")},
        "ttft_mean_s": all_of.ttft_s.mean,
        "ttft_p95_s": all_of.ttft_s.p95,
        "e2e_mean_s": all_of.e2e_s.mean,
        "num_preemptions": all_of.num_preemptions,
        "finished": finishes.digest(),
        "cost_model": found.sources[0].cost_model,
    }


@dataclass(frozen=True)
class Point:
    """One mix at one number of clients."""

    mix: object
    clients: object

    def of(self, variant: str) -> dict[str, object]:
        return {"variant": variant, "mix": self.mix, "clients": self.clients}

    def ratio(self, rows: Sequence[Row], figure: str, over: str, under: str) -> tuple[float, ...]:
        return paired(rows, figure, self.of(over), self.of(under))

    def __str__(self) -> str:
        return f"{self.mix}, {self.clients} clients"


def judge(rows: Sequence[Row]) -> Verdict:
    points = sorted({Point(row.get("mix"), row.get("clients")) for row in rows}, key=str)
    crowded = [point for point in points if point.clients in CROWDED]
    ratios, calmer, calmer_tail, more = list[Ratio](), list[bool](), list[bool](), list[bool]()
    for point in crowded:
        whole, split = "prefill-first", "split-fuse"
        p95 = point.ratio(rows, "gap_p95_s", whole, split)
        p99 = point.ratio(rows, "gap_p99_s", whole, split)
        served = point.ratio(rows, "effective_4_per_s", split, whole)
        ratios += [
            Ratio(
                name=f"{point}: P95 gap, prefill-first / split-fuse", values=p95, published="3.7"
            ),
            Ratio(name=f"{point}: P99 gap, prefill-first / split-fuse", values=p99),
            Ratio(
                name=f"{point}: effective at 4 tok/s, split-fuse / prefill-first",
                values=served,
                published="2.3",
            ),
        ]
        if str(point.mix).startswith("2600"):
            calmer.append(mean(p95) >= CALMER)
        calmer_tail.append(mean(p99) >= CALMER_TAIL)
        more.append(mean(served) >= MORE)
    held = [all(calmer), all(calmer_tail), sum(more) >= POINTS / 8 * len(more)]
    why = (
        f"P95 gap holds at {sum(calmer)} of {len(calmer)} points, P99 gap at {sum(calmer_tail)} of "
        f"{len(calmer_tail)}, effective throughput at {sum(more)} of {len(more)}; {equals(rows, points)}; "
        f"{elsewhere(rows, points)}"
    )
    return Verdict(outcome=outcome_of(sum(held), len(held)), why=why, ratios=tuple(ratios))


def equals(rows: Sequence[Row], points: Sequence[Point]) -> str:
    """Where vLLM v1 with the same budget does the same."""
    figures = ("rate_per_s", "effective_4_per_s", "gap_p95_s", "gap_p99_s", "ttft_mean_s")
    furthest = []
    for point in points:
        values = [point.ratio(rows, figure, "vllm-768", "split-fuse") for figure in figures]
        furthest.append(max((abs(mean(each) - 1) for each in values if each), default=0.0))
    same = sum(each <= SAME for each in furthest)
    told = f"vLLM v1 at the same 768 tokens equals split-fuse within {SAME:.0%} at {same} of {len(points)} points"
    return f"{told}, at most {max(furthest):.1%} apart"


def elsewhere(rows: Sequence[Row], points: Sequence[Point]) -> str:
    """What the criterion does not ask: few clients, and the tightest rate."""
    told = []
    few = [point for point in points if point.clients == 4]
    if few:
        p95 = [mean(point.ratio(rows, "gap_p95_s", "prefill-first", "split-fuse")) for point in few]
        told.append(
            f"with 4 clients the P95 gap is {min(p95):.2g} to {max(p95):.2g} times split-fuse's"
        )
    crowded = [point for point in points if point.clients in CROWDED]
    share = [served_share(rows, point) for point in crowded]
    if share:
        told.append(
            f"at 6 tok/s split-fuse serves {min(share):.0%} to {max(share):.0%} of its answers in time"
        )
    return ", ".join(told)


def served_share(rows: Sequence[Row], point: Point) -> float:
    where = point.of("split-fuse")
    kept, all_of = (by_seed(rows, name, **where) for name in ("effective_6_per_s", "rate_per_s"))
    return mean(kept.values()) / mean(all_of.values())


def draw(rows: Sequence[Row], figure: Figure) -> None:
    mixes = sorted({str(row.get("mix")) for row in rows})
    axes = figure.subplots(2, len(mixes), squeeze=False)
    for column, mix in enumerate(mixes):
        for (name, label), ax in zip(
            (("effective_4_per_s", "effective at 4 tok/s, a second"), ("gap_p99_s", "P99 gap, s")),
            axes[:, column],
            strict=True,
        ):
            for variant in MAIN:
                here = [row for row in rows if row.fits({"variant": variant, "mix": mix})]
                known = sorted({row.number("clients") for row in here})
                values = [
                    [r.number(name) for r in here if r.number("clients") == at] for at in known
                ]
                ax.plot(known, [mean(each) for each in values], marker="o", label=variant)
                ax.fill_between(known, list(map(min, values)), list(map(max, values)), alpha=0.15)
            ax.set_xlabel("clients")
            ax.set_ylabel(label)
            ax.grid(alpha=0.3)
        axes[0, column].set_title(mix)
    axes[0, 0].legend()


EXPERIMENT = Experiment(
    name="split-fuse",
    system="DeepSpeed-FastGen: Dynamic SplitFuse",
    source="DeepSpeed-FastGen (2023), DeepSpeed-MII ragged batching",
    claim="Forwards of one size, with prompts split and fused with decodes, serve more answers in time than whole "
    "prompts first, with a far calmer tail of gaps.",
    criterion=f"At 16 and 32 clients: the P95 gap of prefill-first at least {CALMER:g} times split-fuse's with prompts "
    f"of 2,600 tokens, its P99 gap at least {CALMER_TAIL:g} times everywhere, and at least {MORE:g} times the "
    f"effective throughput at 4 tok/s in {POINTS} of 8 points.",
    workload=f"Closed loop of 1 to 32 clients, {NUM} requests, prompts normal(1200 or 2600), answers normal(60 or "
    "128), spread 30 %.",
    constants=(
        ("model", "Llama-2-70B, bf16, tensor parallel 4"),
        ("cards", "4 A100-80G, modelled"),
        (
            "forward",
            "split-fuse 768 tokens, 512 jobs; prefill-first 4,096 tokens (the model's context)",
        ),
        (
            "in time",
            f"first token within prompt/{PROMPT_RATE} s; average gap of span {SPAN} at every token",
        ),
    ),
    plan=plan,
    work=work,
    judge=judge,
    draw=draw,
)
