"""Steps that fail: who ends with them, and that nobody later reads what they never wrote."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from penstock.core.plans import Done, Plan, Sampled
from penstock.core.ports import Completion
from penstock.core.prompt import TokenPrompt
from tests.engine.steady import SteadyExecutor
from tests.engine.test_replica import Bench, ask, drive


def break_first(executor: SteadyExecutor, spoil: Callable[[Done, Plan], Done]) -> None:
    """The first completion is what `spoil` makes of it."""
    tell = executor._on_completion

    def hear(done: Completion) -> None:
        assert isinstance(done, Done)
        plan = executor.launched[done.plan][0]
        tell(spoil(done, plan) if done.plan == 0 else done)

    executor.listen(hear)


def alike(name: str) -> Any:
    return ask(name, 0, 3, ids=TokenPrompt(tuple(range(18)), key=b"k"))


def cached(bench: Bench, request: str) -> int:
    return bench.told[request][-1].num_cached


def test_a_failed_step_leaves_nothing_in_the_prefix_cache() -> None:
    bench = Bench()
    break_first(bench.executor, lambda done, plan: Done(0, 1, (), done.ends, error="it broke"))

    async def scenario() -> None:
        bench.replica.submit(alike("a"))
        bench.replica.submit(alike("b"))
        await bench.replica.drain()
        bench.replica.is_draining = False
        bench.replica.submit(alike("c"))

    drive(bench, scenario())
    assert bench.executor.launched[0][0].work[1].start == 16, "b was to share what a computes"
    assert bench.ends("a") == bench.ends("b") == ["error"]
    assert bench.ends("c") == ["stop"] and cached(bench, "c") == 0


def test_whoever_shares_what_a_failed_job_was_to_write_fails_with_it() -> None:
    bench = Bench()

    def spoil(done: Done, plan: Plan) -> Done:
        outputs = (Sampled(plan.work[0].seq, 0, error="no such token"), *done.outputs[1:])
        return Done(0, 1, outputs, done.ends)

    break_first(bench.executor, spoil)

    async def scenario() -> None:
        bench.replica.submit(alike("a"))
        bench.replica.submit(alike("b"))
        bench.replica.submit(ask("other", 9, 3))
        await bench.replica.drain()
        bench.replica.is_draining = False
        bench.replica.submit(alike("c"))

    drive(bench, scenario())
    assert [bench.ends(name) for name in ("a", "b", "other", "c")] == [
        ["error"],
        ["error"],
        ["stop"],
        ["stop"],
    ]
    assert "send this one again" in (bench.told["b"][-1].error or "")
    assert [output.num_tokens for output in bench.told["b"]] == [0], "its token is no token"
    assert cached(bench, "c") == 0
