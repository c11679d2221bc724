"""Two lanes side by side: prefills in one, decodes in the other, each lane with its own pace."""

from __future__ import annotations

import asyncio
from dataclasses import dataclass

from penstock.core.events import Stepped
from penstock.core.plans import Plan
from penstock.core.types import PlanId
from penstock.core.views import Batch, Chunk, Lane
from penstock.policy.admit import Decision as Admission
from penstock.policy.admit import View as AdmitView
from penstock.policy.batch import Decision, View
from tests.engine.steady import SteadyExecutor
from tests.engine.test_replica import Bench, ask, drive


class PacedExecutor(SteadyExecutor):
    """A prefill takes three seconds, a decode one."""

    def launch(self, plan: Plan, repeat: int = 1) -> PlanId:
        if all(work.tokens == 1 for work in plan.work):
            return super().launch(plan, repeat)
        loop = asyncio.get_running_loop()
        loop.call_later(2.0, super().launch, plan, repeat)
        return plan.id


@dataclass
class TwoLanes:
    """One admission at a time prefills in a lane of its own; everybody else decodes in the other."""

    def decide(self, view: View) -> Decision:
        fork = view.ledger.fork()
        idle = [job for job in view.running if not job.in_flight]
        lanes: list[Lane] = []
        decodes = [job for job in idle if job.todo == 1]
        free = view.caps.max_lanes - len(view.busy_lanes)
        admitted = []
        if decodes and free and all(fork.reserve(job, job.known) for job in decodes):
            lanes.append(Lane(tuple(Chunk(job, 1) for job in decodes), 0.5))
        is_prefilling = any(job.in_flight and job.is_prefilling for job in view.running)
        flying = [job for job in view.running if job.in_flight > 1]
        if view.waiting and len(lanes) < free and not flying and not is_prefilling:
            head = view.waiting[0]
            tokens = head.known - fork.cached(head)
            if view.admit(head, tokens, fork) == "yes" and fork.reserve(head, head.known):
                lanes.append(Lane((Chunk(head, tokens),), 0.5))
                admitted.append(head)
        return Decision(Batch(tuple(lanes)), tuple(admitted))


@dataclass
class Never:
    def decide(self, view: AdmitView) -> Admission:
        return Admission("no", "not today") if view.job.num_prompt > 10 else Admission("yes")


def test_decodes_go_on_while_a_prefill_runs() -> None:
    bench = Bench()
    bench.rebuild(PacedExecutor(max_lanes=2), batch=TwoLanes())

    async def scenario() -> None:
        bench.replica.submit(ask("a", 9, 12))
        await asyncio.sleep(4.5)
        bench.replica.submit(ask("b", 9, 4))
        await asyncio.sleep(1)
        bench.replica.cancel("b")
        bench.replica.submit(ask("c", 9, 4))

    drive(bench, scenario())
    assert (bench.tokens("a"), bench.tokens("c")) == (12, 4)
    assert bench.ends("b") == ["cancelled"]
    steps = bench.book.of(Stepped)
    assert {step.lane for step in steps if step.plan is not None} == {0, 1}


def test_what_admission_refuses_ends_and_others_go_on() -> None:
    bench = Bench()
    bench.rebuild(SteadyExecutor(), admit=Never())

    async def scenario() -> None:
        bench.replica.submit(ask("long", 11, 3))
        bench.replica.submit(ask("short", 5, 3))

    drive(bench, scenario())
    assert bench.ends("long") == ["error"] and bench.tokens("short") == 3
    assert [(one.error, one.code) for one in bench.told["long"]] == [("not today", "BadRequest")]
