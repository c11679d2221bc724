"""A decode step as recorded kernel calls, beside the same step called one by one from Python.

    python benchmarks/recorded_steps.py [--weights stored,int8,int4] [--batch 1] [--context 512] [--model FOLDER]

Without --model a random Llama of Qwen3-0.6B's widths is written to a temporary folder. Both forms run in turns on one
thread over the same packed weights; given is the lower quartile of the thread's processor time, and how many times the
file of packed weights is faster to load than the checkpoint is to pack.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import torch
from random_models import save_random_llama

from penstock.engine.folder import model_facts
from penstock.engine.torch import kernels
from penstock.engine.torch.build import Built, EngineConfig, build_decoder
from penstock.engine.torch.decoder import Alone, Decoder, StepInput
from penstock.engine.torch.ports import StepMeta

SHAPE = dict(
    hidden_size=1024,
    intermediate_size=3072,
    num_hidden_layers=28,
    num_attention_heads=16,
    num_key_value_heads=8,
    head_dim=128,
    vocab_size=151936,
)
SIZE = 16


def stepper(decoder: Decoder, batch: int, context: int) -> Callable[[], None]:
    blocks = -(-context // SIZE)
    table = torch.arange(batch * blocks, dtype=torch.int32).view(batch, blocks)
    slots = table[:, (context - 1) // SIZE].long() * SIZE + (context - 1) % SIZE
    starts, ends = torch.arange(batch + 1).int(), torch.full((batch,), context).int()
    ids, places = torch.arange(batch) + 5, torch.full((batch,), context - 1)

    def step() -> None:
        meta = StepMeta(starts, ends, table, slots, 1, context)
        forward = decoder.forward(StepInput(ids, places, None, meta))
        while True:
            try:
                next(forward)
            except StopIteration as end:
                kernels.pick_tokens(decoder.logits(end.value))
                return

    return step


def timed(step: Callable[[], None]) -> list[float]:
    """Milliseconds of processor time; the first of four is not counted."""
    took = []
    for _ in range(4):
        begin = time.thread_time()
        step()
        took.append(1e3 * (time.thread_time() - begin))
    return took[1:]


def opened(folder: Path, weights: str, num_blocks: int, cache: Path) -> tuple[Built, float]:
    config = EngineConfig(
        device="cpu",
        num_blocks=num_blocks,
        weights=weights,  # type: ignore[arg-type]
        packed_cache=str(cache),
    )
    begin = time.process_time()
    built = build_decoder(model_facts(folder), config, Alone(), None)
    took = time.process_time() - begin
    for thread in threading.enumerate():
        if thread.name == "penstock-packed":
            thread.join()
    return built, took


def compare(folder: Path, weights: str, args: argparse.Namespace, cache: Path) -> str:
    num_blocks = args.batch * -(-args.context // SIZE)
    _, packing_s = opened(folder, weights, num_blocks, cache)
    built, mapping_s = opened(folder, weights, num_blocks, cache)
    decoder = built.decoder
    step, spaces = stepper(decoder, args.batch, args.context), decoder.spaces
    plain: list[float] = []
    recorded: list[float] = []
    with torch.inference_mode():
        for _ in range(args.rounds):
            decoder.spaces = None
            plain += timed(step)
            decoder.spaces = spaces
            recorded += timed(step)
    first, second = (statistics.quantiles(each, n=4)[0] for each in (plain, recorded))
    return (
        f"{weights:8} plain {first:7.2f} ms  recorded {second:7.2f} ms  ratio {first / second:5.2f}  "
        f"packed in {packing_s:5.2f} s  mapped in {mapping_s:5.2f} s (processor time)"
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    parser.add_argument("--weights", default="stored,int8,int4")
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--context", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=10)
    parser.add_argument("--model", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        folder = args.model or Path(root) / "model"
        if args.model is None:
            folder.mkdir()
            save_random_llama(folder, SHAPE, is_tied=True)
        for weights in args.weights.split(","):
            print(compare(folder, weights, args, Path(root) / weights), flush=True)


if __name__ == "__main__":
    main()
