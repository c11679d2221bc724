"""A replica whose prompts are kept in a tree: what it does under load, and what it does not do any more."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest

from penstock.core.events import Event, Finished, Stepped
from penstock.core.prompt import HashedPrompt
from penstock.core.types import Request
from penstock.engine.radix import RadixLedger
from penstock.policy import evict
from penstock.policy.batch.vllm_v1 import VllmV1
from penstock.policy.evict.leaves import RANKS, Leaves
from penstock.policy.order.lpm import Lpm
from tests.engine.steady import SteadyExecutor
from tests.engine.test_ledger_runs import new_job, path
from tests.engine.test_replica import Bench, ask, drive

SIZE = 4


class TreeBench(Bench):
    def __init__(self, num_blocks: int, *, is_checked: bool = True, **policies: Any) -> None:
        super().__init__(num_blocks=num_blocks, block_size=SIZE, max_tokens=24)
        self.config = replace(self.config, store="radix", is_checked=is_checked)
        self.rebuild(SteadyExecutor(), batch=VllmV1(max_tokens=24), **policies)


def asked(seed: int, num: int, *, longest: int = 9) -> list[Request]:
    """Prompts that are paths in a small tree, some for two answers."""
    rng, found = random.Random(seed), []
    for place in range(num):
        labels = [int(rng.random() < 0.2) for _ in range(rng.randrange(longest))]
        prompt = HashedPrompt(
            len(labels) * SIZE + rng.randrange(1, SIZE), tuple(path(labels)), SIZE
        )
        more = {"ids": prompt, "n": rng.choice((1, 1, 2)), "priority": rng.randrange(3)}
        found.append(ask(f"r{place}", 0, rng.randrange(1, 20), **more))
    return found


def events_of(bench: Bench, requests: Sequence[Request], seed: int) -> list[Event]:
    async def scenario() -> None:
        rng = random.Random(seed)
        for request in requests:
            bench.replica.submit(request)
            await asyncio.sleep(rng.choice((0.0, 0.7, 4.0)))
            if rng.random() < 0.1:
                bench.replica.cancel(request.id)

    drive(bench, scenario())
    assert {event.request for event in bench.book.of(Finished)} == {one.id for one in requests}
    return bench.book.events


@pytest.mark.parametrize("by", RANKS)
def test_the_tree_keeps_the_order_that_its_policy_decides(by: Any) -> None:
    """Held to its law the policy is asked each time; else the ledger keeps its order: the same steps, to the digest."""
    logs = []
    for is_checked in (True, False):
        bench = TreeBench(22, is_checked=is_checked, blocks=Leaves(by), order=Lpm())
        logs.append(events_of(bench, asked(1, 40), 2))
    assert logs[0] == logs[1]
    assert any(event.evicted for event in logs[0] if isinstance(event, Stepped))
    assert any(event.num_cached for event in logs[0] if isinstance(event, Finished))


def test_any_cached_node_may_be_taken() -> None:
    """A policy that takes whatever it likes: what follows a node goes with it, and nothing is lost."""

    class Anything:
        def decide(self, view: evict.View) -> evict.Decision:
            items = list(view.items)
            random.Random(len(items)).shuffle(items)
            return evict.take(view, items)

    bench = TreeBench(22, blocks=Anything())
    events_of(bench, asked(3, 60), 4)


def test_nothing_is_shared_before_it_is_computed() -> None:
    """Two that arrive together compute their prompt twice, and hold it once as soon as it is computed."""
    bench = TreeBench(40)
    first, second, third = (
        ask(name, 0, 9, ids=HashedPrompt(9, tuple(path([0, 0])), SIZE)) for name in "abc"
    )

    async def scenario() -> None:
        for request in (first, second):
            bench.replica.submit(request)
        await asyncio.sleep(1.5)
        ledger = bench.replica.ledger
        assert isinstance(ledger, RadixLedger)
        assert ledger.tables[0][:2] == ledger.tables[1][:2]
        assert ledger.total - ledger.free == 2 + 2
        bench.replica.submit(third)

    drive(bench, scenario())
    chunks = [event.chunks for event in bench.book.of(Stepped)]
    assert chunks[:3] == [((0, 9), (1, 9)), ((0, 1), (1, 1)), ((0, 1), (1, 1), (2, 1))]
    plans = [plan for plan, _ in bench.executor.launched]
    told = {work.seq: work for work in plans[1].work}
    assert told[1].is_fresh and len(told[1].blocks) == 3, "it is told of its new blocks"
    assert not told[0].is_fresh


def test_an_answer_is_found_when_its_job_has_ended() -> None:
    ledger = RadixLedger(20, SIZE)
    names = path([0, 0, 0, 0])
    job = new_job(0, 2 * SIZE + 1, names[:2])
    job.computed = ledger.adopt(job)
    ledger.extend(job, job.known)
    job.computed = job.known
    ledger.register(job, job.computed)
    ledger.extend(job, 4 * SIZE)
    job.num_output, job.computed = 2 * SIZE, 4 * SIZE
    job.hashes += names[2:]
    ledger.register(job, job.computed)
    reader = new_job(1, 4 * SIZE + 1, names)
    assert ledger.fork().cached(reader) == 2 * SIZE
    ledger.release(job, job.computed)
    assert ledger.fork().cached(reader) == 4 * SIZE
    ledger.check()


def test_old_entries_of_leaves_do_not_pile_up() -> None:
    """One prompt comes and goes on an empty machine; its leaf is entered each time, and no eviction clears any."""
    ledger = RadixLedger(20, SIZE)
    assert ledger.keeps_order(Leaves("lfu").rank)
    for seq in range(300):
        job = new_job(seq, 2 * SIZE + 1, path([0, seq % 2]))
        job.computed = ledger.adopt(job)
        ledger.extend(job, job.known)
        job.computed = job.known
        ledger.release(job, job.computed)
        ledger.check()
        assert len(ledger._idle._heap) <= 64 + 2 * ledger.total
