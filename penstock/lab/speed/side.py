"""Penstock as an engine that speaks peer.py's lines: `python -m penstock.lab.speed.side [replica|port]`.

    replica   the whole replica as it serves: the default preset's policies, prefix cache, ledger, no log
    port      the executor alone, plan by plan, one request: what the replica's decisions add can be read off the two

Both are the embedded engine with its defaults, but for what `load` says; HTTP is left out, as it is for others.
"""

from __future__ import annotations

import asyncio
import dataclasses
import gc
import importlib
import json
import sys
from collections.abc import Callable
from typing import TYPE_CHECKING, Any, Protocol

import penstock
from penstock.assemble.presets import policy_tables
from penstock.cluster.predictors import predictors_of_model
from penstock.cluster.spec import ExecutorSpec, policies_of
from penstock.core.errors import BadConfig, PenstockError
from penstock.core.plans import Done, Opening, Plan, Work
from penstock.core.ports import Completion
from penstock.core.prompt import TokenPrompt
from penstock.core.types import Output, PlanId, Request, RequestId, Sampling
from penstock.engine.replica import Replica, ReplicaConfig
from penstock.report.log import Null

if TYPE_CHECKING:
    from penstock.engine.torch.build import EngineConfig
    from penstock.engine.torch.executor import TorchExecutor

SPARE_BLOCKS = 64
NO_PACKED_CACHE: dict[str, object] = {"packed_cache": "off"}
Tell = Callable[[int, int], None]  # request, tokens


class Driver(Protocol):
    """Runs requests on an executor that was opened for it. Made inside a running loop."""

    async def generate(
        self, prompts: list[list[int]], tokens: list[int], tell: Tell
    ) -> str | None: ...


def widths() -> list[str]:
    """Of weights that this version can serve."""
    from penstock.engine.torch.build import EngineConfig

    has_few = "weights" in {field.name for field in dataclasses.fields(EngineConfig)}
    return ["bf16", "int8", "int4"] if has_few else ["bf16"]


def has_packed_cache() -> bool:
    """Whether this version keeps packed weights between starts."""
    from penstock.engine.torch.build import EngineConfig

    return next(iter(NO_PACKED_CACHE)) in {field.name for field in dataclasses.fields(EngineConfig)}


def engine_config(*, weights: str = "bf16", kv: str | None = None, **more: Any) -> EngineConfig:
    """bf16 is what a checkpoint in bf16 gives by default. Raises BadConfig for what this version does not know."""
    from penstock.engine.torch.build import EngineConfig

    known = {field.name for field in dataclasses.fields(EngineConfig)}
    if weights not in widths():
        raise BadConfig(f"weights cannot be {weights}", hint=f"say {', '.join(widths())}")
    if weights != "bf16":
        more["weights"] = weights
    if kv is not None:
        more["kv"] = kv
    unknown = sorted(set(more) - known)
    if unknown:
        raise BadConfig(f"this version's engine has no {unknown[0]!r}")
    try:
        return EngineConfig(**more)
    except ValueError as error:
        raise BadConfig(str(error)) from None


def request_of(name: int, prompt: list[int], tokens: int) -> Request:
    sampling = Sampling(temperature=0.0, ignore_eos=True, max_tokens=tokens)
    return Request(
        id=RequestId(f"{name}"), model="model", prompt=TokenPrompt(prompt), sampling=sampling
    )


class Whole:
    """The replica."""

    def __init__(self, executor: TorchExecutor, model: str) -> None:
        self._replica = Replica(
            ReplicaConfig(num_blocks=executor.num_blocks, block_size=executor.block_size),
            executor,
            policies_of(policy_tables({}, True)),
            predictors_of_model(ExecutorSpec(), model),
            log=Null(),
            on_outputs=self._hear,
        )
        self._asked = 0
        self._first = 0
        self._told: list[int] = []
        self._left = 0
        self._tell: Tell = lambda request, tokens: None
        self._ended: asyncio.Future[str | None] | None = None
        self._task = asyncio.create_task(self._replica.run())

    async def generate(self, prompts: list[list[int]], tokens: list[int], tell: Tell) -> str | None:
        self._first, self._told, self._tell = self._asked, [0] * len(prompts), tell
        self._asked += len(prompts)
        self._left = len(prompts)
        self._ended = asyncio.get_running_loop().create_future()
        for at, (prompt, count) in enumerate(zip(prompts, tokens, strict=True)):
            self._replica.submit(request_of(self._first + at, prompt, count))
        return await self._ended

    def _hear(self, outputs: tuple[tuple[str, Output], ...]) -> None:
        assert self._ended is not None
        for name, output in outputs:
            at = int(name) - self._first
            self._told[at] += output.num_tokens
            if output.num_tokens:
                self._tell(at, self._told[at])
            self._left -= output.finish is not None
            if output.error is not None and not self._ended.done():
                self._ended.set_result(output.error)
        if not self._left and not self._ended.done():
            self._ended.set_result(None)


class Port:
    """The executor, a plan for each step."""

    def __init__(self, executor: TorchExecutor, model: str) -> None:
        self._executor = executor
        self._heard: asyncio.Queue[Completion] = asyncio.Queue()
        self._plans = self._seqs = 0
        executor.listen(self._heard.put_nowait)

    async def generate(self, prompts: list[list[int]], tokens: list[int], tell: Tell) -> str | None:
        if len(prompts) != 1:
            return "the port alone has no scheduler: one request at a time"
        (prompt,), (count,) = prompts, tokens
        seq, self._seqs = self._seqs, self._seqs + 1
        blocks = tuple(range(-(-(len(prompt) + count) // self._executor.block_size)))
        opening = Opening(seq, request_of(seq, prompt, count), 0)
        fault = await self._step(Work(seq, 0, len(prompt), True, blocks, True), (opening,))
        for told in range(1, count + 1):
            if fault is not None:
                break
            tell(0, told)
            if told < count:
                fault = await self._step(Work(seq, len(prompt) + told - 1, 1, True))
        self._executor.close_jobs([seq])
        return fault

    async def _step(self, work: Work, opened: tuple[Opening, ...] = ()) -> str | None:
        self._plans += 1
        self._executor.launch(Plan(id=PlanId(self._plans), work=(work,), opened=opened))
        done = await self._heard.get()
        assert isinstance(done, Done)
        return done.error or next((one.error for one in done.outputs if one.error), None)


DRIVERS: dict[str, Callable[[TorchExecutor, str], Driver]] = {"replica": Whole, "port": Port}


class Side:
    """Answers the lines."""

    def __init__(self, kind: str) -> None:
        self._make = DRIVERS[kind]
        self._kind = kind
        self._driver: Driver | None = None

    async def serve(self) -> None:
        say({"hello": f"penstock {penstock.__version__} ({self._kind})", "weights": widths()})
        loop = asyncio.get_running_loop()
        while line := await loop.run_in_executor(None, sys.stdin.readline):
            question = json.loads(line)
            if question["do"] == "quit":
                return
            try:
                say(await self._answer(question))
            except PenstockError as error:
                say({"error": error.message})

    async def _answer(self, question: dict[str, Any]) -> dict[str, object]:
        if question["do"] == "load":
            return await self._load(question)
        if question["do"] == "generate":
            return await self._generate(question)
        return {"ok": True}  # nothing has to be converted

    async def _load(self, question: dict[str, Any]) -> dict[str, object]:
        from penstock.engine.torch.open import open_executor

        more = question.get("engine", {})
        # Requests that share no block are the most; every one may waste a part of a block.
        blocks = question["tokens"] // 16 + 2 * question["requests"] + SPARE_BLOCKS
        config = engine_config(
            weights=question["weights"], threads=question["threads"], num_blocks=blocks, **more
        )
        executor = open_executor(question["model"], config)
        self._driver = self._make(executor, question["model"])
        gc.collect()  # as the process of a served replica does
        gc.freeze()
        notes = ", ".join(
            executor.notes[name].partition(":")[0]
            for name in ("dtype", "linear", "attention")
            if name in executor.notes
        )
        return {
            "ok": True,
            "about": f"penstock {penstock.__version__} ({self._kind}; {notes})",
            "notes": executor.notes,
        }

    async def _generate(self, question: dict[str, Any]) -> dict[str, object]:
        assert self._driver is not None, "nothing is loaded"
        counts, every = question["tokens"], question.get("every")

        def tell(request: int, tokens: int) -> None:
            is_due = every is not None and tokens % every == 0
            if tokens == 1 or is_due or tokens == counts[request]:
                say({"request": request, "tokens": tokens})

        fault = await self._driver.generate(question["prompts"], counts, tell)
        return {"ok": True} if fault is None else {"error": fault}


def say(line: dict[str, object]) -> None:
    sys.stdout.write(json.dumps(line) + "\n")
    sys.stdout.flush()


def command(kind: str) -> tuple[str, ...]:
    """What starts this side."""
    return (sys.executable, "-m", "penstock.lab.speed.side", kind)


if __name__ == "__main__":
    importlib.import_module("penstock.engine.torch.open")  # before the hello, as others do
    asyncio.run(Side(sys.argv[1] if len(sys.argv) > 1 else "replica").serve())
