"""The simulator beside real vLLM: the same requests, the same batch limits, mean latencies and the error.

    python -m benchmarks.simulated_vllm FOLDER [--json]

FOLDER holds runs as LLMServingSim publishes them (bench/examples of casys-kaist/LLMServingSim, MIT licence): a folder
each with meta.json and requests.jsonl (arrivals, lengths and instants of first and last token of vLLM 0.19). Models are
known by their shape and cards by the catalogue; nothing is fitted to the runs. A run on two cards of a kind whose
all-reduce was never measured is charged what two L40S take, which also talk over PCIe; the line says so.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import statistics
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from penstock.assemble.presets import policy_tables
from penstock.cluster.predictors import predictors_of
from penstock.cluster.spec import ExecutorSpec, policies_of
from penstock.core.clock import sleep_until
from penstock.core.config import Table
from penstock.core.events import Event, Finished
from penstock.core.prompt import TracedPrompt
from penstock.core.types import Caps, Request, RequestId, Sampling
from penstock.cost.hardware import Card, card_of, num_blocks
from penstock.cost.roofline import Roofline
from penstock.cost.shapes import shape_of
from penstock.engine.replica import Replica, ReplicaConfig
from penstock.sim.executor import ModelledExecutor
from penstock.sim.loop import run

CARDS = {"RTX4090": "rtx-4090", "RTXPRO6000": "rtx-pro-6000", "H100": "h100", "A100": "a100-80g"}
SHAPES = {"meta-llama/Llama-3.1-8B": "llama-3.1-8b", "Qwen/Qwen3-32B": "qwen3-32b"}


@dataclass(frozen=True)
class Row:
    """Seconds of one request, real or simulated."""

    ttft_s: float
    tpot_s: float
    e2e_s: float


class Finishes:
    def __init__(self) -> None:
        self.events: list[Finished] = []

    def emit(self, event: Event) -> None:
        if isinstance(event, Finished):
            self.events.append(event)


def row_of(arrived: float, first: float, last: float, num_output: int) -> Row:
    return Row(first - arrived, (last - first) / max(1, num_output - 1), last - arrived)


def read_real(folder: Path) -> tuple[list[tuple[float, Request]], list[Row]]:
    """Requests by arrival, and what vLLM made of them (its own clock, from the moment it queued them)."""
    lines = (folder / "requests.jsonl").read_text().splitlines()
    found = sorted((json.loads(line) for line in lines), key=lambda one: one["arrival_time"])
    first_at = found[0]["arrival_time"]
    requests, rows = [], []
    for one in found:
        size = one["output_toks"]
        request = Request(
            id=RequestId(one["request_id"]),
            model="m",
            prompt=TracedPrompt(one["input_toks"]),
            sampling=Sampling(max_tokens=size),
            true_output=size,
        )
        requests.append((one["arrival_time"] - first_at, request))
        rows.append(row_of(one["queued_ts"], one["first_token_ts"], one["last_token_ts"], size))
    return requests, rows


def card_for(folder: Path, tp: int) -> tuple[Card, str]:
    card = card_of(CARDS[folder.name.partition("_")[0]])
    if any(size == tp for size, _, _ in card.all_reduce) or tp == 1:
        return card, ""
    return dataclasses.replace(card, all_reduce=card_of("l40s").all_reduce), "all-reduce as L40S"


async def serve(
    requests: Sequence[tuple[float, Request]], model: Roofline, blocks: int, max_jobs: int
) -> list[Finished]:
    log = Finishes()
    tables = policy_tables({"preset": "vllm-v1"}, has_prefix_cache=True)
    tables.pop("route")
    tables["batch"] = Table({**tables["batch"], "max_jobs": max_jobs})
    shape = model.shape
    caps = Caps(num_layers=shape.layers, max_context=shape.max_context, max_repeat=1 << 20)
    replica = Replica(
        ReplicaConfig(num_blocks=blocks),
        ModelledExecutor(model, caps=caps),
        policies_of(tables),
        predictors_of(ExecutorSpec(kind="modelled", gpu="h100"), shape),
        log=log,
    )
    for at, request in requests:
        await sleep_until(at)
        replica.submit(request, every_token=False)
    await replica.drain()
    return log.events


def compare(folder: Path) -> dict[str, object]:
    """One run: mean of each latency in reality and in the simulator, and the signed error in %."""
    meta = json.loads((folder / "meta.json").read_text())
    engine = meta["engine_kwargs"]
    tp = engine["tensor_parallel_size"]
    card, note = card_for(folder, tp)
    shape = shape_of(SHAPES[meta["model"]])
    blocks = meta.get("kv_cache", {}).get("num_gpu_blocks") or num_blocks(card, shape, tp=tp)
    requests, real = read_real(folder)
    events = run(serve(requests, Roofline(shape, card, tp=tp), blocks, engine["max_num_seqs"]))
    simulated = [
        row_of(one.arrived_at, one.first_token_at or 0.0, one.last_token_at or 0.0, one.num_output)
        for one in events
    ]
    told: dict[str, object] = {
        "run": folder.name,
        "requests": len(real),
        "blocks": blocks,
        "note": note,
    }
    for name in ("ttft_s", "tpot_s", "e2e_s"):
        was = statistics.fmean(getattr(row, name) for row in real)
        came = statistics.fmean(getattr(row, name) for row in simulated)
        told[name] = {"real": was, "simulated": came, "error_percent": 100 * (came / was - 1)}
    return told


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--json", action="store_true")
    args = parser.parse_args()
    for meta in sorted(args.folder.glob("*/meta.json")):
        if json.loads(meta.read_text())["model"] not in SHAPES:
            continue
        told = compare(meta.parent)
        if args.json:
            print(json.dumps(told))
            continue
        print(f"{told['run']}: {told['requests']} requests, {told['blocks']} blocks {told['note']}")
        for name in ("ttft_s", "tpot_s", "e2e_s"):
            one = told[name]
            assert isinstance(one, dict)
            print(
                f"  {name:7} real {one['real']:9.4f}  simulated {one['simulated']:9.4f}  "
                f"error {one['error_percent']:+6.1f} %"
            )


if __name__ == "__main__":
    main()
