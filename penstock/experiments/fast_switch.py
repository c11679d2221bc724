"""FastSwitch: what switching costs when priorities change, and what runs of blocks, kept copies and waiting less save.

Source: FastSwitch (vLLM 0.3.3 on A10 with LLaMA-8B, A100 with Qwen-32B; multi-turn ShareGPT, 60 GB of host memory,
priorities redrawn every 25 or 50 steps). No code was found; the mechanism is rebuilt from descriptions (engine.swap).

One scheduler for all variants: priorities drawn anew every 25 steps, the highest that fit in memory run
(batch resident, order drawn-priority). What differs is what becomes of those who leave:

    recompute   their blocks are dropped and computed again
    per block   copied to host memory and back block by block, one thread, and the next step waits: vLLM 0.3.3
    groups      the same, in runs of consecutive blocks
    reuse       and copies stay valid while their jobs run
    fastswitch  and beside the steps, by four threads, waited for only where that pays ("adaptive")

"vllm-2048" is what no changing priorities cost: first come, first served. Conversations are not replayed turn by turn:
lengths are ShareGPT's with prompts four times as long, which stands for the turns before. A copy takes 8 us to start,
and host and device exchange 25 GB/s each way; both are assumptions of a PCIe 4 x16 slot. Stall is the time that plans
wait for copies, as a share of the run.
"""

from __future__ import annotations

import csv
import functools
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from penstock.core.events import Completed, Event, Finished, Transferred
from penstock.core.prompt import TracedPrompt
from penstock.core.rng import stream
from penstock.core.types import Request, RequestId, Sampling
from penstock.cost.shapes import shape_of
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
from penstock.traffic import TraceMeta
from penstock.traffic.arrivals import Poisson

MODEL, CARD = "llama-3.1-8b", "a10g"
KV_TOKENS, BLOCK = 42_000, 16
EVERY, TIMES = 25, 4
DISPATCH_S, GB_S = 8e-6, 25.0
HOST_BLOCKS = 1 << 16  # 131 GB: more than is ever used
SWAPS: dict[str, dict[str, object]] = {
    "recompute": {},
    "per block": {"mode": "sync", "group_blocks": 1, "threads": 1, "keeps_copies": False},
    "groups": {"mode": "sync", "group_blocks": 60, "threads": 1, "keeps_copies": False},
    "reuse": {"mode": "sync", "group_blocks": 60, "threads": 1},
    "fastswitch": {"mode": "adaptive", "group_blocks": 60, "threads": 4},
}
RATES = (1.0, 1.25, 1.5)
STALLED, BETTER, LEAN = 0.10, 2.0, 0.65  # what the criterion asks


@functools.cache
def lengths_of(path: Path | None) -> tuple[tuple[int, int], ...]:
    """(prompt, output) tokens of ShareGPT; without the file, pairs like its means and spreads."""
    if path is None:
        chance = stream(0, "experiments", "fast-switch")
        return tuple(
            (
                min(2048, max(4, round(chance.lognormvariate(4.6, 1.2)))),
                min(1024, max(4, round(chance.gammavariate(1.4, 240.0)))),
            )
            for _ in range(2000)
        )
    with path.open(newline="") as file:
        rows = [
            (int(row["ContextTokens"]), int(row["GeneratedTokens"])) for row in csv.DictReader(file)
        ]
    return tuple((prompt, output) for prompt, output in rows if 4 <= prompt <= 2048 and output >= 4)


@dataclass(kw_only=True)
class Talks:
    """`num` requests, Poisson; a later turn of a talk brings what was said before with it."""

    path: Path | None
    num: int
    seed: int
    rate_per_s: float
    meta: TraceMeta = field(init=False)

    def __post_init__(self) -> None:
        self.meta = TraceMeta("sharegpt, prompts x4", "drawn", self.num, self.num)

    def __iter__(self) -> Iterator[tuple[float, Request]]:
        known = lengths_of(self.path)
        chance = stream(self.seed, "experiments", "fast-switch", "talks")
        instants = Poisson(rate_per_s=self.rate_per_s).instants(self.seed)
        for place in range(self.num):
            prompt, output = known[chance.randrange(len(known))]
            yield (
                next(instants),
                Request(
                    id=RequestId(f"talk-{place}"),
                    model="default",
                    prompt=TracedPrompt(TIMES * prompt),
                    sampling=Sampling(max_tokens=1024),
                    true_output=min(output, 1024),
                ),
            )


class Books:
    """First tokens, gaps between tokens, and what was moved."""

    def __init__(self) -> None:
        self.first_s, self.gaps_s = array("d"), array("d")
        self.num_blocks = self.num_runs = 0
        self._last: dict[int, float] = {}

    def emit(self, event: Event) -> None:
        if isinstance(event, Completed):
            for seq, tokens, _, _ in event.outputs:
                if not tokens:
                    continue
                ends = event.ends[-tokens:]
                last = self._last.get(seq)
                if last is not None:
                    self.gaps_s.append(ends[0] - last)
                self.gaps_s.extend(
                    [end - start for start, end in zip(ends, ends[1:], strict=False)]
                )
                self._last[seq] = ends[-1]
        elif isinstance(event, Finished) and event.first_token_at is not None:
            self.first_s.append(event.first_token_at - event.arrived_at)
        elif isinstance(event, Transferred):
            self.num_blocks += event.num_blocks
            self.num_runs += event.num_runs


def priorities(seed: int) -> dict[str, object]:
    """The scheduler of all variants but one."""
    drawn = {"every_steps": EVERY, "seed": seed}
    return {
        "preset": "vllm-v1",
        "order": {"name": "drawn-priority", **drawn},
        "batch": {"name": "resident", "max_tokens": 2048},
        "evict": {"name": "fastswitch", **drawn},
    }


def plan(scale: Scale, prepared: Settings) -> Sequence[Settings]:
    rates = RATES if scale.is_full else RATES[-1:]
    return [
        {"variant": variant, "rate": rate, "num": 300 if scale.is_full else 150, "seed": seed}
        for rate in rates
        for variant in ("vllm-2048", *SWAPS)
        for seed in scale.seeds
    ]


def work(settings: Settings, scale: Scale) -> Mapping[str, object]:
    variant = str(settings["variant"])
    swap: dict[str, object] = dict(SWAPS.get(variant, {}))
    if swap:
        swap |= {"host_blocks": HOST_BLOCKS, "dispatch_s": DISPATCH_S, "gb_s": GB_S}
    seed = int(number(settings, "seed"))
    policy = priorities(seed) if variant in SWAPS else SCHEDULERS[variant]
    config = deployment(
        policy,
        model=MODEL,
        executor={"kind": "modelled", "gpu": CARD},
        cache={
            "num_blocks": KV_TOKENS // BLOCK,
            "block_size": BLOCK,
            "prefix": False,
            "swap": swap,
        },
    )
    path = scale.trace("sharegpt_lengths.csv") if scale.data is not None else None
    talks = Talks(
        path=path,
        num=int(number(settings, "num")),
        seed=seed,
        rate_per_s=number(settings, "rate"),
    )
    books, finishes = Books(), Finishes()
    found = simulate(config, talks, has_gaps=False, listeners=(books, finishes)).figures
    shape = shape_of(MODEL)
    moved_bytes = books.num_blocks * BLOCK * shape.kv_bytes
    copies_s = books.num_runs * 2 * shape.layers * DISPATCH_S + moved_bytes / (GB_S * 1e9)
    return {
        "ttft_mean_s": float(np.mean(books.first_s)),
        "ttft_p99_s": float(np.percentile(books.first_s, 99)),
        "gap_p999_s": float(np.percentile(books.gaps_s, 99.9)),
        "output_tokens_per_s": found.all.output_tokens_per_s,
        "moved_gb": moved_bytes / 1e9,
        "num_runs": books.num_runs,
        "stall": copies_s / found.duration_s if swap.get("mode") == "sync" else 0.0,
        "num_preemptions": found.all.num_preemptions,
        "duration_s": found.duration_s,
        "num_finished": found.all.num_finished,
        "finished": finishes.digest(),
    }


# ---------------------------------------------------------------------------- judging


def judge(rows: Sequence[Row]) -> Verdict:
    rates = sorted({row.number("rate") for row in rows})
    stalled = [
        row for row in rows if row.get("variant") == "per block" and row.number("stall") > STALLED
    ]
    points = {(row.number("rate"), row.get("seed")) for row in stalled}
    ratios: list[Ratio] = []
    for rate in rates:
        ratios += _ratios(rows, rate)
    if not points:
        why = (
            f"the baseline never stalls for more than {STALLED:.0%} of the time: nothing to compare"
        )
        return Verdict(outcome="not", why=why, ratios=tuple(ratios))
    hard = [row for row in rows if (row.number("rate"), row.get("seed")) in points]
    told, held = [], 0
    for figure, published in (("ttft_p99_s", "1.4-5.8"), ("gap_p999_s", "up to 11.2")):
        values = _gains(hard, figure, "fastswitch", points)
        ratios.append(
            Ratio(
                name=f"stalled: {figure}, per block / fastswitch",
                values=values,
                published=published,
            )
        )
        held += mean(values) >= BETTER
        told.append(f"{figure} {mean(values):.2f}x better")
    lean = _ratio(hard, "moved_gb", "reuse", "groups", points)
    ratios.append(Ratio(name="stalled: moved_gb, reuse / groups", values=lean))
    held += mean(lean) <= LEAN
    told.append(f"bytes with reuse {mean(lean):.2f} of those without")
    why = f"Where the baseline stalls ({len(points)} runs): {', '.join(told)}. {_beside(rows, rates[-1])}"
    return Verdict(outcome=outcome_of(held, 3), why=why, ratios=tuple(ratios))


def _ratio(
    rows: Sequence[Row], figure: str, over: str, under: str, points: set[tuple[float, object]]
) -> tuple[float, ...]:
    """One value for each point, over / under."""
    values: list[float] = []
    for rate, seed in sorted(points, key=str):
        where = {"rate": rate, "seed": seed}
        values += paired(rows, figure, {**where, "variant": over}, {**where, "variant": under})
    return tuple(values)


def _gains(
    rows: Sequence[Row], figure: str, variant: str, points: set[tuple[float, object]]
) -> tuple[float, ...]:
    return _ratio(rows, figure, "per block", variant, points)


def _ratios(rows: Sequence[Row], rate: float) -> list[Ratio]:
    found = []
    for variant in ("recompute", "groups", "reuse", "fastswitch", "vllm-2048"):
        for figure in ("ttft_mean_s", "ttft_p99_s", "gap_p999_s"):
            values = paired(
                rows,
                figure,
                {"rate": rate, "variant": "per block"},
                {"rate": rate, "variant": variant},
            )
            found.append(Ratio(name=f"{rate:g}/s: {figure}, per block / {variant}", values=values))
        values = paired(
            rows,
            "output_tokens_per_s",
            {"rate": rate, "variant": variant},
            {"rate": rate, "variant": "per block"},
        )
        found.append(
            Ratio(
                name=f"{rate:g}/s: tokens/s, {variant} / per block",
                values=values,
                published="up to 1.44",
            )
        )
    return found


def _beside(rows: Sequence[Row], rate: float) -> str:
    told = []
    for variant in SWAPS:
        where = {"variant": variant, "rate": rate}
        moved = mean(by_seed(rows, "moved_gb", **where).values())
        first = mean(by_seed(rows, "ttft_p99_s", **where).values())
        stall = mean(by_seed(rows, "stall", **where).values())
        told.append(f"{variant} p99 TTFT {first:.1f} s, {moved:.0f} GB, stall {stall:.0%}")
    return f"At {rate:g}/s: {'; '.join(told)}"


EXPERIMENT = Experiment(
    name="fast-switch",
    system="FastSwitch: cheap switches when priorities change",
    source="FastSwitch, vLLM 0.3.3 with changing priorities (no code found)",
    claim="Runs of blocks, copies that stay valid and copies beside the steps make first tokens 1.4-5.8 times "
    "earlier at P95-P99.9 and P99.9 gaps up to 11.2 times shorter than swapping block by block.",
    criterion=f"On runs whose baseline stalls for more than {STALLED:.0%} of the time: P99 TTFT and P99.9 gap at least "
    f"{BETTER:g} times better with all three than block by block, and with kept copies at most {LEAN:g} times "
    "the bytes.",
    workload=f"ShareGPT lengths with prompts x{TIMES}, Poisson at {', '.join(f'{rate:g}' for rate in RATES)} a second, "
    f"300 requests; priorities drawn every {EVERY} steps.",
    constants=(
        (
            "KV memory",
            f"{KV_TOKENS:,} tokens in blocks of {BLOCK}, no prefix cache; host memory is never short",
        ),
        (
            "copies",
            f"{DISPATCH_S * 1e6:g} us to start each, {GB_S:g} GB/s each way; 64 copies a run of blocks",
        ),
        ("groups", "60 blocks; 4 threads in fastswitch, 1 in the others"),
        (
            "SIMULATED",
            f"{MODEL} on a modelled {CARD}; scheduler time is not charged (none is stored for it)",
        ),
    ),
    plan=plan,
    work=work,
    judge=judge,
    traces=("sharegpt_lengths.csv",),
    compares_schedulers=False,
)
