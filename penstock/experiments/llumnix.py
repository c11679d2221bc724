"""Llumnix: what moving running requests between replicas saves.

Source: Sun et al., Llumnix: dynamic scheduling for large language model serving (OSDI 2024), and its artifact. Its
testbed was 16 A10s with LLaMA-7B and whole prompts in a step; here 16 modelled ones. Lengths of the paper are drawn
from its power laws by their published quantiles, between which they are log-linear (the means come out within 2 % of
those told):

    load        prompts and answers of mean 512 (L-L), Poisson, at shares of the rate at which dispatch by memory
                (INFaaS++) preempts about one request in thirteen, which `prepare` looks for
    azure       prompts of Azure's conversations, answers of mean 256, in the same way at that rate
    priorities  mean 128 (S-S), Gamma arrivals of CV 4 at the paper's 26 a second; one request in ten is urgent
    scaling     as load, at 0.6 of its rate, on 4 to 16 replicas, scaled by freeness, with and without moves

    round-robin   in turns
    least-kv      the least used and wanted memory (INFaaS++)
    dispatch      the most freeness, nothing moves
    llumnix       the same, and requests move

Thresholds are the artifact's for distributions whose answers are long (10 blocks a job). They and the loads were looked
at with seeds from 100 on only. What headroom can win is little at the paper's rate: an urgent request alone takes 33 ms
a token on this card, and 35 to 37 among all others (mean of a run), 1.09 times at most. Requests do move for it, over a
thousand a run. At 2.6 and 3.7 times that rate headroom made them no faster (0.96 and 0.97 times on seed 100), while it
cost usual ones a quarter. `starved` is the share of time and replicas in which the first in the queue lacks memory,
`full` the share of time in which that is so at half of the replicas or more: then there is nowhere to move."""

from __future__ import annotations

import dataclasses
import json
import tempfile
from array import array
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from penstock.core.events import Event, Finished, Reported
from penstock.core.moving import Migrated
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
from penstock.lab.power_laws import URGENT, Conversations
from penstock.lab.simulate import simulate
from penstock.lab.trial import Finishes, deployment

CARD, REPLICAS = "a10g", 16
LLAMA_7B = {
    "model_type": "llama",
    "hidden_size": 4096,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 32,
    "intermediate_size": 11008,
    "vocab_size": 32000,
    "max_position_embeddings": 16384,
    "torch_dtype": "float16",
}
BLOCKS, BLOCK = 850, 16  # 13,600 tokens a replica
GB_S = 8.0  # 64 Gb/s between replicas
LOW, HIGH = 10.0, 10.0  # freeness of sources and targets, blocks a job
URGENT_BLOCKS = 100  # 1,600 tokens
URGENT_RATE, URGENT_CV = 26.0, 4.0
BATCH = {"max_tokens": 16384, "is_chunked": False, "stops_on_self": False}
ENGINE = {"preset": "vllm-v1", "order": "priority", "evict": "recompute-priority", "batch": BATCH}
MOVE = {"name": "llumnix", "low": LOW, "high": HIGH, "urgent_blocks": None}
BY_FREENESS = {"name": "llumnix", "metric": "freeness"}
VARIANTS: dict[str, dict[str, object]] = {
    "round-robin": {"route": "round-robin"},
    "least-kv": {"route": {"name": "llumnix", "metric": "kv_ratio"}},
    "dispatch": {"route": {"name": "llumnix", "metric": "steps"}},
    "llumnix": {"route": {"name": "llumnix", "metric": "steps"}, "move": MOVE},
    "plain": {"route": {**BY_FREENESS, "urgent_blocks": None}, "move": MOVE},
    "headroom": {
        "route": {**BY_FREENESS, "urgent_blocks": URGENT_BLOCKS},
        "move": {**MOVE, "urgent_blocks": URGENT_BLOCKS},
    },
}
LOADS = (0.8, 1.0, 1.2)
PREEMPTED = 0.075
FEWER, EARLIER, FASTER, SLOWER = 0.8, 3.0, 1.2, 1.05  # what the criterion asks


class Books:
    """First tokens, time a later token took, preemptions, movements, and how long replicas were there."""

    def __init__(self) -> None:
        self.first_s, self.gap_s = array("d"), array("d")
        self.urgent_gap_s, self.usual_gap_s = array("d"), array("d")
        self.num_preempted = self.num_moved = 0
        self.pause_s = array("d")
        self.num_seen = self.num_starved = self.num_full = 0
        self._starved: dict[str, bool] = {}
        self._seen: dict[str, tuple[float, float]] = {}

    def emit(self, event: Event) -> None:
        if isinstance(event, Finished):
            self._finish(event)
        elif isinstance(event, Migrated) and event.outcome == "committed":
            self.num_moved += 1
            if event.pause_s is not None:
                self.pause_s.append(event.pause_s)
        elif isinstance(event, Reported) and event.report.is_alive:
            first, _ = self._seen.get(event.report.replica, (event.at, event.at))
            self._seen[event.report.replica] = (first, event.at)
            self._starved[event.report.replica] = (
                event.report.head_blocks > event.report.free_blocks
            )
            starved = self._starved.values()
            self.num_seen += 1
            self.num_starved += self._starved[event.report.replica]
            self.num_full += 2 * sum(starved) >= len(starved)

    def _finish(self, event: Finished) -> None:
        if event.first_token_at is None or event.last_token_at is None:
            return
        self.first_s.append(event.first_token_at - event.arrived_at)
        self.num_preempted += bool(event.num_preemptions)
        if event.num_output > 1:
            gap_s = (event.last_token_at - event.first_token_at) / (event.num_output - 1)
            self.gap_s.append(gap_s)
            (self.urgent_gap_s if event.priority < 0 else self.usual_gap_s).append(gap_s)

    @property
    def replica_s(self) -> float:
        return sum(last - first for first, last in self._seen.values())


def run_one(variant: str, conversations: Conversations, **more: object) -> dict[str, object]:
    scaled = {"scale": "llumnix"} if "size" in more else {}
    books, finishes = Books(), Finishes()
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root) / "llama-7b"
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(LLAMA_7B), encoding="utf-8")
        config = deployment(
            {**ENGINE, **VARIANTS[variant], **scaled},
            model=str(folder),
            gpu=CARD,
            replicas=int(str(more.pop("replicas", REPLICAS))),
            cache={"num_blocks": BLOCKS, "block_size": BLOCK, "prefix": False},
            **more,
        )
        net = dataclasses.replace(config.net, latency_s=1e-4, kv_bytes_per_s=GB_S * 1e9)
        config = dataclasses.replace(config, net=net)
        simulate(config, conversations, has_gaps=False, listeners=(books, finishes))
    return {
        "ttft_mean_s": float(np.mean(books.first_s)),
        "ttft_p50_s": float(np.percentile(books.first_s, 50)),
        "ttft_p99_s": float(np.percentile(books.first_s, 99)),
        "gap_p99_s": float(np.percentile(books.gap_s, 99)),
        "urgent_gap_s": float(np.mean(books.urgent_gap_s)),
        "usual_gap_s": float(np.mean(books.usual_gap_s)),
        "preempted": books.num_preempted / conversations.num,
        "starved": books.num_starved / max(1, books.num_seen),
        "full": books.num_full / max(1, books.num_seen),
        "num_moved": books.num_moved,
        "pause_p99_s": float(np.percentile(books.pause_s, 99)) if books.pause_s else None,
        "replica_s": books.replica_s,
        "num_finished": len(finishes.names),
        "finished": finishes.digest(),
    }


# ---------------------------------------------------------------------------- what is run


LOAD_LENGTHS = (512, 512)  # mean of prompts (None: Azure's) and of answers
AZURE_LENGTHS = (None, 256)
URGENT_LENGTHS = (128, 128)


def prepare(scale: Scale) -> Settings:
    """The rates at which dispatch by memory preempts one request in thirteen."""
    return {
        "rate": _rate(scale, LOAD_LENGTHS, 2.0, 12.0),
        "azure_rate": _rate(scale, AZURE_LENGTHS, 3.0, 18.0),
    }


def _rate(scale: Scale, lengths: tuple[int | None, int], low: float, high: float) -> float:
    for _ in range(6):
        rate = (low * high) ** 0.5
        num = 1000 if scale.is_full else 200
        found = run_one(
            "least-kv", _conversations(scale, lengths, num=num, seed=99, rate_per_s=rate)
        )
        if number(found, "preempted") < PREEMPTED:
            low = rate
        else:
            high = rate
    return round(low, 2)


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
    num = 1000 if scale.is_full else 300
    loads = LOADS if scale.is_full else LOADS[-1:]
    kinds: list[tuple[str, str, float, float, int]] = [
        ("load", variant, load, rate * load, num)
        for load in loads
        for variant in ("round-robin", "least-kv", "dispatch", "llumnix")
    ]
    kinds += [("azure", variant, 1.0, azure, num) for variant in ("least-kv", "llumnix")]
    kinds += [("priorities", name, 1.0, URGENT_RATE, 2 * num) for name in ("plain", "headroom")]
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
            ttft, starved, full = (
                mean([row.number(name) for row in at]) for name in ("ttft_p99_s", "starved", "full")
            )
            figures.append(
                f"{variant} P99 TTFT {ttft:.1f} s, starved {starved:.0%}, full {full:.0%}"
            )
        told.append(f"{part} {load:g}: {', '.join(figures)}")
    return "; ".join(told)


def _ratio(name: str, values: tuple[float, ...], published: str = "", unit: str = "x") -> Ratio:
    return Ratio(name=name, values=values, published=published, unit=unit)


def _at(rows: Sequence[Row], part: str, load: float) -> list[Ratio]:
    others = ("round-robin", "dispatch") if part == "load" else ()
    found = [
        _ratio(f"{part} {load:g}: P99 TTFT, least-kv / {each}", _earlier(rows, part, load, each))
        for each in others
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
    f"{', '.join(f'{load:g}' for load in LOADS)} of the rate at which dispatch by memory preempts {PREEMPTED:.1%} of "
    f"the requests; Azure's prompts with answers of mean 256 in the same way; for priorities mean 128 (S-S) at "
    f"{URGENT_RATE:g}/s, Gamma CV {URGENT_CV:g}, one in {URGENT} urgent.",
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
