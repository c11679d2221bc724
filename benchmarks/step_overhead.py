"""How much of a decode step is spent outside the model: laying out arrays, sampling, telling, crossing threads.

    python benchmarks/step_overhead.py [--batch 8] [--context 256] [--steps 200] [--json FILE]

A random Llama of 25 M parameters decodes with a real executor, driven step by step through its port from an asyncio
loop. A step is the time from `launch` to the completion being heard on the loop; the model's part is the time inside
the forward and the head. Medians over all steps; the goal is an overhead under 10 % at batch 8. Wall time means
something on a quiet machine only; processor time (of this whole process, against that of the model's thread inside the
model; exact with one thread) also on a busy one.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from pathlib import Path

import torch
from random_models import save_random_llama

from penstock.core.plans import Done, Opening, Plan, Work
from penstock.core.prompt import TokenPrompt
from penstock.core.types import PlanId, Request, RequestId, Sampling
from penstock.engine.torch.open import EngineConfig, open_executor

SHAPE = dict(
    hidden_size=384,
    intermediate_size=1024,
    num_hidden_layers=8,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=64,
    vocab_size=16384,
)


class Stopwatch:
    """Adds up the time inside the pieces of the forward and inside the head."""

    def __init__(self, decoder) -> None:  # type: ignore[no-untyped-def]
        self.wall = self.cpu = 0.0
        decoder_class = type(decoder)
        watch = self

        class Watched(decoder_class):  # type: ignore[misc, valid-type]
            __slots__ = ()

            def forward(self, step, layers=None):  # type: ignore[no-untyped-def]
                pieces = super().forward(step, layers)
                while True:
                    with watch:
                        try:
                            piece = next(pieces)
                        except StopIteration as end:
                            return end.value
                    yield piece

            def logits(self, hidden):  # type: ignore[no-untyped-def]
                with watch:
                    return super().logits(hidden)

        decoder.__class__ = Watched

    def __enter__(self) -> None:
        self._begin = time.perf_counter(), time.thread_time()

    def __exit__(self, *_: object) -> None:
        self.wall += time.perf_counter() - self._begin[0]
        self.cpu += time.thread_time() - self._begin[1]


async def measure(args: argparse.Namespace, folder: Path) -> dict[str, object]:
    executor = open_executor(
        str(folder),
        EngineConfig(device="cpu", dtype=args.dtype, threads=args.threads, num_blocks=2048),
    )
    watch = Stopwatch(executor._decoder)
    heard: asyncio.Queue[Done] = asyncio.Queue()
    executor.listen(heard.put_nowait)  # type: ignore[arg-type]
    sampling = Sampling(temperature=args.temperature, ignore_eos=True, seed=1)
    per_job = 2048 // args.batch
    opened, work = [], []
    for seq in range(args.batch):
        prompt = TokenPrompt([(7 * seq + place) % 16000 for place in range(args.context)])
        request = Request(id=RequestId(str(seq)), model="m", prompt=prompt, sampling=sampling)
        opened.append(Opening(seq, request, 0))
        blocks = tuple(range(seq * per_job, (seq + 1) * per_job))
        work.append(Work(seq, 0, args.context, True, blocks, True))
    executor.launch(Plan(id=PlanId(0), work=tuple(work), opened=tuple(opened)))
    await heard.get()
    wall, wall_model, cpu, cpu_model = [], [], [], []
    for step in range(args.steps):
        at = args.context + step
        plan = Plan(
            id=PlanId(step + 1),
            work=tuple(Work(seq, at, 1, True) for seq in range(args.batch)),
        )
        watch.wall = watch.cpu = 0.0
        begin = time.perf_counter(), time.process_time()
        executor.launch(plan)
        done = await heard.get()
        wall.append(time.perf_counter() - begin[0])
        cpu.append(time.process_time() - begin[1])
        wall_model.append(watch.wall)
        cpu_model.append(watch.cpu)
        assert done.error is None, done.error
    await executor.stop()
    return {
        "batch": args.batch,
        "context": args.context,
        "temperature": args.temperature,
        "threads": args.threads,
        "notes": executor.notes,
        "wall": shares(wall, wall_model),
        "cpu": shares(cpu, cpu_model),
    }


def shares(whole: list[float], model: list[float]) -> dict[str, float]:
    skip = len(whole) // 10
    pairs = list(zip(whole[skip:], model[skip:], strict=True))
    step = statistics.median(w for w, _ in pairs)
    outside = statistics.median(w - m for w, m in pairs)
    return {"step_ms": 1e3 * step, "outside_ms": 1e3 * outside, "share": outside / step}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--temperature", type=float, default=0.0)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as root:
        folder = Path(root)
        params = save_random_llama(folder, SHAPE)
        found = asyncio.run(measure(args, folder))
    found["params"] = params
    print(f"{params / 1e6:.1f} M parameters, {found['notes']}")
    print(
        f"batch {args.batch}, context {args.context}, temperature {args.temperature}, {args.threads} threads"
    )
    for name in ("wall", "cpu"):
        told = found[name]
        assert isinstance(told, dict)
        print(
            f"{name:>4}: step {told['step_ms']:.2f} ms, "
            f"outside the model {told['outside_ms']:.3f} ms = {100 * told['share']:.1f} %"
        )
    if args.json:
        args.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
