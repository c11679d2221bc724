"""Logs written by hand, in which the truth is known, and small real ones of a replica in virtual time."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from typing import Any

from penstock.core.events import (
    Arrived,
    Completed,
    Event,
    Finished,
    Header,
    Opened,
    Routed,
    Stepped,
)
from penstock.core.prompt import TracedPrompt
from penstock.core.types import Caps, Request, RequestId, Sampling, Slo
from penstock.engine.replica import Replica, ReplicaConfig
from penstock.engine.turn import Predictors, ReplicaPolicies
from penstock.policy import find
from penstock.report.log import Memory
from penstock.report.made import MadeReplica, opened
from penstock.sim.loop import run
from tests.engine.steady import SteadyExecutor
from tests.engine.test_replica import NoPredictions

WHO = "replica-0"


def header(**more: Any) -> Header:
    return Header(
        version="0.1.0", who="simulation", **{"wall_at": 1_700_000_000.0, "loop_at": 0.0, **more}
    )


def born(who: str = WHO, *, num_blocks: int = 100, block_size: int = 16, **batch: Any) -> Opened:
    """`batch`: the table of the batch policy, its name left out."""
    policies = {"batch": {"name": "vllm-v1", **batch}}
    spec: dict[str, object] = {"policies": policies, "block_size": block_size}
    return opened(
        0.0,
        who,
        MadeReplica(spec=spec, num_blocks=num_blocks, caps=Caps(num_layers=2, max_context=4096)),
    )


def arrived(at: float, seq: int, *, num_prompt: int = 100, who: str = WHO, **more: Any) -> Arrived:
    told = {
        "model": "m",
        "max_tokens": 64,
        "n": 1,
        "tenant": "default",
        "priority": 0,
        "slo": Slo(),
        **more,
    }
    return Arrived(at=at, who=who, request=f"r{seq}", seq=seq, num_prompt=num_prompt, **told)


def stepped(at: float, plan: int | None, chunks: Sequence[tuple[int, int]], **more: Any) -> Stepped:
    told = {
        "who": WHO, "lane": 0, "digest": "", "repeat": 1, "admitted": (), "evicted": (), "num_running": len(chunks),
        "num_waiting": 0, "free_blocks": 50, **more,
    }  # fmt: skip
    return Stepped(at=at, plan=plan, chunks=tuple(chunks), **told)


def completed(
    plan: int, ends: Sequence[float], seqs: Sequence[int], *, who: str = WHO
) -> Completed:
    """Everybody in `seqs` got a token a step."""
    return Completed(
        at=ends[-1],
        who=who,
        plan=plan,
        steps_run=len(ends),
        ends=tuple(ends),
        outputs=tuple((seq, len(ends), False, ()) for seq in seqs),
    )


def finished(
    at: float, start: Arrived, *, num_output: int, first_at: float | None, **more: Any
) -> Finished:
    told = {
        "admitted_at": start.at,
        "num_cached": 0,
        "num_preemptions": 0,
        "last_token_at": at,
        "reason": "stop",
        **more,
    }
    return Finished(
        at=at,
        who=start.who,
        request=start.request,
        answer=0,
        arrived_at=start.at,
        first_token_at=first_at,
        num_prompt=start.num_prompt,
        num_output=num_output,
        tenant=start.tenant,
        priority=start.priority,
        slo=start.slo,
        **told,
    )


def routed(at: float, seq: int, why: str, *, replica: str | None = WHO) -> Routed:
    return Routed(at=at, who="fleet", request=f"r{seq}", replica=replica, stage="prefill", why=why)


class TimedExecutor(SteadyExecutor):
    """A step takes 0.01 s, 1 ms a prompt token beyond single ones and 1 ms an answer."""

    def launch(self, plan: Any, repeat: int = 1) -> Any:
        loop, call_later = asyncio.get_running_loop(), asyncio.get_running_loop().call_later
        prompt = sum(work.tokens for work in plan.work if work.tokens > 1)
        took = 0.01 + 0.001 * prompt + 0.001 * len(plan.work)
        loop.call_later = lambda delay, *args: call_later(took, *args)  # type: ignore[method-assign,assignment]
        try:
            return super().launch(plan, repeat)
        finally:
            loop.call_later = call_later  # type: ignore[method-assign]


def played(
    asks: Sequence[tuple[float, int, int]],
    *,
    batch: str = "vllm-v1",
    num_blocks: int = 64,
    **fields: Any,
) -> list[Event]:
    """The log of a replica that is asked for (at, prompt tokens, output tokens), in virtual time."""
    book = Memory()
    book.emit(header())
    book.emit(born(num_blocks=num_blocks, block_size=4, **fields))

    async def play() -> None:
        config = ReplicaConfig(num_blocks=num_blocks, block_size=4, is_checked=True)
        replica = Replica(config, TimedExecutor(), policies_of(batch, fields), nobody(), log=book)
        done = asyncio.get_running_loop().create_task(replica.run())
        for number, (at, num_prompt, num_output) in enumerate(sorted(asks)):
            await asyncio.sleep(max(0.0, at - asyncio.get_running_loop().time()))
            replica.submit(
                Request(
                    id=RequestId(f"r{number}"),
                    model="m",
                    prompt=TracedPrompt(num_prompt),
                    sampling=Sampling(max_tokens=num_output),
                    true_output=num_output,
                )
            )
        await replica.drain()
        await replica.stop()
        await done

    run(play())
    return book.events


def nobody() -> Predictors:
    return Predictors(cost=NoPredictions(), lengths=NoPredictions())  # type: ignore[arg-type]


def policies_of(batch: str, fields: dict[str, Any]) -> ReplicaPolicies:
    return ReplicaPolicies(
        order=find("order", "fcfs")(),
        admit=find("admit", "full-fit")(),
        batch=find("batch", batch)(**fields),
        evict=find("evict", "retract" if batch == "sglang" else "recompute-last")(),
        blocks=find("evict", "lru")(),
    )
