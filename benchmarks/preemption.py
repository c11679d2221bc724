"""What it costs to be able to stop between operators, and how long a stop takes.

    python benchmarks/preemption.py [--prompt 4096] [--stops 60] [--trials 4] [--json FILE]

A random Llama of 25 M parameters on one thread, driven through the executor's port. An operator is what a forward does
between two of its yields: the attention block or the MLP of one layer.

    overhead   steps that nobody interrupts, with the yields and without any, in turns; medians of pairs
    blocking   from an interrupt at a random moment of a long prompt to the word that the lane is free, beside the time
               of the operator in which it fell and of the longest one; the prompt is resumed at once
    waiting    a short prompt arrives while a long one runs: how long until it starts, when the long one runs whole, in
               chunks, or whole with a stop at the next operator; and what the long one takes, without the short one

Times are processor seconds (of the lane's thread, or of this process, in which nothing else runs meanwhile), so that
other work on the machine hardly touches them.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import random
import statistics
import tempfile
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import torch
from random_models import save_random_llama
from step_overhead import SHAPE

from penstock.core.plans import Done, Opening, Plan, Work, Yielded
from penstock.core.ports import Completion
from penstock.core.prompt import TokenPrompt
from penstock.core.types import PlanId, Request, RequestId, Sampling
from penstock.engine.torch.decoder import Decoder, StepInput
from penstock.engine.torch.executor import TorchExecutor
from penstock.engine.torch.open import EngineConfig, open_executor

NUM_BLOCKS, BLOCK_SIZE = 2048, 16
SHORT = 64  # tokens
SPAN = 512  # blocks of one job
Row = dict[str, Any]


class Unbroken(Decoder):
    """The same forward without yields."""

    __slots__ = ()

    def forward(self, step: StepInput) -> Generator[Any, None, torch.Tensor]:
        x = self.embed(step.ids)
        part: torch.Tensor | None = None
        for layer in self.layers:
            assert layer.mlp_norm is not None, "no model here has parts that read one norm"
            normed, x = layer.attention_norm(part, x)
            part = self._attend(layer, normed, step)
            normed, x = layer.mlp_norm(part, x)
            part = self._pass_mlp(layer, normed, step)
        return self.finish(x, part, step.rows)
        yield  # makes it a generator


class Bench:
    """Jobs by number, each with blocks of its own; plans one after another."""

    def __init__(self, executor: TorchExecutor) -> None:
        self.executor = executor
        self.told: asyncio.Queue[Completion] = asyncio.Queue()
        self.lane_s: list[float] = []  # of each advance of the lane
        self.operators: list[float] = []
        self._plans = self._jobs = 0
        executor.listen(self.told.put_nowait)
        lane = executor._lanes[0]
        advance, run = lane._advance, lane._run

        def timed_advance(*args: Any) -> None:
            began = time.thread_time()
            advance(*args)
            self.lane_s.append(time.thread_time() - began)

        def timed_pieces(plan: Plan) -> Any:
            step = run(plan)
            while True:
                began = time.thread_time()
                try:
                    piece = next(step)
                except StopIteration as end:
                    return end.value
                self.operators.append(time.thread_time() - began)
                yield piece

        lane._advance = timed_advance  # type: ignore[method-assign]
        self._lane, self._plain, self._timed = lane, run, timed_pieces

    def watch_operators(self, wanted: bool) -> None:
        self._lane._run = self._timed if wanted else self._plain

    def job(self, size: int) -> Opening:
        self._jobs += 1
        ids = [(7 * self._jobs + 11 * at) % SHAPE["vocab_size"] for at in range(size)]
        sampling = Sampling(temperature=0.0, ignore_eos=True, max_tokens=4096)
        request = Request(
            id=RequestId(str(self._jobs)), model="m", prompt=TokenPrompt(ids), sampling=sampling
        )
        return Opening(self._jobs, request, 0)

    def launch(self, work: list[Work], opened: list[Opening]) -> PlanId:
        self._plans += 1
        plan = Plan(id=PlanId(self._plans), work=tuple(work), opened=tuple(opened))
        return self.executor.launch(plan)

    def prompt(self, place: int, job: Opening, start: int, count: int) -> PlanId:
        size = job.request.prompt.num_tokens
        blocks = tuple(range(place * SPAN, (place + 1) * SPAN)) if not start else ()
        work = Work(job.seq, start, count, start + count == size, blocks, not start)
        return self.launch([work], [] if start else [job])

    async def advanced_s(self) -> float:
        """What the lane took for the plan that just ended; it tells of the end before it looks at its clock."""
        while not self.lane_s:
            await asyncio.sleep(0)
        return self.lane_s.pop()

    async def done(self) -> Done:
        told = await self.told.get()
        assert isinstance(told, Done) and told.error is None
        return told


async def overhead(bench: Bench, args: argparse.Namespace) -> list[Row]:
    rows = []
    for batch in (1, 8, 32):
        rows.append({"step": f"{batch} decodes", **await _decodes(bench, batch, args)})
    spent: dict[type, list[float]] = {Decoder: [], Unbroken: []}
    for turn in range(2 * args.trials):
        kind = (Decoder, Unbroken)[turn % 2]
        bench.executor._decoder.__class__ = kind
        bench.prompt(0, bench.job(args.prompt), 0, args.prompt)
        await bench.done()
        spent[kind].append(await bench.advanced_s())
    rows.append({"step": f"prompt of {args.prompt}", **_compared(spent)})
    bench.executor._decoder.__class__ = Decoder
    return rows


async def _decodes(bench: Bench, batch: int, args: argparse.Namespace) -> Row:
    context, each = 256, NUM_BLOCKS // 32
    jobs = [bench.job(context) for _ in range(batch)]
    works = [
        Work(job.seq, 0, context, True, tuple(range(at * each, (at + 1) * each)), True)
        for at, job in enumerate(jobs)
    ]
    bench.launch(works, jobs)
    await bench.done()
    await bench.advanced_s()
    spent: dict[type, list[float]] = {Decoder: [], Unbroken: []}
    for step in range(args.steps):
        kind = (Decoder, Unbroken)[step % 2]
        bench.executor._decoder.__class__ = kind
        bench.launch([Work(job.seq, context + step, 1, True) for job in jobs], [])
        await bench.done()
        spent[kind].append(await bench.advanced_s())
    bench.executor.close_jobs([job.seq for job in jobs])
    return _compared(spent)


def _compared(spent: dict[type, list[float]]) -> Row:
    """By pairs of neighbours: what disturbs one step mostly disturbs the next one too."""
    without = statistics.median(spent[Unbroken])
    pairs = zip(spent[Decoder], spent[Unbroken], strict=True)
    more = statistics.median(mine - theirs for mine, theirs in pairs)
    return {
        "without_ms": 1e3 * without,
        "more_us": 1e6 * more,
        "overhead": more / without,
        "num_pairs": len(spent[Decoder]),
    }


async def blocking(bench: Bench, args: argparse.Namespace) -> Row:
    chance, executor = random.Random(1), bench.executor
    bench.watch_operators(True)
    found: list[tuple[float, float]] = []  # (blocking, the operator it fell in)
    bench.operators.clear()
    bench.prompt(0, bench.job(args.prompt), 0, args.prompt)
    await bench.done()
    undisturbed = list(bench.operators)
    mean = statistics.mean(undisturbed)
    while len(found) < args.stops:
        plan = bench.prompt(0, bench.job(args.prompt), 0, args.prompt)
        while True:
            await asyncio.sleep(chance.uniform(0, 4 * mean))
            if not bench.told.empty():
                break
            began = time.process_time()
            executor.interrupt(plan, "operator")
            told = await bench.told.get()
            if not isinstance(told, Yielded):
                bench.told.put_nowait(told)
                break
            found.append((time.process_time() - began, bench.operators[-1]))
            executor.resume(plan)
        await bench.done()
    bench.watch_operators(False)
    times = [one for one, _ in found]
    return {
        "num_operators": len(undisturbed),
        "operator_mean_ms": 1e3 * mean,
        "operator_longest_ms": 1e3 * max(undisturbed),
        "num_stops": len(times),
        "blocking_mean_ms": 1e3 * statistics.mean(times),
        "blocking_longest_ms": 1e3 * max(times),
        "in_own_operators_at_most": max(one / operator for one, operator in found),
    }


async def waiting(bench: Bench, args: argparse.Namespace) -> list[Row]:
    """The short prompt arrives after a fraction of the long one's time."""
    kinds: list[tuple[str, int | None]] = [("whole", args.prompt)]
    kinds += [(f"chunks of {size}", size) for size in (2048, 512) if size < args.prompt]
    kinds += [("whole, stops at an operator", None)]
    rows = []
    began = time.perf_counter()
    bench.prompt(0, bench.job(args.prompt), 0, args.prompt)
    await bench.done()
    wall_s = time.perf_counter() - began
    for name, chunk in kinds:
        waits, longs = [], []
        for trial in range(args.trials):
            moment = wall_s * (trial + 0.5) / args.trials
            wait, long = await _one_arrival(bench, args.prompt, chunk, moment)
            waits.append(wait)
            longs.append(long)
        rows.append(
            {
                "long": name,
                "wait_mean_ms": 1e3 * statistics.mean(waits),
                "wait_longest_ms": 1e3 * max(waits),
                "long_s": statistics.median(longs),
            }
        )
    return rows


async def _one_arrival(
    bench: Bench, size: int, chunk: int | None, moment: float
) -> tuple[float, float]:
    """(wait of the short prompt, time of the long one without it)."""
    executor, clock = bench.executor, time.process_time
    arrived: asyncio.Future[float] = asyncio.get_running_loop().create_future()
    long, began, plan = bench.job(size), clock(), PlanId(0)

    def arrive() -> None:
        arrived.set_result(clock())
        if chunk is None:
            executor.interrupt(plan, "operator")

    waited = spent = 0.0

    async def serve_short() -> None:
        nonlocal waited, spent
        waited = clock() - arrived.result()
        bench.prompt(1, bench.job(SHORT), 0, SHORT)
        started = clock()
        await bench.done()
        spent = clock() - started

    asyncio.get_running_loop().call_later(moment, arrive)
    for start in range(0, size, chunk or size):
        plan = bench.prompt(0, long, start, min(chunk or size, size - start))
        told = await bench.told.get()
        if isinstance(told, Yielded):
            await serve_short()
            executor.resume(plan)
            await bench.done()
        elif arrived.done() and not waited:
            await serve_short()
    taken = clock() - began - spent
    if not waited:  # the machine was faster this time: it finds the lane free
        await arrived
        await serve_short()
    executor.close_jobs([long.seq])
    return waited, taken


async def measure(folder: Path, args: argparse.Namespace) -> Row:
    config = EngineConfig(
        device="cpu", dtype=args.dtype, threads=1, num_blocks=NUM_BLOCKS, block_size=BLOCK_SIZE
    )
    bench = Bench(open_executor(str(folder), config))
    kinds: list[tuple[str, Callable[..., Any]]] = [
        ("overhead", overhead),
        ("blocking", blocking),
        ("waiting", waiting),
    ]
    found = {name: await measured(bench, args) for name, measured in kinds}
    await bench.executor.stop()
    return {"notes": bench.executor.notes, **found}


def show(found: Row) -> None:
    print(found["notes"])
    print(f"{'overhead':20} {'without, ms':>12} {'more, us':>9}")
    for row in found["overhead"]:
        print(
            f"{row['step']:20} {row['without_ms']:12.3f} {row['more_us']:9.1f} "
            f"= {100 * row['overhead']:+.2f} %  ({row['num_pairs']} pairs)"
        )
    one = found["blocking"]
    longest = one["blocking_longest_ms"] / one["operator_longest_ms"]
    print(
        f"blocking: {one['num_stops']} stops, mean {one['blocking_mean_ms']:.1f} ms, longest "
        f"{one['blocking_longest_ms']:.1f} ms = {longest:.2f} of the longest of {one['num_operators']} operators "
        f"({one['operator_longest_ms']:.1f} ms, mean {one['operator_mean_ms']:.1f}); "
        f"at most {one['in_own_operators_at_most']:.2f} of the operator it fell in"
    )
    print(f"{'waiting':28} {'mean ms':>9} {'longest':>9} {'long one s':>11}")
    for row in found["waiting"]:
        print(
            f"{row['long']:28} {row['wait_mean_ms']:9.1f} {row['wait_longest_ms']:9.1f} {row['long_s']:11.2f}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--prompt", type=int, default=4096)
    parser.add_argument("--stops", type=int, default=60)
    parser.add_argument("--trials", type=int, default=4)
    parser.add_argument("--steps", type=int, default=400)
    parser.add_argument("--dtype", default="fp32")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    assert args.prompt <= SPAN * BLOCK_SIZE, "a prompt of at most 8192 tokens"
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        save_random_llama(Path(root), SHAPE)
        found = asyncio.run(measure(Path(root), args))
    show(found)
    if args.json:
        args.json.write_text(json.dumps(found, indent=2))


if __name__ == "__main__":
    main()
