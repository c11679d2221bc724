"""How much of a decode step is spent outside the model, and on what.

    python benchmarks/step_overhead.py [--batch 8] [--context 256] [--steps 200] [--log] [--json FILE]

A random Llama of 25 M parameters decodes, greedily and at temperature 1, driven in two ways: `port` launches step after
step through the executor's port; `replica` is a whole replica with vLLM v1's policies, and `--log` has it write its
event log to a file. A step is the time from one launch to the next, medians over all steps:

    model      inside the forward and the head; the lane's looks between its pieces, some microseconds, are in it
    turn       the replica's, up to the launch: apply what came, decide, take blocks, write the plan and the events
    layout     on the lane's thread: arrays from the plan, noting the drawn tokens
    sampling   from logits to tokens
    crossing   the rest: from thread to thread and back, telling
    told       the replica's turn after the launch: it runs beside the model, so it is no part of `outside` in wall time

`outside` is all but the model; the goal is under 10 % at batch 8. Wall time means something on a quiet machine only.
Processor time (of this whole process, against that of the model's thread inside the model; exact with one thread) means
something also on a busy one; there `told` counts as outside.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import statistics
import tempfile
import time
from collections.abc import Callable, Generator
from pathlib import Path
from typing import Any

import torch
from random_models import save_random_llama

from penstock.assemble.presets import policy_tables
from penstock.cluster.predictors import predictors_of_model
from penstock.cluster.spec import ExecutorSpec, policies_of
from penstock.core.events import Header
from penstock.core.plans import Done, Opening, Plan, Work
from penstock.core.ports import Log
from penstock.core.prompt import TokenPrompt
from penstock.core.types import PlanId, Request, RequestId, Sampling
from penstock.engine.replica import Replica, ReplicaConfig
from penstock.engine.torch import executor as executor_module
from penstock.engine.torch.executor import TorchExecutor
from penstock.engine.torch.open import EngineConfig, open_executor
from penstock.report.log import LogWriter, Null

SHAPE = dict(
    hidden_size=384,
    intermediate_size=1024,
    num_hidden_layers=8,
    num_attention_heads=6,
    num_key_value_heads=2,
    head_dim=64,
    vocab_size=16384,
)
NUM_BLOCKS = 2048
PARTS = ("model", "turn", "layout", "sampling", "crossing", "told")
Row = dict[str, float]


class Stopwatch:
    """A span of one thread, entered many times; what it took since `take`."""

    def __init__(self) -> None:
        self.wall = self.cpu = 0.0

    def __enter__(self) -> None:
        self._begin = time.perf_counter(), time.thread_time()

    def __exit__(self, *_: object) -> None:
        self.wall += time.perf_counter() - self._begin[0]
        self.cpu += time.thread_time() - self._begin[1]

    def take(self) -> tuple[float, float]:
        found, self.wall, self.cpu = (self.wall, self.cpu), 0.0, 0.0
        return found

    def around(self, call: Callable[..., Any]) -> Callable[..., Any]:
        def watched(*args: object) -> Any:
            with self:
                return call(*args)

        return watched

    def over(self, steps: Callable[..., Generator[Any, None, Any]]) -> Callable[..., Any]:
        """From a generator's beginning to its end."""

        def watched(*args: object) -> Generator[Any, None, Any]:
            with self:
                return (yield from steps(*args))

        return watched


class Watches:
    """Spans around the parts of an executor's steps, and of a replica's turns."""

    def __init__(self, executor: TorchExecutor) -> None:
        self.model, self.lane, self.sampling = Stopwatch(), Stopwatch(), Stopwatch()
        self.turn, self.told = Stopwatch(), Stopwatch()
        decoder = executor._decoder
        kind = type(decoder)
        watched = {
            "__slots__": (),
            "forward": self.model.over(kind.forward),
            "logits": self.model.around(kind.logits),
        }
        decoder.__class__ = type("Watched", (kind,), watched)  # type: ignore[assignment]
        executor._lanes[0]._run = self.lane.over(executor._step)
        executor_module.draw = self.sampling.around(original_draw)  # type: ignore[assignment]
        self._last = time.perf_counter(), time.process_time()
        self.laps: list[tuple[Row, Row]] = []

    def watch(self, replica: Replica, executor: TorchExecutor) -> None:
        turn, launch = replica.turn, executor.launch

        def turned(now: float) -> None:
            self._open = self.turn
            self.turn.__enter__()
            turn(now)
            self._open.__exit__()

        def launched(*args: Any) -> PlanId:
            self._open.__exit__()
            self.laps.append(self.lap())
            self._open = self.told
            self.told.__enter__()
            return launch(*args)

        replica.turn, executor.launch = turned, launched  # type: ignore[method-assign]

    def lap(self) -> tuple[Row, Row]:
        """Wall and processor time of the step that has just been heard of, by part."""
        at, before = (time.perf_counter(), time.process_time()), self._last
        self._last = at
        model, lane, sampling = self.model.take(), self.lane.take(), self.sampling.take()
        turn, told = self.turn.take(), self.told.take()
        wall, cpu = ({"step": at[i] - before[i]} for i in range(2))
        for i, row in enumerate((wall, cpu)):
            row |= {"model": model[i], "turn": turn[i], "sampling": sampling[i], "told": told[i]}
            row["layout"] = lane[i] - model[i] - sampling[i]
            row["outside"] = row["step"] - model[i]
            row["crossing"] = row["outside"] - turn[i] - row["layout"] - sampling[i]
        cpu["crossing"] -= told[1]
        return wall, cpu


original_draw = executor_module.draw


def requests_of(args: argparse.Namespace, temperature: float) -> list[Request]:
    def request(seq: int) -> Request:
        prompt = TokenPrompt([(7 * seq + place) % 16000 for place in range(args.context)])
        sampling = Sampling(
            temperature=temperature, ignore_eos=True, seed=1, max_tokens=args.steps + 8
        )
        return Request(id=RequestId(str(seq)), model="m", prompt=prompt, sampling=sampling)

    return [request(seq) for seq in range(args.batch)]


async def through_port(
    executor: TorchExecutor, args: argparse.Namespace, requests: list[Request]
) -> list[tuple[Row, Row]]:
    watches = Watches(executor)
    heard: asyncio.Queue[Done] = asyncio.Queue()
    executor.listen(heard.put_nowait)  # type: ignore[arg-type]
    share = NUM_BLOCKS // args.batch
    work = tuple(
        Work(seq, 0, args.context, True, tuple(range(seq * share, (seq + 1) * share)), True)
        for seq in range(args.batch)
    )
    opened = tuple(Opening(seq, request, 0) for seq, request in enumerate(requests))
    plan = Plan(id=PlanId(0), work=work, opened=opened)
    for step in range(args.steps + 1):
        watches.laps.append(watches.lap())
        executor.launch(plan)
        done = await heard.get()
        assert done.error is None, done.error
        at = args.context + step
        work = tuple(Work(seq, at, 1, True) for seq in range(args.batch))
        plan = Plan(id=PlanId(step + 1), work=work)
    await executor.stop()
    return watches.laps


async def through_replica(
    executor: TorchExecutor, args: argparse.Namespace, requests: list[Request], folder: Path
) -> list[tuple[Row, Row]]:
    watches, ended = Watches(executor), asyncio.Event()

    def hear(outputs: tuple[object, ...]) -> None:
        if len(watches.laps) > args.steps:
            ended.set()

    log: Log = Null()
    if args.log:
        log = LogWriter(folder / "benchmark.jsonl")
        log.emit(Header(who="benchmark"))
    replica = Replica(
        ReplicaConfig(num_blocks=NUM_BLOCKS),
        executor,
        policies_of(policy_tables({"preset": "vllm-v1"}, True)),
        predictors_of_model(ExecutorSpec(), str(folder)),
        log=log,
        on_outputs=hear,
    )
    watches.watch(replica, executor)
    for request in requests:
        replica.submit(request)
    await ended.wait()
    await replica.stop()
    return watches.laps


def medians(laps: list[Row]) -> Row:
    laps = laps[len(laps) // 10 :]
    found = {name: 1e3 * statistics.median(lap[name] for lap in laps) for name in laps[0]}
    found["share"] = found["outside"] / found["step"]
    return found


def measure(args: argparse.Namespace, folder: Path, driver: str, heat: float) -> dict[str, object]:
    config = EngineConfig(
        device="cpu", dtype=args.dtype, threads=args.threads, num_blocks=NUM_BLOCKS
    )
    executor, requests = open_executor(str(folder), config), requests_of(args, heat)
    if driver == "port":
        laps = asyncio.run(through_port(executor, args, requests))
    else:
        laps = asyncio.run(through_replica(executor, args, requests, folder))
    told: dict[str, object] = {"driver": driver, "temperature": heat, "notes": executor.notes}
    return told | {
        clock: medians(list(rows))
        for clock, rows in zip(("wall", "cpu"), zip(*laps, strict=True), strict=True)
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dtype", default="auto")
    parser.add_argument(
        "--log", action="store_true", help="write the replica's event log to a file"
    )
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory() as root:
        params = save_random_llama(Path(root), SHAPE)
        kinds = [(driver, heat) for driver in ("port", "replica") for heat in (0.0, 1.0)]
        found = [measure(args, Path(root), *kind) for kind in kinds]
    print(f"{params / 1e6:.1f} M parameters, {found[0]['notes']}")
    print(
        f"batch {args.batch}, context {args.context}, {args.threads} threads; milliseconds a step"
    )
    print(f"{'driver':8} {'heat':>4} {'clock':>5} {'step':>7} {'outside':>15} ", end="")
    print(" ".join(f"{part:>8}" for part in PARTS))
    for row in found:
        for clock in ("wall", "cpu"):
            told: Row = row[clock]  # type: ignore[assignment]
            share = f"{told['outside']:.3f} = {100 * told['share']:4.1f} %"
            print(
                f"{row['driver']:8} {row['temperature']:4} {clock:>5} {told['step']:7.2f} {share:>15} ",
                end="",
            )
            print(" ".join(f"{told[part]:8.3f}" for part in PARTS))
    if args.json:
        facts = {name: getattr(args, name) for name in ("batch", "context", "threads", "log")}
        args.json.write_text(json.dumps({"params": params, **facts, "rows": found}, indent=2))


if __name__ == "__main__":
    main()
