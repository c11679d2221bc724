"""Plans that stop inside their forward, and chunks that pass some layers: what policies, logs and callers may rely on.

The executor is the modelled one, whose operators are equal pieces of a step.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

from penstock.core.events import Finished, Stepped, Suspended
from penstock.core.prompt import TokenPrompt
from penstock.core.types import Caps
from penstock.core.views import Batch, Chunk, JobView, Lane
from penstock.cost.step import StepFeatures
from penstock.policy.batch import Decision, View
from penstock.sim.executor import ModelledExecutor
from tests.engine.test_replica import Bench, ask, drive

LAYERS = 4
CAPS = Caps(
    num_layers=LAYERS, max_context=4096, has_layer_ranges=True, yield_grain="operator"
)  # 2 operators a layer


class TokenTime:
    """A second a token, whatever else; a group of layers takes its share."""

    name, digest = "a second a token", "0"

    def seconds(self, features: StepFeatures, share: float = 1.0) -> float:
        return features.num_tokens * (features.layers or LAYERS) / LAYERS

    def run_seconds(self, features: StepFeatures, count: int, share: float = 1.0) -> list[float]:
        return [self.seconds(features)] * count

    def step(self, features: StepFeatures, share: float = 1.0) -> Any:
        raise NotImplementedError


class Closing(ModelledExecutor):
    """Remembers for `drive` whom it met and who was closed."""

    def __init__(self) -> None:
        super().__init__(TokenTime(), caps=CAPS)
        self.requests: dict[int, object] = {}
        self.closed: list[int] = []

    def launch(self, plan: Any, repeat: int = 1) -> Any:
        self.requests |= {seq: request for seq, request, *_ in plan.opened}
        return super().launch(plan, repeat)

    def close_jobs(self, seqs: Any) -> None:
        self.closed.extend(seqs)
        super().close_jobs(seqs)


@dataclass
class ShortFirst:
    """One job at a time, the one with least to do; a longer one is interrupted for it."""

    interrupts = True
    seen: list[tuple[float, int]] = field(default_factory=list)

    def decide(self, view: View) -> Decision:
        fork = view.ledger.fork()
        idle = [job for job in (*view.running, *view.waiting) if not job.in_flight]
        best = min(idle, key=lambda job: job.todo, default=None)
        for flying in view.flying:
            self.seen.append((flying.ran_s, flying.activation_bytes))
            (chunk,) = flying.chunks
            if best is None or best.todo >= chunk.tokens or flying.is_stopping:
                return Decision(why="nothing is shorter")
            return Decision(interrupt=(flying.plan,))
        resumed = min(
            view.suspended, key=lambda each: sum(c.tokens for c in each.chunks), default=None
        )
        if resumed is not None and (best is None or best.todo >= list(resumed.chunks)[0].tokens):
            return Decision(resume=(resumed.plan,))
        if best is None:
            return Decision()
        admitted: tuple[JobView, ...] = ()
        tokens = best.todo
        if best.status == "waiting":
            tokens = best.known - fork.cached(best)
            assert view.admit(best, tokens, fork) == "yes" and fork.reserve(best, best.known)
            admitted = (best,)
        return Decision(Batch((Lane((Chunk(best, tokens),)),)), admitted)


@dataclass
class InGroups:
    """Prompts pass the layers in `groups` steps, decodes beside them pass all."""

    groups: int = 2

    def decide(self, view: View) -> Decision:
        if view.busy_lanes:
            return Decision()
        fork, chunks, admitted = view.ledger.fork(), [], []
        size = LAYERS // self.groups
        for job in view.running:
            if job.todo == 1 and job.num_output:
                chunks.append(Chunk(job, 1))
            else:
                tokens, first = job.carried or (job.todo, 0)
                chunks.append(Chunk(job, tokens, (first, first + size)))
        if not any(job.is_prefilling for job in view.running):
            for job in view.waiting:
                if view.admit(job, job.known, fork) == "yes" and fork.reserve(job, job.known):
                    admitted.append(job)
                    chunks.append(Chunk(job, job.known - fork.cached(job), (0, size)))
        return Decision(Batch((Lane(tuple(chunks)),) if chunks else ()), tuple(admitted))


def made(policy: object) -> Bench:
    bench = Bench()
    bench.rebuild(Closing(), batch=policy)  # type: ignore[arg-type]
    return bench


def ends_of(bench: Bench) -> dict[str, Finished]:
    return {event.request: event for event in bench.book.of(Finished)}


def test_a_short_prompt_stops_a_long_one_which_then_goes_on_where_it_was() -> None:
    policy = ShortFirst()
    bench = made(policy)

    async def scenario() -> None:
        bench.replica.submit(ask("long", 56, 1))  # 8 operators of 7 s
        await asyncio.sleep(11)  # inside the second operator
        bench.replica.submit(ask("short", 4, 1))

    drive(bench, scenario())
    ends = ends_of(bench)
    assert ends["short"].first_token_at == pytest.approx(14 + 4), "at the next operator boundary"
    assert ends["long"].first_token_at == pytest.approx(56 + 4), "nothing is computed twice"
    (suspended,) = bench.book.of(Suspended)
    assert suspended.at == pytest.approx(14)
    told = [(step.interrupted, step.resumed) for step in bench.book.of(Stepped)]
    assert ((0,), ()) in told and ((), (0,)) in told


def test_policies_see_how_long_a_plan_ran_without_its_pauses() -> None:
    policy = ShortFirst()
    bench = made(policy)

    async def scenario() -> None:
        bench.replica.submit(ask("long", 56, 1))
        await asyncio.sleep(12)
        bench.replica.submit(ask("short", 4, 1))
        await asyncio.sleep(14)  # 14 + 4, and 8 more of the long one
        bench.replica.submit(ask("longer", 200, 1))

    drive(bench, scenario())
    assert pytest.approx(22.0) in [ran_s for ran_s, _ in policy.seen]


def test_a_suspended_plan_nobody_wants_is_aborted_and_gives_its_blocks_back() -> None:
    bench = made(ShortFirst())

    async def scenario() -> None:
        bench.replica.submit(ask("long", 56, 1))
        await asyncio.sleep(11)
        bench.replica.submit(ask("short", 20, 1))
        await asyncio.sleep(5)
        held = bench.replica.ledger.total - bench.replica.ledger.free
        assert held == 56 // 4 + 20 // 4, "the suspended job keeps its blocks"
        bench.replica.cancel("long")
        await asyncio.sleep(1)
        assert bench.ends("long") == ["cancelled"]
        assert bench.replica.ledger.total - bench.replica.ledger.free == 20 // 4

    drive(bench, scenario())
    assert bench.ends("short") == ["stop"]


def test_a_job_cancelled_while_its_plan_is_asked_to_stop_is_aborted_at_the_boundary() -> None:
    bench = made(ShortFirst())

    async def scenario() -> None:
        bench.replica.submit(ask("long", 56, 1))
        await asyncio.sleep(11)
        bench.replica.submit(ask("short", 20, 1))
        bench.replica.cancel("long")
        await asyncio.sleep(4)
        assert bench.ends("long") == ["cancelled"]

    drive(bench, scenario())
    assert ends_of(bench)["short"].first_token_at == pytest.approx(14 + 20)


def test_stopping_a_replica_lets_go_of_suspended_plans() -> None:
    bench = made(ShortFirst())

    async def scenario() -> None:
        bench.replica.submit(ask("long", 56, 1))
        await asyncio.sleep(11)
        bench.replica.submit(ask("short", 20, 1))
        await asyncio.sleep(5)
        await bench.replica.stop()

    from penstock.sim.loop import run

    async def main() -> None:
        running = asyncio.get_running_loop().create_task(bench.replica.run())
        await scenario()
        await running

    run(main())
    assert not bench.executor._runs  # type: ignore[attr-defined]


@pytest.mark.parametrize("groups", [1, 2, 4])
def test_prompts_in_groups_of_layers_count_when_they_passed_the_last(groups: int) -> None:
    bench = made(InGroups(groups))

    async def scenario() -> None:
        bench.replica.submit(ask("a", 8, 3))
        await asyncio.sleep(8.5)
        bench.replica.submit(ask("b", 8, 2))

    drive(bench, scenario())
    ends = ends_of(bench)
    assert ends["a"].first_token_at == pytest.approx(8.0)
    assert (bench.tokens("a"), bench.tokens("b")) == (3, 2)
    partial = [step.partial for step in bench.book.of(Stepped) if step.partial]
    assert partial == [(0,)] * (groups - 1) + [(1,)] * (groups - 1)
    # b's prompt: `groups` steps of 8 / groups s each, a decode of a beside each as long as a has one to do.
    assert ends["b"].first_token_at is not None and ends["b"].first_token_at > 17


def test_a_log_with_suspensions_replays(tmp_path: Path) -> None:
    from penstock.lab.judge import Judge
    from penstock.lab.replay import _feed
    from penstock.sim.loop import run

    bench = made(ShortFirst())

    async def scenario() -> None:
        bench.replica.submit(ask("long", 56, 1), every_token=False)
        await asyncio.sleep(11)
        bench.replica.submit(ask("short", 4, 1), every_token=False)

    drive(bench, scenario())
    from penstock.engine.turn import Predictors, ReplicaPolicies
    from penstock.lab.replay import ReplicaParts
    from tests.engine.test_replica import Fcfs, FullFit, Lru, NoPredictions, RecomputeLast

    nobody = NoPredictions()
    parts = ReplicaParts(
        config=bench.config,
        caps=CAPS,
        policies=ReplicaPolicies(
            order=Fcfs(), admit=FullFit(), batch=ShortFirst(), evict=RecomputeLast(), blocks=Lru()
        ),
        predictors=Predictors(cost=nobody, lengths=nobody),
        notes=(),
    )
    judge = Judge(bench.config.name)
    run(_feed(bench.book.events, parts, judge))
    assert judge.num_events == len(bench.book.events)


def test_nobody_shares_what_a_suspended_plan_has_not_written() -> None:
    """A prompt that begins like one of a suspended plan computes that beginning itself."""
    bench, ids = made(ShortFirst()), list(range(56))
    starts: dict[str, list[int]] = {"long": [], "short": [], "late": []}
    launch = bench.executor.launch

    def watched(plan: Any, repeat: int = 1) -> Any:
        names = {seq: request.id for seq, request, *_ in plan.opened}
        for work in plan.work:
            if work.seq in names:
                starts[names[work.seq]].append(work.start)
        return launch(plan, repeat)

    bench.executor.launch = watched  # type: ignore[method-assign]

    async def scenario() -> None:
        bench.replica.submit(ask("long", 56, 1, ids=TokenPrompt(ids)))
        await asyncio.sleep(11)
        bench.replica.submit(ask("short", 9, 1, ids=TokenPrompt([*ids[:8], 99])))
        await asyncio.sleep(100)
        bench.replica.submit(ask("late", 21, 1, ids=TokenPrompt([*ids[:20], 99])))

    drive(bench, scenario())
    assert starts == {"long": [0], "short": [0], "late": [20]}
