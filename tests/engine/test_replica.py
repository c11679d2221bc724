"""The step loop against a steady executor in virtual time: what callers, executors and logs may rely on."""

from __future__ import annotations

import asyncio
import dataclasses
import random
from collections.abc import Callable, Coroutine
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.errors import ContextTooLong, Draining, Overloaded
from penstock.core.events import Event, Finished, Stepped
from penstock.core.plans import Done
from penstock.core.ports import Completion
from penstock.core.prompt import TokenPrompt, TracedPrompt
from penstock.core.types import BlockHash, Output, Request, RequestId, Sampling
from penstock.engine.replica import Replica, ReplicaConfig
from penstock.engine.turn import Predictors, ReplicaPolicies
from penstock.policy import evict
from penstock.policy.admit.full_fit import FullFit
from penstock.policy.batch.vllm_v1 import VllmV1
from penstock.policy.evict.lru import Lru
from penstock.policy.evict.recompute_last import RecomputeLast
from penstock.policy.order.fcfs import Fcfs
from penstock.sim.loop import run
from tests.engine.steady import SteadyExecutor


class Book:
    """A log in memory."""

    def __init__(self) -> None:
        self.events: list[Event] = []

    def emit(self, event: Event) -> None:
        self.events.append(event)

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


class NoPredictions:
    def predict(self, chunks: object, share: float = 1.0) -> float:
        return 1.0

    def quantile(self, job: object, q: float) -> int:
        return 1

    def sample(self, job: object, u: float) -> int:
        return 1


class Bench:
    """A replica, its steady executor, its log and what its callers were told."""

    def __init__(self, *, num_blocks: int = 64, block_size: int = 4, **batch: Any) -> None:
        self.book, self.executor = Book(), SteadyExecutor()
        self.told: dict[str, list[Output]] = {}
        self.config = ReplicaConfig(num_blocks=num_blocks, block_size=block_size, is_checked=True)
        self.batch = batch
        self.rebuild(self.executor)

    def rebuild(self, executor: SteadyExecutor, **policies: Any) -> None:
        """The replica anew, with another executor, configuration or policies."""
        self.executor = executor
        nobody = NoPredictions()
        chosen = {
            "order": Fcfs(),
            "admit": FullFit(),
            "batch": VllmV1(**self.batch),
            "evict": RecomputeLast(),
            "blocks": Lru(),
            **policies,
        }
        self.replica = Replica(
            self.config,
            executor,
            ReplicaPolicies(**chosen),
            Predictors(cost=nobody, lengths=nobody),
            log=self.book,
            on_outputs=self.hear,
        )

    def hear(self, outputs: tuple[tuple[str, Output], ...]) -> None:
        for request, output in outputs:
            self.told.setdefault(request, []).append(output)

    def tokens(self, request: str, answer: int = 0) -> int:
        return sum(one.num_tokens for one in self.told.get(request, ()) if one.answer == answer)

    def ends(self, request: str) -> list[str | None]:
        return [one.finish for one in self.told.get(request, ()) if one.finish]


def ask(name: str, prompt: int, output: int, *, max_tokens: int = 100, **more: Any) -> Request:
    return Request(
        id=RequestId(name),
        model="m",
        prompt=more.pop("ids", None) or TracedPrompt(prompt),
        sampling=Sampling(max_tokens=max_tokens),
        true_output=output,
        **more,
    )


def drive(bench: Bench, scenario: Coroutine[Any, Any, None]) -> None:
    async def main() -> None:
        loop = asyncio.get_running_loop()
        running = loop.create_task(bench.replica.run())
        await scenario
        await bench.replica.drain()
        await bench.replica.stop()
        await running

    run(main())
    assert bench.replica.ledger.free == bench.replica.ledger.total
    assert sorted(bench.executor.closed) == sorted(bench.executor.requests)


def test_one_answer_has_exactly_its_tokens_and_times() -> None:
    bench = Bench(max_tokens=8)

    async def scenario() -> None:
        bench.replica.submit(ask("a", 20, 5))

    drive(bench, scenario())
    assert bench.tokens("a") == 5 and bench.ends("a") == ["stop"]
    (finished,) = bench.book.of(Finished)
    # 20 tokens in chunks of 8 take three steps, the third of which yields the first token.
    assert (finished.first_token_at, finished.last_token_at) == (3.0, 7.0)
    chunks = [event.chunks for event in bench.book.of(Stepped)]
    assert chunks == [((0, 8),), ((0, 8),), ((0, 4),), *[((0, 1),)] * 4]


def test_length_ends_an_answer_that_would_go_on() -> None:
    bench = Bench()

    async def scenario() -> None:
        bench.replica.submit(ask("a", 3, 50, max_tokens=4))

    drive(bench, scenario())
    assert bench.tokens("a") == 4 and bench.ends("a") == ["length"]


def test_the_context_bounds_an_answer() -> None:
    bench = Bench(num_blocks=4)  # room for 16 positions

    async def scenario() -> None:
        with pytest.raises(ContextTooLong):
            bench.replica.submit(ask("long", 16, 1))
        bench.replica.submit(ask("a", 10, 99))

    drive(bench, scenario())
    assert bench.tokens("a") == 6 and bench.ends("a") == ["length"]


def test_a_cancelled_request_gives_its_blocks_back_within_one_step() -> None:
    bench = Bench()

    async def scenario() -> None:
        bench.replica.submit(ask("a", 8, 99))
        bench.replica.submit(ask("b", 8, 20))
        await asyncio.sleep(5.5)
        held = bench.replica.ledger.total - bench.replica.ledger.free
        bench.replica.cancel("a")
        await asyncio.sleep(0.6)
        assert bench.replica.ledger.total - bench.replica.ledger.free < held
        assert bench.ends("a") == ["cancelled"]

    drive(bench, scenario())
    assert bench.tokens("b") == 20


def test_cancelling_a_waiting_request_and_an_unknown_one() -> None:
    bench = Bench(max_jobs=1)

    async def scenario() -> None:
        bench.replica.submit(ask("a", 8, 5))
        bench.replica.submit(ask("b", 8, 5))
        await asyncio.sleep(1.5)
        bench.replica.cancel("b")
        bench.replica.cancel("nobody")
        await asyncio.sleep(0)
        await asyncio.sleep(0)
        assert bench.ends("b") == ["cancelled"]

    drive(bench, scenario())
    assert bench.tokens("a") == 5 and bench.tokens("b") == 0


def test_preempted_answers_lose_and_double_no_token() -> None:
    bench = Bench(num_blocks=8)

    async def scenario() -> None:
        for name in "abc":
            bench.replica.submit(ask(name, 6, 12))

    drive(bench, scenario())
    assert [bench.tokens(name) for name in "abc"] == [12, 12, 12]
    assert sum(event.num_preemptions for event in bench.book.of(Finished)) > 0


def test_scored_prompts_are_computed_whole() -> None:
    """Neither cached blocks nor those of another answer stand in for tokens whose logprobs are wanted."""
    bench = Bench()

    async def scenario() -> None:
        ids = TokenPrompt(range(16))
        bench.replica.submit(ask("plain", 0, 2, ids=ids))
        await asyncio.sleep(10)
        scored = dataclasses.replace(
            ask("scored", 0, 2, ids=ids, n=2), sampling=Sampling(max_tokens=9, prompt_logprobs=0)
        )
        bench.replica.submit(scored)
        await asyncio.sleep(10)
        bench.replica.submit(ask("again", 0, 2, ids=ids))

    drive(bench, scenario())
    cached = [(one.request, one.num_cached) for one in bench.book.of(Finished)]
    assert cached == [("plain", 0), ("scored", 0), ("scored", 0), ("again", 12)]


def test_answers_of_one_request_share_its_prompt() -> None:
    bench = Bench()

    async def scenario() -> None:
        bench.replica.submit(ask("a", 21, 3, n=4))
        await asyncio.sleep(1.5)
        # Five full blocks stand once; each answer adds the one with its own tail.
        assert bench.replica.ledger.total - bench.replica.ledger.free == 5 + 4

    drive(bench, scenario())
    assert [bench.tokens("a", answer) for answer in range(4)] == [3, 3, 3, 3]
    assert bench.ends("a") == ["stop"] * 4


def test_a_known_prefix_is_not_computed_again() -> None:
    bench = Bench()
    first, second = TokenPrompt(range(18)), TokenPrompt((*range(16), 77, 78, 79))

    async def scenario() -> None:
        bench.replica.submit(ask("a", 0, 2, ids=first))
        await asyncio.sleep(3)
        bench.replica.submit(ask("b", 0, 2, ids=second))
        bench.replica.submit(ask("other", 0, 2, ids=TokenPrompt(range(18), salt="x")))

    drive(bench, scenario())
    cached = {event.request: event.num_cached for event in bench.book.of(Finished)}
    assert cached == {"a": 0, "b": 16, "other": 0}


def test_a_full_hit_leaves_one_position_to_compute() -> None:
    bench = Bench()

    async def scenario() -> None:
        for name in "ab":
            bench.replica.submit(ask(name, 0, 2, ids=TokenPrompt(range(16))))
            await asyncio.sleep(5)

    drive(bench, scenario())
    assert [event.num_cached for event in bench.book.of(Finished)] == [0, 12]


class Naming(SteadyExecutor):
    """Says after every step that a block was filled, always with the same hash."""

    def listen(self, on_completion: Callable[[Completion], None]) -> None:
        def named(done: Completion) -> None:
            assert isinstance(done, Done)
            outputs = [one._replace(filled=(BlockHash(b"same"),)) for one in done.outputs]
            on_completion(dataclasses.replace(done, outputs=tuple(outputs)))

        super().listen(named)


def test_without_a_prefix_cache_nothing_is_known_by_hash() -> None:
    """Hashes of generated blocks would stand at the places of the prompt's, which has none here."""
    bench = Bench()
    bench.config = dataclasses.replace(bench.config, has_prefix_cache=False)
    bench.rebuild(Naming())

    async def scenario() -> None:
        for name in "ab":
            bench.replica.submit(ask(name, 0, 6, ids=TokenPrompt(range(8))))
            await asyncio.sleep(3)
            assert not bench.replica.ledger.index

    drive(bench, scenario())
    assert [event.num_cached for event in bench.book.of(Finished)] == [0, 0]


def test_a_full_queue_and_a_draining_replica_refuse() -> None:
    bench = Bench(max_jobs=1)
    bench.replica.config = ReplicaConfig(num_blocks=64, block_size=4, max_waiting=2)

    async def scenario() -> None:
        bench.replica.submit(ask("a", 8, 5))
        await asyncio.sleep(0.5)
        bench.replica.submit(ask("b", 8, 5))
        bench.replica.submit(ask("c", 8, 5))
        with pytest.raises(Overloaded) as caught:
            bench.replica.submit(ask("d", 8, 5))
        assert caught.value.retry_after_s is not None
        draining = asyncio.ensure_future(bench.replica.drain())
        await asyncio.sleep(0)
        with pytest.raises(Draining):
            bench.replica.submit(ask("e", 8, 5))
        await draining

    drive(bench, scenario())
    assert [bench.tokens(name) for name in "abcde"] == [5, 5, 5, 0, 0]


def test_callers_who_want_only_the_end_hear_once() -> None:
    bench = Bench()

    async def scenario() -> None:
        bench.replica.submit(ask("a", 8, 7), every_token=False)

    drive(bench, scenario())
    assert [(one.num_tokens, one.finish) for one in bench.told["a"]] == [(7, "stop")]


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 2**32), st.integers(6, 40), st.sampled_from([4, 16, 64]))
def test_nothing_is_lost_under_random_traffic(seed: int, num_blocks: int, budget: int) -> None:
    """Random prompts with shared prefixes, cancels and n > 1, in little memory: everybody is served or cancelled."""
    chance = random.Random(seed)
    bench = Bench(num_blocks=num_blocks, max_tokens=budget)
    room = num_blocks * 4
    wanted: dict[str, tuple[int, int]] = {}
    cancelled: set[str] = set()

    async def scenario() -> None:
        for number in range(chance.randrange(1, 12)):
            size = chance.randrange(1, room)
            ids = [chance.randrange(2) for _ in range(size)]
            ids[: size // 2] = [7] * (size // 2)
            name, n = f"r{number}", chance.choice((1, 1, 1, 3))
            output = chance.randrange(1, 20)
            wanted[name] = (min(output, room - size), n)
            bench.replica.submit(ask(name, 0, output, ids=TokenPrompt(ids), n=n))
            await asyncio.sleep(chance.choice((0, 0.3, 1.0, 7.0)))
            if chance.random() < 0.2:
                victim = chance.choice(sorted(wanted))
                bench.replica.cancel(victim)
                cancelled.add(victim)

    drive(bench, scenario())
    for name, (output, n) in wanted.items():
        ends = bench.ends(name)
        assert len(ends) == n
        if name not in cancelled:
            assert [bench.tokens(name, answer) for answer in range(n)] == [output] * n


def test_the_policy_of_cached_blocks_is_held_to_its_law() -> None:
    class Miser:
        def decide(self, view: Any) -> evict.Decision:
            return evict.Decision(())

    bench = Bench(num_blocks=4)
    council = bench.replica._council
    council.policies = dataclasses.replace(council.policies, blocks=Miser())

    async def scenario() -> None:
        running = asyncio.create_task(bench.replica.run())
        for first in range(2):  # the second needs what the first left in the cache
            ids = TokenPrompt(tuple(range(first, first + 14)))
            bench.replica.submit(ask(f"{first}", 0, 1, ids=ids))
            await asyncio.sleep(3)
        with pytest.raises(AssertionError, match="0 blocks freed, 3 needed"):
            await running
        await bench.replica.drain()  # it can do no more: nobody waits for it

    run(scenario())


def test_stopping_ends_a_drain_that_waits() -> None:
    bench = Bench()

    async def scenario() -> None:
        running = asyncio.create_task(bench.replica.run())
        bench.replica.submit(ask("a", 5, 50))
        draining = asyncio.create_task(bench.replica.drain())
        await asyncio.sleep(2.5)
        assert not draining.done()
        await bench.replica.stop()
        await asyncio.gather(draining, running)
        await bench.replica.drain()

    run(scenario())
