"""What copies between two memories cost here: block by block, in runs, and how small the pieces may be.

    python benchmarks/swap.py [--tokens 1008] [--repeats 15] [--json FILE]

Two arenas of 512 MiB in this machine's memory, laid out as 32 layers of keys and values of LLaMA-8B (32 KiB a block of
16 tokens, 64 pieces). `tokens` positions of one job are copied from one to the other by the engine's own mover code
(penstock.engine.torch.mover.copy_runs), as blocks in scattered places and as one run. Pages are touched first, and the
least of several repeats is taken, since what others do on the machine only adds. Host and device are the same memory
here: on a GPU it is the start of a copy (5 to 10 us) that weighs, here it is one line of Python and the cache.
"""

from __future__ import annotations

import argparse
import json
import random
import time
from pathlib import Path

import numpy as np

from penstock.core.plans import Transfer
from penstock.engine.torch.mover import copy_runs

PIECES, BLOCK_TOKENS, BLOCK_BYTES = 64, 16, 32 << 10
ARENA_BYTES = 512 << 20


def seconds(device: np.ndarray, host: np.ndarray, transfer: Transfer, repeats: int) -> float:
    """Processor seconds of the fastest repeat."""
    found = []
    for _ in range(repeats):
        began = time.process_time()
        copy_runs(device, host, transfer)
        found.append(time.process_time() - began)
    return min(found)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tokens", type=int, default=1008)
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path)
    told = parser.parse_args()
    num_blocks = ARENA_BYTES // (PIECES * BLOCK_BYTES)
    device = np.ones(
        (PIECES, num_blocks, BLOCK_BYTES), np.uint8
    )  # written, so that its pages are there
    host = np.full((PIECES, num_blocks, BLOCK_BYTES), 2, np.uint8)
    count = told.tokens // BLOCK_TOKENS
    chance = random.Random(0)
    ours, theirs = (chance.sample(range(num_blocks), count) for _ in range(2))
    single = tuple((mine, other, 1) for mine, other in zip(ours, theirs, strict=True))
    in_order = tuple((at, at, 1) for at in range(count))
    ways = {
        "block by block, scattered": Transfer(0, 0, True, single),
        "block by block, in order": Transfer(1, 0, True, in_order),
        "one run": Transfer(2, 0, True, ((0, 0, count),)),
    }
    num_bytes = count * PIECES * BLOCK_BYTES
    rows = {}
    for name, transfer in ways.items():
        took = seconds(device, host, transfer, told.repeats)
        rows[name] = {
            "copies": len(transfer.runs) * PIECES,
            "seconds": took,
            "gb_s": num_bytes / took / 1e9,
        }
        print(
            f"{name:28} {rows[name]['copies']:6,} copies  {took * 1e3:7.2f} ms  {rows[name]['gb_s']:5.2f} GB/s"
        )
    ratio = rows["block by block, scattered"]["seconds"] / rows["one run"]["seconds"]
    print(
        f"{num_bytes / 2**20:.0f} MiB; scattered blocks take {ratio:.2f} times as long as one run"
    )
    if told.json is not None:
        told.json.write_text(json.dumps({"num_bytes": num_bytes, "ratio": ratio, "ways": rows}))


if __name__ == "__main__":
    main()
