"""Jobs that leave for host memory and come back: nothing is lost, nothing is computed twice, logs are replayed."""

from __future__ import annotations

import asyncio
import random
from collections.abc import Sequence
from typing import Any

import numpy as np
import pytest

from penstock.core.clock import sleep_until
from penstock.core.events import Event, Finished, Stepped, Transferred
from penstock.core.plans import Decodes, Plan, Transfer
from penstock.core.prompt import HashedPrompt, TracedPrompt
from penstock.core.types import BlockHash, Caps, HostLink, Request, RequestId, Sampling
from penstock.cost.fitted import Fitted
from penstock.cost.lengths import RecentLengths
from penstock.cost.predict import StepPredictor
from penstock.engine.free_runs import FreeRuns, stretches
from penstock.engine.replica import Replica, ReplicaConfig
from penstock.engine.swap import Store, SwapConfig, joined
from penstock.engine.turn import Predictors, ReplicaPolicies
from penstock.policy import find
from penstock.sim.executor import ModelledExecutor
from penstock.sim.loop import run
from penstock.sim.wires import Wires

MODEL = Fitted({"step": 0.01, "token": 1e-4}, name="", digest="", num_layers=1)
LINK = HostLink(dispatch_s=1e-4, bytes_per_s=1e6, block_bytes=1000, pieces=2)
SIZE = 4
MODES = ("sync", "async", "adaptive")


class Watched(ModelledExecutor):
    """Keeps what crosses the port, and holds every plan and copy against the promises of core.ports."""

    def __init__(self, caps: Caps) -> None:
        super().__init__(MODEL, caps=caps)
        self.transfers: list[Transfer] = []
        self.num_computed: dict[int, list[int]] = {}
        self.under: dict[int, Transfer] = {}

    def launch(self, plan: Plan, repeat: int = 1) -> Any:
        for work in plan.work:
            told = self.num_computed.setdefault(work.seq, [])
            told.extend(range(work.start, work.start + work.tokens + repeat - 1))
        return super().launch(plan, repeat)

    def transfer(self, transfer: Transfer) -> None:
        self.transfers.append(transfer)
        self.under[transfer.id] = transfer
        super().transfer(transfer)

    def _moved(self, transfer: int, end: float) -> None:
        del self.under[transfer]
        super()._moved(transfer, end)


class Book:
    def __init__(self) -> None:
        self.events: list[Event] = []

    def emit(self, event: Event) -> None:
        self.events.append(event)

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


def request(place: int, prompt: int, output: int, shared: int = 0) -> Request:
    """The first `shared` blocks of prompts are the same for all."""
    names = [
        BlockHash(bytes((0 if at < shared else 1 + place, at))) for at in range(prompt // SIZE)
    ]
    return Request(
        id=RequestId(f"r{place}"),
        model="m",
        prompt=HashedPrompt(prompt, tuple(names), SIZE) if shared else TracedPrompt(prompt),
        sampling=Sampling(max_tokens=output),
        true_output=output,
    )


def serve(
    swap: SwapConfig,
    requests: Sequence[Request],
    *,
    num_blocks: int = 40,
    every_steps: int = 3,
    gap_s: float = 0.05,
    cancels: Sequence[tuple[float, str]] = (),
    evict: Any = None,
    store: Store = "hash",
    max_repeat: int = 1 << 20,
) -> tuple[Book, Watched]:
    book = Book()
    caps = Caps(
        num_layers=1,
        max_context=1 << 12,
        host_blocks=swap.host_blocks,
        link=LINK,
        max_repeat=max_repeat,
    )
    executor = Watched(caps)

    async def main() -> None:
        replica = Replica(
            ReplicaConfig(
                num_blocks=num_blocks, block_size=SIZE, swap=swap, store=store, is_checked=True
            ),
            executor,
            ReplicaPolicies(
                order=find("order", "drawn-priority")(every_steps=every_steps),
                admit=find("admit", "full-fit")(),
                batch=find("batch", "resident")(max_tokens=64, max_jobs=16),
                evict=evict or find("evict", "fastswitch")(every_steps=every_steps),
                blocks=find("evict", "lru")(),
            ),
            Predictors(cost=StepPredictor(MODEL, 1), lengths=RecentLengths()),
            log=book,
        )
        ended = asyncio.get_running_loop().create_task(replica.run())
        todo: list[tuple[float, Any]] = [(gap_s * at, one) for at, one in enumerate(requests)]
        todo += cancels
        for at, what in sorted(todo, key=lambda one: one[0]):
            await sleep_until(at)
            if isinstance(what, str):
                replica.cancel(what)
            else:
                replica.submit(what, every_token=False)
        await replica.drain()
        if ended.done():
            await ended
        replica.check()
        assert replica.ledger.free == replica.ledger.total
        await replica.stop()
        await ended
        swapping = replica._swap
        assert swapping is not None
        still = sum(len(copy.blocks) for copy in swapping._leaving.values())
        assert len(swapping._host) + still == swap.host_blocks and not replica.ledger.copies

    run(main())
    return book, executor


def lot(num: int, seed: int = 0, shared: int = 0) -> list[Request]:
    chance = random.Random(seed)
    return [
        request(place, chance.randrange(20, 60), chance.randrange(5, 40), shared)
        for place in range(num)
    ]


@pytest.mark.parametrize("mode", MODES)
def test_who_comes_back_computes_nothing_twice(mode: Any) -> None:
    swap = SwapConfig(host_blocks=400, mode=mode)
    requests = lot(20)
    book, executor = serve(swap, requests, max_repeat=1)
    assert any(event.offloaded for event in book.of(Stepped))
    assert any(event.loaded for event in book.of(Stepped))
    assert len(book.of(Finished)) == 20
    for seq, positions in executor.num_computed.items():
        assert sorted(set(positions)) == list(range(max(positions) + 1))
        assert len(positions) - len(set(positions)) == 0, f"job {seq} computed something twice"
    outputs = {event.request: event.num_output for event in book.of(Finished)}
    assert outputs == {one.id: one.true_output for one in requests}


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("shared", [0, 3])
@pytest.mark.parametrize("host_blocks", [8, 60])
def test_little_host_memory_and_shared_prompts(mode: Any, shared: int, host_blocks: int) -> None:
    """Some copies find no room, some are dropped: their jobs compute again, and all answers are whole."""
    for seed in range(3):
        requests = lot(20, seed, shared)
        book, _ = serve(SwapConfig(host_blocks=host_blocks, mode=mode), requests)
        outputs = {event.request: event.num_output for event in book.of(Finished)}
        assert outputs == {one.id: one.true_output for one in requests}
        assert book.of(Transferred)


@pytest.mark.parametrize("mode", MODES)
def test_cancelled_at_any_moment(mode: Any) -> None:
    for seed in range(4):
        chance = random.Random(seed)
        cancels = [(chance.uniform(0, 2.0), f"r{place}") for place in range(0, 20, 2)]
        book, _ = serve(
            SwapConfig(host_blocks=60, mode=mode), lot(20, seed, 2 * (seed % 2)), cancels=cancels
        )
        assert len(book.of(Finished)) == 20


@pytest.mark.parametrize("group_blocks", [1, 60])
@pytest.mark.parametrize("mode", MODES)
def test_a_tree_of_prefixes_beside_host_memory(mode: Any, group_blocks: int) -> None:
    for host_blocks in (8, 60):
        chance = random.Random(host_blocks)
        requests = lot(20, host_blocks, 3)
        cancelled = {f"r{place}" for place in range(0, 20, 4)}
        cancels = [(chance.uniform(0, 2.0), name) for name in sorted(cancelled)]
        swap = SwapConfig(host_blocks=host_blocks, mode=mode, group_blocks=group_blocks)
        book, _ = serve(swap, requests, store="radix", cancels=cancels)
        outputs = {event.request: event.num_output for event in book.of(Finished)}
        kept = {one.id: one.true_output for one in requests if one.id not in cancelled}
        assert len(outputs) == 20 and kept.items() <= outputs.items()
        assert book.of(Transferred)


def test_copies_that_stay_valid_move_less() -> None:
    moved = {}
    for keeps in (False, True):
        book, _ = serve(SwapConfig(host_blocks=400, keeps_copies=keeps, mode="sync"), lot(20))
        moved[keeps] = sum(event.num_blocks for event in book.of(Transferred) if event.is_out)
    assert moved[True] < 0.8 * moved[False]


def test_groups_need_fewer_copies_of_as_many_bytes() -> None:
    pieces = {}
    for group in (1, 16):
        book, _ = serve(SwapConfig(host_blocks=400, group_blocks=group, mode="sync"), lot(20))
        told = book.of(Transferred)
        pieces[group] = sum(event.num_runs for event in told) / sum(
            event.num_blocks for event in told
        )
    assert pieces[1] == 1.0 and pieces[16] < 0.45


def test_without_host_memory_victims_are_computed_again() -> None:
    caps_free = SwapConfig()
    assert caps_free.host_blocks == 0
    with pytest.raises(ValueError, match="host_blocks"):
        SwapConfig(host_blocks=-1)


def test_consecutive_in_both_memories_is_one_run() -> None:
    assert joined([(3, 7), (4, 8), (5, 10), (6, 11), (8, 12)]) == (
        (3, 7, 2),
        (5, 10, 2),
        (8, 12, 1),
    )


def test_free_runs_against_a_set() -> None:
    chance = random.Random(1)
    free, held, jobs = FreeRuns(200, 12), {}, range(9)
    for _ in range(20_000):
        seq = chance.choice(jobs)
        mine = held.setdefault(seq, [])
        if chance.random() < 0.6 and len(free):
            need = chance.randrange(1, min(len(free), 20) + 1)
            got = free.take(seq, need, mine[-1] if mine else None)
            assert len(got) == need == len(set(got))
            assert not set(got) & {block for each in held.values() for block in each}
            mine += got
        elif mine:
            left = chance.randrange(len(mine)) if chance.random() < 0.5 else 0
            if not left:
                free.leave(seq)
            gone = mine[left:]
            chance.shuffle(gone)
            free += gone
            del mine[left:]
        unused = list(free)
        assert len(unused) == len(free) == len(set(unused))
        assert len(unused) + sum(map(len, held.values())) == 200


def test_a_lonely_job_grows_in_one_run() -> None:
    free = FreeRuns(100, 10)
    tables: dict[int, list[int]] = {0: [], 1: [], 2: []}
    for _ in range(20):
        for seq, table in tables.items():
            table += free.take(seq, 1, table[-1] if table else None)
    assert max(len(list(stretches(table))) for table in tables.values()) <= 2


def contents(plan: Plan) -> set[int]:
    work = plan.work
    assert not isinstance(work, Decodes)
    return {block for one in work for block in one.blocks}


def test_wires_price_and_wait() -> None:
    wires = Wires(LINK)
    out = Transfer(0, 0, True, ((0, 0, 5),))
    assert wires.begin(out, 1.0) == pytest.approx(1.0 + 2e-4 + 5e-3)
    single = Transfer(1, 0, True, tuple((place, place, 1) for place in range(10, 15)))
    assert wires.begin(single, 1.0) == pytest.approx(1.0052 + 5 * 2e-4 + 5e-3)
    back = Transfer(2, 1, False, ((20, 20, 1),))
    assert wires.begin(back, 1.0) == pytest.approx(1.0 + 2e-4 + 1e-3)
    same = Transfer(3, 0, False, ((30, 4, 1),))  # its host block is still being written
    assert wires.begin(same, 1.0) == pytest.approx(1.0052 + 1.2e-3)


class Arenas:
    """Real bytes behind the accounting: what a plan computes is written, what moves is copied when it is told moved."""

    def __init__(self, num_blocks: int, host_blocks: int) -> None:
        self.device = np.full((num_blocks, SIZE), -1, np.int64)
        self.host = np.full((host_blocks, SIZE), -1, np.int64)
        self.tables: dict[int, list[int]] = {}

    def compute(self, plan: Plan) -> None:
        """Every position holds a number of its job and place; all before it must hold theirs."""
        for work in plan.work:
            table = self.tables.setdefault(work.seq, [])
            if work.is_fresh:
                table.clear()
            table.extend(work.blocks)
            flat = self.device[table].reshape(-1)
            want = np.arange(work.start) + (work.seq << 32)
            assert (flat[: work.start] == want).all(), f"job {work.seq} reads what is not its own"
            for at in range(work.start, work.start + work.tokens):
                self.device[table[at // SIZE], at % SIZE] = (work.seq << 32) + at

    def copy(self, transfer: Transfer) -> None:
        for device, host, count in transfer.runs:
            ours, theirs = slice(device, device + count), slice(host, host + count)
            if transfer.is_out:
                self.host[theirs] = self.device[ours]
            else:
                self.device[ours] = self.host[theirs]


class Writing(Watched):
    """Computes when a plan ends, copies when a transfer ends: in between, contents are what they were before."""

    arenas: Arenas

    def _moved(self, transfer: int, end: float) -> None:
        self.arenas.copy(self.under[transfer])
        super()._moved(transfer, end)

    def _finish(self, run: Any) -> None:
        self.arenas.compute(run.plan)
        super()._finish(run)


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize(("group", "keeps"), [(1, True), (12, True), (12, False)])
def test_every_position_keeps_its_content(
    mode: Any, group: int, keeps: bool, monkeypatch: Any
) -> None:
    made = Arenas(40, 120)
    monkeypatch.setattr(Writing, "arenas", made, raising=False)
    monkeypatch.setitem(globals(), "Watched", Writing)
    swap = SwapConfig(host_blocks=120, mode=mode, group_blocks=group, keeps_copies=keeps)
    book, executor = serve(swap, lot(40, 5), every_steps=2, gap_s=0.02, max_repeat=1)
    assert len(book.of(Finished)) == 40
    assert len(executor.transfers) > 50
