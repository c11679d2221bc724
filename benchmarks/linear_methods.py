"""Microseconds of one linear layer by method and rows: which one `choose_linear` should take on this machine.

    python benchmarks/linear_methods.py [--shape 5120x768] [--threads 1] [--json FILE]

Weights rotate through copies of 256 MB so that no cache holds them. Processor time of the calling thread with one
thread, else wall time; the lower quartile, since the machine may be busy.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path

import torch
from torch import Tensor

from penstock.engine.torch.kernels import available
from penstock.engine.torch.kernels.linear import PackedLinear
from penstock.engine.torch.linear import OneDnnLinear, PlainLinear, WidenedLinear
from penstock.engine.torch.ports import Linear, LinearMethod, ShardSpec

ROWS = (1, 2, 8, 32, 64, 256)


def quartile_us(layers: Sequence[Linear], x: Tensor, threads: int) -> float:
    clock = time.thread_time if threads == 1 else time.perf_counter
    taken = []
    for turn in range(24):
        begin = clock()
        layers[turn % len(layers)](x)
        taken.append(clock() - begin)
    return 1e6 * sorted(taken)[6]


def methods(dtype: torch.dtype) -> list[LinearMethod]:
    found: list[LinearMethod] = [PlainLinear()]
    if dtype == torch.float32 or torch.ops.mkldnn._is_mkldnn_bf16_supported():
        found.append(OneDnnLinear())
    if dtype == torch.bfloat16:
        found.append(WidenedLinear())
    if available():
        found.append(PackedLinear())
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--shape", default="5120x768", help="outputs x inputs")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    outputs, inputs = map(int, args.shape.split("x"))
    copies = max(2, (256 << 20) // (outputs * inputs * 2))
    found = []
    print(f"{'dtype':>9} {'method':>10}" + "".join(f"{f'M={rows}':>9}" for rows in ROWS))
    for dtype in (torch.float32, torch.bfloat16):
        for method in methods(dtype):
            weight = torch.randn(outputs, inputs).to(dtype)
            layers = [method.pack(weight.clone(), None, ShardSpec()) for _ in range(copies)]
            row = [
                quartile_us(layers, torch.randn(rows, inputs).to(dtype), args.threads)
                for rows in ROWS
            ]
            name = str(dtype).removeprefix("torch.")
            print(f"{name:>9} {method.name:>10}" + "".join(f"{us:9.0f}" for us in row))
            found.append(
                {"dtype": name, "method": method.name, "us": dict(zip(ROWS, row, strict=True))}
            )
            del layers
    if args.json:
        args.json.write_text(
            json.dumps({"shape": args.shape, "threads": args.threads, "found": found})
        )


if __name__ == "__main__":
    with torch.inference_mode():
        main()
