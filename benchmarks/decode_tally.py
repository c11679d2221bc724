"""Where the processor time of a decode step goes, by kind of work.

    python benchmarks/decode_tally.py --model FOLDER [--weights stored,int8,int4] [--context 512] [--batch 1]

One thread. Recorded kernel calls are told apart by stamps that are put between them into the program itself (compiled
by the engine's own compiler), each with its median over the steps, so that being preempted does not count; everything
else by the thread's processor time around it. "layers, Python" is what is left of the forward, the stamps with it.
GB/s: the bytes that a kind must read (weights as they are packed; keys and values of the context) by its time; a plain
read of memory is timed between the steps. Medians over steps; the other processes of the machine hardly matter.

A lane runs pieces on end; here they are run one at a time, and what the Python between them costs is told by steps of
both kinds in turns, before the stamps are put in.
"""

from __future__ import annotations

import argparse
import ctypes
import statistics
import subprocess
import tempfile
import threading
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from penstock.engine.folder import model_facts
from penstock.engine.torch import kernels
from penstock.engine.torch.build import EngineConfig, build_decoder
from penstock.engine.torch.decoder import Alone, Decoder, StepInput
from penstock.engine.torch.kernels import library
from penstock.engine.torch.kernels.build import find_compiler
from penstock.engine.torch.kernels.program import Halt, Program, ProgramStep
from penstock.engine.torch.ports import StepMeta
from penstock.lab.speed.reading import loop

SIZE = 16
STAMP = r"""
#include <time.h>
extern "C" void stamp(const void*, const void* at, int) {
    timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    *(long long*)at = now.tv_sec * 1000000000LL + now.tv_nsec;
}
"""


class Stamped:
    """A program's pieces with a stamp before each call and behind the last."""

    def __init__(self, program: Program, names: Sequence[str]) -> None:
        self.names, steps = list(names), program._steps
        self._folder = tempfile.TemporaryDirectory()
        source, made = Path(self._folder.name) / "stamp.cpp", Path(self._folder.name) / "stamp.so"
        source.write_text(STAMP)
        subprocess.run(
            [find_compiler(), "-O2", "-shared", "-fPIC", str(source), "-o", str(made)], check=True
        )
        entry = ctypes.cast(ctypes.CDLL(str(made)).stamp, ctypes.c_void_p).value
        self.at = np.zeros(2 * len(steps), np.int64)
        base = self.at.ctypes.data
        self._steps = (ProgramStep * (3 * len(steps)))()
        for i, step in enumerate(steps):
            for place, (call, arg) in enumerate(
                ((entry, base + 16 * i), (step.entry, step.call), (entry, base + 16 * i + 8))
            ):
                self._steps[3 * i + place].entry, self._steps[3 * i + place].call = call, arg
        old, each = ctypes.addressof(steps), ctypes.sizeof(ProgramStep)
        new = ctypes.addressof(self._steps)

        def moved(segment: Any) -> Any:
            if not isinstance(segment, tuple):
                return segment
            first = (segment[0] - old) // each
            return (new + 3 * first * each, 3 * segment[1])

        program._pieces = [[moved(segment) for segment in piece] for piece in program._pieces]

    def take(self) -> NDArray[np.int64]:
        """Nanoseconds of each call of the last step."""
        begin, end = self.at.reshape(-1, 2).T
        found: NDArray[np.int64] = end - begin
        return found

    def by_kind(self, steps: Sequence[NDArray[np.int64]]) -> dict[str, float]:
        """Milliseconds: of each call its median."""
        found: dict[str, float] = {}
        for name, took in zip(self.names, np.median(np.stack(steps), axis=0).tolist(), strict=True):
            found[name] = found.get(name, 0.0) + took / 1e6
        return found


def named(
    decoder: Decoder, calls: Sequence[tuple[Any, ctypes.Structure, Any]]
) -> tuple[list[str], dict[str, int]]:
    """A kind for each recorded call, and the bytes that all calls of a kind read of weights."""
    shape, names, read = decoder.shape, [], {}
    for _, call, _ in calls:
        name = type(call).__name__.removesuffix("Call").lower()
        if isinstance(call, library.LinearCall | library.QuantisedCall | library.ShortsCall):
            kinds = {
                (shape.hidden, (shape.num_heads + 2 * shape.num_kv_heads) * shape.head_dim): "qkv",
                (shape.num_heads * shape.head_dim, shape.hidden): "out",
                (shape.hidden, 2 * shape.intermediate): "gate_up",
                (shape.intermediate, shape.hidden): "down",
            }
            name = "linear " + kinds[call.num_in, call.num_out]
            size = call.num_in * call.num_out
            if isinstance(call, library.QuantisedCall):
                size = size * call.bits // 8 + 2 * size // call.group
            elif isinstance(call, library.ShortsCall):
                size = 2 * size + 2 * size // call.group
            else:
                size *= 2 if call.bf16 else 4
            read[name] = read.get(name, 0) + size
        names.append(name)
    return names, read


def stepper(
    decoder: Decoder, batch: int, context: int, clock: dict[str, float]
) -> Callable[[], None]:
    blocks = -(-context // SIZE)
    table = torch.arange(batch * blocks, dtype=torch.int32).view(batch, blocks)
    slots = table[:, (context - 1) // SIZE].long() * SIZE + (context - 1) % SIZE
    starts, ends = torch.arange(batch + 1).int(), torch.full((batch,), context).int()
    ids, places = torch.arange(batch) + 5, torch.full((batch,), context - 1)

    def step() -> None:
        now = time.thread_time
        at = [now()]
        meta = StepMeta(starts, ends, table, slots, 1, context)
        forward = decoder.forward(StepInput(ids, places, None, meta))
        while True:
            try:
                next(forward)
            except StopIteration as end:
                at.append(now())
                hidden = end.value
                break
        out = decoder.head(hidden)
        at.append(now())
        logits = out.float()
        at.append(now())
        kernels.pick_tokens(logits)
        at.append(now())
        for name, begin, end_at in zip(
            ("layers", "head", "to floats", "pick"), at[:-1], at[1:], strict=True
        ):
            clock[name] = 1e3 * (end_at - begin)

    return step


def with_and_without_pieces(step: Callable[[], None], turns: int) -> tuple[float, float]:
    """Milliseconds of a step whose pieces run one at a time, and on end as on a lane's thread."""
    took: tuple[list[float], list[float]] = ([], [])

    def run() -> None:
        torch.set_num_threads(1)
        with torch.inference_mode():
            for turn in range(2 * turns + 2):
                if turn == 0:
                    halt.bind()
                halt.set(
                    turn % 2 == 0
                )  # somebody always wants the thread: it looks up after every piece
                begin = time.thread_time()
                step()
                if turn > 1:
                    took[turn % 2].append(1e3 * (time.thread_time() - begin))

    halt = Halt()
    thread = threading.Thread(target=run)
    thread.start()
    thread.join()
    return statistics.median(took[0]), statistics.median(took[1])


def plain_read(memory: torch.Tensor) -> float:
    """GB/s."""
    begin = time.thread_time()
    loop()[0](memory.data_ptr(), memory.nbytes)
    return memory.nbytes / (time.thread_time() - begin) / 1e9


def tally(folder: Path, weights: str, args: argparse.Namespace, cache: Path) -> None:
    config = EngineConfig(
        device="cpu",
        num_blocks=args.batch * -(-args.context // SIZE),
        weights=weights,
        packed_cache=str(cache),  # type: ignore[arg-type]
    )
    built = build_decoder(model_facts(folder), config, Alone(), None)
    decoder, clock = built.decoder, {}
    step = stepper(decoder, args.batch, args.context, clock)
    kept: list[Any] = []
    original = Program.__init__

    def watched(self: Program, recorder: Any, calls: Any, pieces: Any) -> None:
        kept.append((self, calls))
        original(self, recorder, calls, pieces)

    apart, on_end = with_and_without_pieces(step, args.steps // 2)
    Program.__init__ = watched  # type: ignore[method-assign]
    rows: list[dict[str, float]] = []
    taken: list[NDArray[np.int64]] = []
    with torch.inference_mode():
        step()
        program, calls = kept[0]
        names, read = named(decoder, calls)
        stamped = Stamped(program, names)
        memory = torch.ones(1 << 27)
        speeds = []
        for turn in range(args.steps):
            step()
            if turn > 3:
                rows.append(dict(clock))
                taken.append(stamped.take())
            if turn % 10 == 5:
                speeds.append(plain_read(memory))
    Program.__init__ = original  # type: ignore[method-assign]
    shape = decoder.shape
    read["attention"] = (
        args.batch
        * args.context
        * 2
        * shape.num_kv_heads
        * shape.head_dim
        * 2
        * len(decoder.layers)
    )
    head = decoder.embedding.numel()
    read["head"] = head * 2 if weights == "stored" else head + 2 * head // 128
    median = {name: statistics.median([row[name] for row in rows]) for name in rows[0]}
    native = stamped.by_kind(taken)
    median = native | median
    median["layers, Python"] = median.pop("layers") - sum(native.values())
    total = sum(median.values())
    print(f"{weights}: {total:.2f} ms; a plain read gets {max(speeds):.1f} GB/s")
    print(f"    steps without stamps: {on_end:.2f} ms on end, {apart:.2f} ms piece by piece")
    for name, took in sorted(median.items(), key=lambda item: -item[1]):
        speed = f"{read[name] / took / 1e6:6.1f} GB/s" if name in read else ""
        print(f"    {name:16} {took:7.3f} ms {100 * took / total:5.1f}% {speed}")


def main() -> None:
    told = argparse.ArgumentParser(description=(__doc__ or "").split("\n")[0])
    told.add_argument("--model", type=Path, required=True)
    told.add_argument("--weights", default="stored,int8,int4")
    told.add_argument("--batch", type=int, default=1)
    told.add_argument("--context", type=int, default=512)
    told.add_argument("--steps", type=int, default=60)
    told.add_argument("--packed", type=Path, help="keep packed weights here")
    args = told.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        for weights in args.weights.split(","):
            tally(args.model, weights, args, args.packed or Path(root) / weights)


if __name__ == "__main__":
    main()
