"""Which scheduler carries the most load within a promise: every policy of the table below on four workloads.

    python -m benchmarks.schedulers [--only chat,agents] [--seeds 2] [--processes 2] [--json FILE] [--page PAGE]

For each workload of examples/workloads (chat, code, long_context, agents), three promises (prompt: an early first
token; smooth: short gaps; relaxed) and a ladder of rates, one modelled A100-80G with an 8B model runs each scheduler.
What is compared is the highest rate at which 90 % of all requests keep the promise (report.capacity: interpolated
between two rates of the ladder). A scheduler that reads promises is told each of them and run again; the others are
run once and judged by all three. Scheduler time is not charged. A winner is named when its capacity is above the
runner-up's for every seed; else both are named.

--page writes the table between the two marks in that file: docs/schedulers.md is made so.
"""

from __future__ import annotations

import argparse
import dataclasses
import itertools
import json
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

from penstock.assemble import load_config
from penstock.core.events import Event, Finished, Refused
from penstock.core.types import Slo
from penstock.lab.simulate import simulate
from penstock.report.capacity import Capacity, capacity_of
from penstock.traffic import open_trace

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- table of benchmarks/schedulers.py -->", "<!-- end of the table -->"
PROMISES: dict[str, dict[str, tuple[float, float]]] = {  # workload -> promise -> (TTFT s, TPOT s)
    "chat": {"prompt": (0.5, 0.1), "smooth": (2.0, 0.035), "relaxed": (10.0, 0.1)},
    "code": {"prompt": (1.0, 0.2), "smooth": (2.0, 0.06), "relaxed": (5.0, 0.2)},
    "long_context": {"prompt": (3.0, 0.15), "smooth": (8.0, 0.06), "relaxed": (20.0, 0.2)},
    "agents": {"prompt": (1.0, 0.15), "smooth": (3.0, 0.05), "relaxed": (10.0, 0.15)},
}
RATES: dict[str, tuple[float, ...]] = {  # conversations, requests, requests, programs a second
    "chat": (1.0, 1.5, 2.0, 2.5, 3.0, 4.0),
    "code": (0.25, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0),
    "long_context": (0.1, 0.2, 0.3, 0.45, 0.6),
    "agents": (0.1, 0.2, 0.3, 0.45, 0.6),
}
SCHEDULERS: dict[str, dict[str, object]] = {
    "vllm-v1 (2,048)": {"preset": "vllm-v1"},
    "vllm-v1 (512)": {"preset": "vllm-v1", "batch": {"name": "vllm-v1", "max_tokens": 512}},
    "sglang": {"preset": "sglang"},
    "split-fuse": {"preset": "split-fuse"},
    "prefill-first": {"preset": "prefill-first"},
    "past-future": {"preset": "vllm-v1", "admit": "past-future"},
    "sjf": {"preset": "vllm-v1", "order": "sjf"},
    "lpm": {"preset": "vllm-v1", "order": "lpm"},
    "vtc": {"preset": "vllm-v1", "order": "vtc"},
    "layered": {"preset": "layered"},
    "slack-edf": {"preset": "vllm-v1", "order": "slack-edf"},
    "flow-prefill": {"preset": "flow-prefill"},
}
READS_PROMISES = ("slack-edf", "flow-prefill")


@dataclasses.dataclass(frozen=True)
class Run:
    """One simulation. `promise` None: told to nobody, judged by all."""

    workload: str
    scheduler: str
    rate: float
    seed: int
    promise: str | None


class Kept:
    """Counts whose answers kept each promise. What was refused kept none."""

    def __init__(self, promises: Mapping[str, tuple[float, float]]) -> None:
        self.kept = dict.fromkeys(promises, 0)
        self.num = 0
        self._promises = promises

    def emit(self, event: Event) -> None:
        if isinstance(event, Refused):
            self.num += 1
        if not isinstance(event, Finished):
            return
        self.num += 1
        if event.first_token_at is None or event.last_token_at is None:
            return
        ttft_s = event.first_token_at - event.arrived_at
        later = event.num_output - 1
        tpot_s = (event.last_token_at - event.first_token_at) / later if later > 0 else 0.0
        for name, (most_ttft_s, most_tpot_s) in self._promises.items():
            self.kept[name] += ttft_s <= most_ttft_s and tpot_s <= most_tpot_s


def play(run: Run) -> tuple[Run, dict[str, float]]:
    promises = PROMISES[run.workload]
    slo = Slo()
    if run.promise is not None:
        promises = {run.promise: promises[run.promise]}
        slo = Slo(ttft_s=promises[run.promise][0], tpot_s=promises[run.promise][1])
    config = load_config(
        model="llama-3.1-8b",
        flags={
            "seed": run.seed,
            "fleet.0.name": "default",
            "fleet.0.executor": {"kind": "modelled", "gpu": "a100-80g"},
            "fleet.0.policy": SCHEDULERS[run.scheduler],
        },
    )
    trace = open_trace(
        ROOT / "examples" / "workloads" / f"{run.workload}.toml",
        rate_per_s=run.rate,
        seed=run.seed,
        model="default",
        slo=slo,
    )
    kept = Kept(promises)
    simulate(config, trace, has_gaps=False, listeners=(kept,))
    return run, {name: count / max(1, kept.num) for name, count in kept.kept.items()}


def runs(workloads: Sequence[str], num_seeds: int) -> Iterator[Run]:
    for workload in workloads:
        points = itertools.product(SCHEDULERS, RATES[workload], range(num_seeds))
        for scheduler, rate, seed in points:
            told = PROMISES[workload] if scheduler in READS_PROMISES else (None,)
            for promise in told:
                yield Run(workload, scheduler, rate, seed, promise)


Ladders = dict[tuple[str, str], dict[str, dict[int, dict[float, float]]]]


def measure(args: argparse.Namespace, workloads: Sequence[str]) -> Ladders:
    """(workload, promise) -> scheduler -> seed -> rate -> share that kept it."""
    todo = list(runs(workloads, args.seeds))
    found: Ladders = defaultdict(lambda: defaultdict(lambda: defaultdict(dict)))
    with ProcessPoolExecutor(args.processes) as pool:
        for done, (run, shares) in enumerate(pool.map(play, todo, chunksize=4), 1):
            for promise, share in shares.items():
                found[run.workload, promise][run.scheduler][run.seed][run.rate] = share
            if sys.stderr.isatty():
                print(f"\r{done} of {len(todo)}", end="", file=sys.stderr)
    return found


def capacity(ladder: Mapping[int, Mapping[float, float]]) -> tuple[float, list[float]]:
    """Mean and by seed; 0 when the lowest rate already misses."""
    by_seed = [rate_of(capacity_of(dict(steps))) for steps in ladder.values()]
    return sum(by_seed) / len(by_seed), by_seed


def rate_of(found: Capacity) -> float:
    return 0.0 if found.load is None else found.load


def table(found: Ladders) -> str:
    lines = [
        "| workload | promise (TTFT, TPOT) | most load | next | vllm-v1 (2,048) | least |",
        "|---|---|---|---|---|---|",
    ]
    for (workload, promise), ladders in sorted(found.items(), key=lambda item: place(*item[0])):
        ttft_s, tpot_s = PROMISES[workload][promise]
        carried = {name: capacity(ladder) for name, ladder in ladders.items()}
        ranked = sorted(carried, key=lambda name: -carried[name][0])
        first, second = ranked[:2]
        pairs = zip(carried[first][1], carried[second][1], strict=True)
        is_clear = all(one > other for one, other in pairs)
        best = told(first, carried) if is_clear else f"{told(first, carried)} or {second}"
        lines.append(
            f"| {workload.replace('_', ' ')} | {promise} ({ttft_s:g} s, {1000 * tpot_s:g} ms) | {best} | "
            f"{told(second, carried)} | {carried['vllm-v1 (2,048)'][0]:.2f} | {told(ranked[-1], carried)} |"
        )
    return "\n".join(lines)


def place(workload: str, promise: str) -> tuple[int, int]:
    return list(PROMISES).index(workload), list(PROMISES[workload]).index(promise)


def told(name: str, carried: Mapping[str, tuple[float, list[float]]]) -> str:
    mean, by_seed = carried[name]
    return f"{name} {mean:.2f} [{min(by_seed):.2f}..{max(by_seed):.2f}]"


def main() -> None:
    parser = argparse.ArgumentParser(description="Which scheduler carries the most load.")
    parser.add_argument("--only", default=",".join(PROMISES), help="workloads, by comma")
    parser.add_argument("--seeds", type=int, default=2)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument("--json", type=Path, help="all shares, to this file")
    parser.add_argument("--page", type=Path, help="a page with the two marks")
    args = parser.parse_args()
    found = measure(args, args.only.split(","))
    shown = table(found)
    print(shown)
    if args.json:
        rows = [
            {"workload": w, "promise": p, "scheduler": s, "seed": seed, "rate": rate, "kept": kept}
            for (w, p), ladders in found.items()
            for s, ladder in ladders.items()
            for seed, steps in ladder.items()
            for rate, kept in steps.items()
        ]
        args.json.write_text(json.dumps({"schema": 1, "is_simulation": True, "rows": rows}) + "\n")
    if args.page:
        text = args.page.read_text(encoding="utf-8")
        head, _, rest = text.partition(BEGIN)
        _, _, tail = rest.partition(END)
        args.page.write_text(f"{head}{BEGIN}\n{shown}\n{END}{tail}", encoding="utf-8")


if __name__ == "__main__":
    main()
