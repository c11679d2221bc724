"""Llumnix: what moving running requests between replicas saves.

Source: Sun et al., Llumnix: dynamic scheduling for large language model serving (OSDI 2024); AlibabaPAI/llumnix (v1).
Its testbed was 16 A10s with LLaMA-7B; here 16 modelled ones, on conversations of the Azure trace (prompts up to 2,048
tokens) whose answers follow a power law, Poisson arrivals. Rates are shares of the rate at which dispatch by memory
alone (INFaaS++ in the paper) begins to preempt: `prepare` looks for the one where it preempts about one request in
thirteen.

    round-robin   in turns
    least-kv      the least used and wanted memory (INFaaS++)
    dispatch      the most freeness, nothing moves
    llumnix       the same, and requests move

Priorities: one request in ten is urgent; who is urgent is the same with and without headroom for them. Scaling: the
same traffic on 4 to 16 replicas that take 30 s to come up, scaled by freeness with and without moves. """

from __future__ import annotations

import functools
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from penstock.core.events import Event, Finished, Migrated, Reported
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
    mean,
    number,
    outcome_of,
    paired,
)
from penstock.lab.simulate import simulate
from penstock.lab.trial import Finishes, deployment, read_requests
from penstock.traffic import TraceMeta
from penstock.traffic.arrivals import Poisson

MODEL, CARD, REPLICAS = "llama-2-7b", "a10g", 16
BLOCKS, BLOCK = 850, 16  # 13,600 tokens a replica
MAX_PROMPT, MAX_OUTPUT, MEAN_OUTPUT, TAIL = 2048, 2048, 256, 1.3
GB_S = 8.0  # 64 Gb/s between replicas
URGENT = 10  # one request in so many
VARIANTS: dict[str, dict[str, object]] = {
    "round-robin": {"route": "round-robin"},
    "least-kv": {"route": {"name": "llumnix", "metric": "kv_ratio"}},
    "dispatch": {"route": {"name": "llumnix", "metric": "freeness", "headroom_blocks": 0}},
    "llumnix": {
        "route": {"name": "llumnix", "metric": "freeness", "headroom_blocks": 0},
        "move": {"name": "llumnix", "headroom_blocks": 0},
    },
    "llumnix, headroom": {
        "route": {"name": "llumnix", "metric": "freeness"},
        "move": "llumnix",
    },
}
LOADS = (0.8, 1.0, 1.2)
FEWER, EARLIER, FASTER, SLOWER = 0.8, 3.0, 1.2, 1.05  # what the criterion asks


@functools.cache
def prompts_of(path: Path) -> tuple[int, ...]:
    found = (request.prompt.num_tokens for _, request in read_requests(path, 4096))
    return tuple(tokens for tokens in found if tokens <= MAX_PROMPT)


def output_of(uniform: float) -> int:
    """A Pareto of index TAIL from `least` on, cut off; its mean is about MEAN_OUTPUT."""
    least = MEAN_OUTPUT * (TAIL - 1) / TAIL * 1.6  # what is cut off would have been longer
    return max(1, min(MAX_OUTPUT, round(least * (1 - uniform) ** (-1 / TAIL))))


@dataclass(kw_only=True)
class Conversations:
    """`num` requests, Poisson."""

    path: Path
    num: int
    seed: int
    rate_per_s: float
    meta: TraceMeta = field(init=False)

    def __post_init__(self) -> None:
        self.meta = TraceMeta(f"{self.path.name}, power-law answers", "drawn", self.num, self.num)

    def __iter__(self) -> Iterator[tuple[float, Request]]:
        known = prompts_of(self.path)
        chance = stream(self.seed, "experiments", "llumnix")
        instants = Poisson(rate_per_s=self.rate_per_s).instants(self.seed)
        for place in range(self.num):
            prompt, output = known[chance.randrange(len(known))], output_of(chance.random())
            yield (
                next(instants),
                Request(
                    id=RequestId(f"talk-{place}"),
                    model="default",
                    prompt=TracedPrompt(prompt),
                    sampling=Sampling(max_tokens=MAX_OUTPUT),
                    priority=-1 if chance.randrange(URGENT) == 0 else 0,
                    true_output=output,
                ),
            )


class Books:
    """First tokens, time a later token took, preemptions, movements, and how long replicas were there."""

    def __init__(self) -> None:
        self.first_s, self.gap_s = array("d"), array("d")
        self.urgent_gap_s, self.usual_gap_s = array("d"), array("d")
        self.num_preempted = self.num_moved = 0
        self.pause_s = array("d")
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
    config = deployment(
        {"preset": "vllm-v1", "order": "priority", **VARIANTS[variant]},
        model=MODEL,
        gpu=CARD,
        replicas=int(str(more.pop("replicas", REPLICAS))),
        cache={"num_blocks": BLOCKS, "block_size": BLOCK, "prefix": False},
        **more,
    )
    books, finishes = Books(), Finishes()
    simulate(config, conversations, has_gaps=False, listeners=(books, finishes))
    return {
        "ttft_p50_s": float(np.percentile(books.first_s, 50)),
        "ttft_p99_s": float(np.percentile(books.first_s, 99)),
        "gap_p99_s": float(np.percentile(books.gap_s, 99)),
        "urgent_gap_s": float(np.mean(books.urgent_gap_s)),
        "usual_gap_s": float(np.mean(books.usual_gap_s)),
        "preempted": books.num_preempted / conversations.num,
        "num_moved": books.num_moved,
        "pause_p99_s": float(np.percentile(books.pause_s, 99)) if books.pause_s else None,
        "replica_s": books.replica_s,
        "num_finished": len(finishes.names),
        "finished": finishes.digest(),
    }
