"""Blocks named by hash, or a tree of prefixes: how much of the prompts each finds again, at the same memory.

    python -m benchmarks.prefix_stores [--data FOLDER] [--requests 2000] [--only chat] [--json FILE] [--page PAGE]

One modelled H100 with an 8B model serves

    mooncake   the first requests of the Mooncake conversation trace, played at a fifth of its speed (FOLDER holds
               traces/mooncake_conversation.jsonl; left out without)
    chat       conversations of examples/workloads/chat.toml, 2 a second for 240 s
    agents     programs of examples/workloads/agents.toml, one in 3 s

with the memory of each row, vLLM v1's scheduler and each store: the ledger of hashes, the tree under every order of
eviction, and both with longest-prefix-first before the queue. Printed is the share of prompt tokens found cached when a
request was first admitted. Answers are found by nobody here: no trace tells what they were, and later prompts that
contain them name them anew.

--page writes the table between the two marks in that file: docs/performance.md is made so.
"""

from __future__ import annotations

import argparse
import json
import os
from collections.abc import Mapping
from pathlib import Path

from penstock.assemble import load_config
from penstock.lab.simulate import Traffic, simulate
from penstock.traffic import open_trace

ROOT = Path(__file__).parents[1]
BEGIN, END = "<!-- table of benchmarks/prefix_stores.py -->", "<!-- end of the table -->"
TREES = ("lru", "lfu", "slru", "fifo", "filo", "mru")
STORES: dict[str, dict[str, object]] = {
    "hash, lru": {"cache.store": "hash"},
    **{
        f"tree, {by}": {"cache.store": "radix", "policy.blocks": {"name": "leaves", "by": by}}
        for by in TREES
    },
    "hash, lru; lpm": {"cache.store": "hash", "policy.order": "lpm"},
    "tree, lru; lpm": {"cache.store": "radix", "policy.order": "lpm"},
}
MEMORIES = {"mooncake": (32_000, 128_000), "chat": (4_000, 8_000), "agents": (4_000, 8_000)}
Row = tuple[str, int, dict[str, float]]


def traffic_of(workload: str, data: Path | None, requests: int) -> Traffic | None:
    if workload == "mooncake":
        if data is None:
            return None
        path = data / "traces" / "mooncake_conversation.jsonl"
        return open_trace(path, limit=requests, speed=0.2, model="default")
    path = ROOT / "examples" / "workloads" / f"{workload}.toml"
    rate = {"chat": 2.0, "agents": 1 / 3}[workload]
    return open_trace(path, rate_per_s=rate, seed=1, model="default")


def hit_rate(traffic: Traffic, num_blocks: int, store: Mapping[str, object]) -> float:
    flags: dict[str, object] = {
        "fleet.0.name": "default",
        "fleet.0.executor": {"kind": "modelled", "gpu": "h100"},
        "fleet.0.cache.num_blocks": num_blocks,
        **{f"fleet.0.{key}": value for key, value in store.items()},
    }
    config = load_config(model="llama-3.1-8b", flags=flags)
    found = simulate(config, traffic, has_gaps=False).figures.all
    return found.cached_tokens / found.prompt_tokens


def table(rows: list[Row]) -> str:
    lines = [
        f"| workload | memory, tokens | {' | '.join(STORES)} |",
        f"|---|---|{'---|' * len(STORES)}",
    ]
    for workload, num_blocks, found in rows:
        shares = " | ".join(f"{100 * share:.1f} %" for share in found.values())
        lines.append(f"| {workload} | {num_blocks * 16:,} | {shares} |")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--data", type=Path, default=os.environ.get("PENSTOCK_DATA"))
    parser.add_argument("--requests", type=int, default=2000)
    parser.add_argument("--only", choices=list(MEMORIES))
    parser.add_argument("--json", type=Path)
    parser.add_argument("--page", type=Path)
    asked = parser.parse_args()
    data = None if asked.data is None else Path(asked.data)
    rows: list[Row] = []
    for workload, memories in MEMORIES.items():
        if asked.only not in (None, workload):
            continue
        for num_blocks in memories:
            found: dict[str, float] = {}
            for name, store in STORES.items():
                traffic = traffic_of(workload, data, asked.requests)
                if traffic is None:
                    break
                found[name] = hit_rate(traffic, num_blocks, store)
                print(f"{workload} {num_blocks} {name}: {found[name]:.4f}", flush=True)
            if found:
                rows.append((workload, num_blocks, found))
                if asked.json is not None:
                    asked.json.write_text(json.dumps(rows))
    print(table(rows))
    if asked.page is not None:
        text = asked.page.read_text()
        before, rest = text.split(BEGIN, 1)
        _, after = rest.split(END, 1)
        asked.page.write_text(f"{before}{BEGIN}\n{table(rows)}\n{END}{after}")


if __name__ == "__main__":
    main()
