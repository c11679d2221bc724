"""What a report says of the head of the queue is of whom the order policy put there, not of who came first."""

from __future__ import annotations

import asyncio
from typing import Any

from penstock.core.prompt import TracedPrompt
from penstock.core.types import Caps, Report, Request, RequestId, Sampling
from penstock.cost.hardware import card_of
from penstock.cost.roofline import Roofline
from penstock.cost.shapes import shape_of
from penstock.engine.replica import Predictors, Replica, ReplicaConfig, ReplicaPolicies
from penstock.policy import find
from penstock.sim.executor import ModelledExecutor
from penstock.sim.loop import run
from tests.engine.test_repeat import Book, RecentLengths, StepPredictor, made


def asked(name: str, tokens: int, priority: int) -> Request:
    return Request(
        id=RequestId(name),
        model="m",
        prompt=TracedPrompt(tokens),
        sampling=Sampling(max_tokens=100),
        priority=priority,
        true_output=100,
    )


def test_the_head_is_whom_the_policy_puts_first() -> None:
    cost = Roofline(shape_of("llama-3.1-8b"), card_of("a100-80g"))
    executor = ModelledExecutor(cost, caps=Caps(num_layers=32, max_context=8192, max_repeat=64))
    kinds: dict[str, Any] = {
        "order": "priority", "admit": "full-fit", "batch": "vllm-v1", "evict": "recompute-priority",
    }  # fmt: skip
    policies = ReplicaPolicies(
        blocks=find("evict", "lru")(), **{kind: made(kind, name) for kind, name in kinds.items()}
    )
    predictors = Predictors(cost=StepPredictor(cost, 32), lengths=RecentLengths())
    reports: list[Report] = []

    async def main() -> None:
        replica = Replica(ReplicaConfig(num_blocks=60), executor, policies, predictors, log=Book())
        ended = asyncio.get_running_loop().create_task(replica.run())
        for name, tokens, priority in (("runs", 700, 0), ("came", 600, 0), ("urgent", 320, -1)):
            replica.submit(asked(name, tokens, priority), every_token=False)
            await asyncio.sleep(0.3)
            reports.append(replica.report())
        await replica.drain()
        await replica.stop()
        await ended

    run(main())
    assert [report.head_blocks for report in reports] == [0, 38, 20]
    assert [report.num_waiting for report in reports] == [0, 1, 2]
