"""Llumnix's testbed, modelled: LLaMA-7B on 16 A10s, whole prompts in a step, and how requests get to replicas.

    round-robin   in turns
    least-kv      the least used and wanted memory (INFaaS++)
    dispatch      the most freeness, nothing moves
    llumnix       the same, and requests move
    plain         dispatch by the source's freeness, and requests move
    headroom      the same, with memory kept free where urgent requests run

What is measured of the fleet's memory, by its reports: `starved` is the share of time and replicas in which the first
in the queue lacks memory; `full` the share of time in which that is so at half of the replicas or more: then there is
nowhere to move; `avoidable` the share of preemptions at which the fleet had as much memory free, in all, as everybody
who waited asked for, whoever was put out among them: in one memory they would have fitted.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from array import array
from pathlib import Path

import numpy as np

from penstock.core.events import Event, Finished, Reported
from penstock.core.moving import Migrated
from penstock.core.types import Report
from penstock.lab.power_laws import Conversations
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


class Books:
    """First tokens, time a later token took, preemptions, movements, and how long replicas were there."""

    def __init__(self) -> None:
        self.first_s, self.gap_s = array("d"), array("d")
        self.urgent_gap_s, self.usual_gap_s = array("d"), array("d")
        self.num_preempted = self.num_moved = 0
        self.pause_s = array("d")
        self.num_seen = self.num_starved = self.num_full = 0
        self.num_put_out = self.num_avoidable = 0
        self._told: dict[str, Report] = {}
        self._seen: dict[str, tuple[float, float]] = {}

    def emit(self, event: Event) -> None:
        if isinstance(event, Finished):
            self._finish(event)
        elif isinstance(event, Migrated) and event.outcome == "committed":
            self.num_moved += 1
            if event.pause_s is not None:
                self.pause_s.append(event.pause_s)
        elif isinstance(event, Reported) and event.report.is_alive:
            self._hear(event.at, event.report)

    def _hear(self, at: float, report: Report) -> None:
        name = report.replica
        first, _ = self._seen.get(name, (at, at))
        self._seen[name] = (first, at)
        before = self._told.get(name)
        self._told[name] = report
        num = report.num_preemptions - (0 if before is None else before.num_preemptions)
        if num > 0:
            free = sum([each.free_blocks for each in self._told.values()])
            wanted = sum([each.waiting_blocks for each in self._told.values()])
            self.num_put_out += num
            self.num_avoidable += num * (free >= wanted)
        starved = [each.head_blocks > each.free_blocks for each in self._told.values()]
        self.num_seen += 1
        self.num_starved += report.head_blocks > report.free_blocks
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
        "avoidable": books.num_avoidable / max(1, books.num_put_out),
        "num_moved": books.num_moved,
        "pause_p99_s": float(np.percentile(books.pause_s, 99)) if books.pause_s else None,
        "replica_s": books.replica_s,
        "num_finished": len(finishes.names),
        "finished": finishes.digest(),
    }
