"""Cached blocks that leave the device and come back: the words stay the same, and no block is lost or doubled.

Words are those of penstock.sim.speech, which depend on what every block holds.
"""

from __future__ import annotations

import asyncio
import random
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from penstock.assemble import load_config
from penstock.core.clock import sleep_until
from penstock.core.events import Event, FiledAway, Finished, Transferred
from penstock.core.prompt import TokenPrompt, TracedPrompt
from penstock.core.types import BlockHash, Caps, HostLink, Output, Request, RequestId, Sampling
from penstock.cost.fitted import Fitted
from penstock.cost.lengths import RecentLengths
from penstock.cost.predict import StepPredictor
from penstock.engine.replica import Replica, ReplicaConfig
from penstock.engine.swap import SwapConfig
from penstock.engine.tier_store import TierStore
from penstock.engine.turn import Predictors, ReplicaPolicies
from penstock.lab.replay import replay_log
from penstock.lab.simulate import simulate
from penstock.policy import find
from penstock.report.log import LogReader
from penstock.sim.executor import ModelledExecutor
from penstock.sim.loop import run
from penstock.sim.speech import Speaker, mix, said
from penstock.traffic import TraceMeta

MODEL = Fitted({"step": 0.01, "token": 1e-3}, name="", digest="", num_layers=1)
LINK = HostLink(dispatch_s=1e-4, bytes_per_s=1e6, block_bytes=1000, pieces=2)
SIZE = 4
NO_SWAP = SwapConfig()


class Book:
    def __init__(self) -> None:
        self.events: list[Event] = []

    def emit(self, event: Event) -> None:
        self.events.append(event)

    def of(self, kind: type) -> list[Any]:
        return [event for event in self.events if isinstance(event, kind)]


class World:
    """One replica whose device has `num_blocks`, with tiers behind it."""

    def __init__(
        self,
        *,
        num_blocks: int = 24,
        tier_blocks: int = 64,
        disk_blocks: int = 0,
        fetch: str = "always",
        swap: SwapConfig = NO_SWAP,
        disk_block_s: float = 0.004,
    ) -> None:
        caps = Caps(
            num_layers=1,
            max_context=1 << 12,
            host_blocks=swap.host_blocks,
            tier_blocks=tier_blocks,
            disk_blocks=disk_blocks,
            link=LINK,
        )
        inner = ModelledExecutor(MODEL, caps=caps)
        inner.disk_block_s = disk_block_s
        self.book = Book()
        self.speaker = Speaker(
            inner,
            num_blocks=num_blocks,
            block_size=SIZE,
            host_blocks=swap.host_blocks + tier_blocks,
            disk_blocks=disk_blocks,
        )
        self.told: dict[str, list[int]] = {}
        swaps = swap.host_blocks > 0
        self.replica = Replica(
            ReplicaConfig(num_blocks=num_blocks, block_size=SIZE, swap=swap, is_checked=True),
            self.speaker,
            ReplicaPolicies(
                order=find("order", "fcfs")(),
                admit=find("admit", "full-fit")(),
                batch=find("batch", "vllm-v1")(max_tokens=64, max_jobs=8),
                evict=find("evict", "fastswitch")() if swaps else find("evict", "recompute-last")(),
                blocks=find("evict", "lru")(),
                fetch=find("fetch", fetch)(),
            ),
            Predictors(cost=StepPredictor(MODEL, 1), lengths=RecentLengths()),
            log=self.book,
            on_outputs=self.hear,
        )

    def hear(self, outputs: Sequence[tuple[str, Output]]) -> None:
        for name, output in outputs:
            assert output.error is None, output.error
            self.told.setdefault(name, []).extend(output.ids)

    @property
    def store(self) -> TierStore:
        tiers = self.replica._parts.tiers
        assert tiers is not None
        return tiers.store

    @property
    def num_lost(self) -> int:
        """Blocks that were to be saved and could not be."""
        disk = self.replica._bringing.brought.get("disk")
        return 0 if disk is None else disk.num_lost

    async def ask(self, name: str, ids: Sequence[int], output: int, at: float = 0.0) -> None:
        await sleep_until(at)
        self.replica.submit(
            Request(
                id=RequestId(name),
                model="m",
                prompt=TokenPrompt(ids),
                sampling=Sampling(max_tokens=output),
                true_output=output,
            )
        )

    async def over(self) -> None:
        await self.replica.drain()
        await asyncio.sleep(1.0)  # copies that nobody waits for
        self.replica.check()
        tables = self.replica.ledger.tables
        assert not tables and self.replica.ledger.free == self.replica.ledger.total

    def cached(self) -> dict[str, int]:
        return {one.request: one.num_cached for one in self.book.of(Finished)}


def prompt(group: int, size: int, tail: int = 0) -> list[int]:
    """The first `size` tokens are the same for all of a group."""
    return [1 + group * 1000 + at for at in range(size)] + [7 + tail] * 3


def contents(ids: Sequence[int]) -> Iterator[tuple[BlockHash, list[int]]]:
    """Keys and values of every full block, by its name."""
    total, kv = 0, []
    for place, token in enumerate(ids):
        kv.append(mix(token, place, total))
        total += kv[-1]
    for place, name in enumerate(TokenPrompt(ids).blocks(SIZE)):
        yield name, kv[place * SIZE : (place + 1) * SIZE]


async def in_turn(world: World, groups: Sequence[int], size: int = 40, step_s: float = 2.0) -> None:
    for place, group in enumerate(groups):
        ids = prompt(group, size, place)
        await world.ask(f"{place}", ids, 3, at=1.0 + place * step_s)
    await world.over()


@pytest.mark.parametrize("fetch", ["always", "cheaper", "never"])
def test_a_prefix_that_was_evicted_comes_back_from_host_memory(fetch: str) -> None:
    world = World(fetch=fetch)
    run(in_turn(world, [0, 1, 2, 0]))
    cached = world.cached()
    assert cached["1"] == cached["2"] == 0
    assert cached["3"] < 20 if fetch == "never" else cached["3"] == 40
    for place, group in enumerate([0, 1, 2, 0]):
        assert world.told[f"{place}"] == list(said(prompt(group, 40, place), 3))


def test_what_is_not_worth_a_copy_is_computed() -> None:
    """Copies of LINK take 1.2 ms a block and a block 4 ms to compute; here they take 2000 times that."""
    world = World(fetch="cheaper")
    world.replica._bringing.block_s["host"] = 2.0
    run(in_turn(world, [0, 1, 2, 0]))
    assert world.cached()["3"] < 20


def test_blocks_go_on_to_disk_and_come_back_from_there() -> None:
    world = World(tier_blocks=24, disk_blocks=200)
    groups = [0, 1, 2, 3, 4, 5, 6, 7, 0]
    run(in_turn(world, groups))
    assert world.cached()["8"] == 40
    reads = [event for event in world.book.of(FiledAway) if not event.is_out]
    assert sum(event.num_blocks for event in reads) >= 6 and not any(each.bad for each in reads)
    for place, group in enumerate(groups):
        assert world.told[f"{place}"] == list(said(prompt(group, 40, place), 3))


def test_what_host_memory_has_no_room_for_is_all_on_disk() -> None:
    """Host memory of two prompts, six prompts: each is found whole when it comes again, and again."""
    world = World(tier_blocks=24, disk_blocks=200)
    groups = [*range(6)] * 3
    run(in_turn(world, groups))
    cached = world.cached()
    assert [cached[f"{place}"] for place in range(6, 18)] == [40] * 12
    assert world.store.take_lost() == 0 and world.num_lost == 0
    for place, group in enumerate(groups):
        assert world.told[f"{place}"] == list(said(prompt(group, 40, place), 3))


def test_who_waits_lets_a_slow_disk_catch_up() -> None:
    """A block takes 30 ms to write and 4 ms to compute: `always` waits for it, `never` loses some."""
    lost, ends = {}, {}
    for fetch in ("always", "cheaper", "never"):
        world = World(tier_blocks=24, disk_blocks=200, disk_block_s=0.03, fetch=fetch)
        run(in_turn(world, range(8), step_s=0.1))
        lost[fetch], ends[fetch] = world.num_lost, max(each.at for each in world.book.of(Finished))
        texts = [prompt(group, 40, group) for group in range(8)]
        names = {name for ids in texts for name, _ in contents([*ids, *said(ids, 3)[:2]])}
        here = set(world.replica.ledger.contents().values())
        kept = here | set(world.store.host) | set(world.store.disk)
        assert len(kept & names) == len(names) - lost[fetch], "all that is lost is counted"
    assert lost["always"] == 0 < lost["never"], lost
    assert ends["never"] < ends["always"], "what is not waited for is not waited for"
    assert lost["cheaper"], "writing takes longer than computing"


def test_a_block_that_is_spoilt_on_disk_is_computed_again() -> None:
    world = World(tier_blocks=24, disk_blocks=200)
    groups = [0, 1, 2, 3, 4, 5, 6, 7, 0]

    async def main() -> None:
        for place, group in enumerate(groups):
            if place == len(groups) - 1:
                world.speaker.spoilt.update(range(200))
            await world.ask(f"{place}", prompt(group, 40, place), 3, at=1.0 + place * 2.0)
        await world.over()

    run(main())
    assert any(event.bad for event in world.book.of(FiledAway))
    assert world.cached()["8"] < 40
    assert world.told["8"] == list(said(prompt(0, 40, 8), 3))
    bad = sum(len(event.bad) for event in world.book.of(FiledAway))
    names = TokenPrompt(prompt(0, 40, 8)).blocks(SIZE)
    assert bad and sum(name in world.store.disk for name in names) <= len(names) - bad


def test_nothing_that_is_being_copied_is_given_up() -> None:
    one, two, three = (BlockHash(bytes([number]) * 16) for number in range(3))
    store = TierStore(2, 2)
    assert store.keep(one) is not None and store.keep(two) is not None
    assert store.keep(three) is None, "both host blocks are being written to"
    store.kept(one)
    ((_, slot),) = store.write(0, [one])
    assert store.keep(three) is None, "one is being read for the disk"
    store.written(one, True)
    assert store.keep(three) == 1 and one not in store.host and store.disk[one].block == slot
    store.kept(two)
    store.write(5, [two])
    store.written(two, True)
    (pair,) = store.read(1, [one])
    assert pair == (0, slot) and two not in store.host
    store.check()
    other = BlockHash(bytes(16 * [9]))
    assert store.keep(other) is None, "one is being read into, the other one is on its way"
    assert not store.write(2, []) and store.disk[one].busy == 1
    store.was_read(one, True)
    assert store.keep(other) == 0 and one not in store.host
    store.check()


def test_a_file_takes_no_more_of_the_disk_than_it_needs() -> None:
    names = [BlockHash(bytes([number]) * 16) for number in range(9)]
    store = TierStore(9, 1000)
    store.restore([(names[0], 1)])
    for name in names[1:]:
        assert store.keep(name) is not None
        store.kept(name)
    assert [slot for _, slot in store.write(0, names[1:5])] == [0, 2, 3, 4]


def test_a_slot_that_is_being_read_or_written_is_no_other_block_s() -> None:
    names = [BlockHash(bytes([number]) * 16) for number in range(3)]
    store = TierStore(3, 1)
    for name in names:
        assert store.keep(name) is not None
        store.kept(name)
    assert len(store.write(0, names[:1])) == 1
    assert not store.write(1, names[1:2]), "its only slot is being written to"
    store.written(names[0], True)
    assert len(store.write(1, names[1:2])) == 1 and names[0] not in store.disk
    store.written(names[1], False)
    assert not store.disk, "what was not written is not there"
    store.check()


def test_what_the_disk_has_goes_before_what_it_does_not() -> None:
    names = [BlockHash(bytes([number]) * 16) for number in range(5)]
    store = TierStore(3, 9)
    for name in names[:3]:
        assert store.keep(name) is not None
        store.kept(name)
    store.write(0, [names[1]])
    store.written(names[1], True)
    assert store.room == 1
    assert store.keep(names[3]) is not None and names[1] not in store.host
    store.kept(names[3])
    assert store.room == 0 and store.take_lost() == 0
    assert store.keep(names[4], is_ahead=True) is None, (
        "nothing is lost for what need not leave yet"
    )
    assert not store.read(1, [names[1]]), "nor for what the disk has"
    assert store.take_lost() == 0
    assert store.keep(names[4]) is not None and names[0] not in store.host
    assert store.take_lost() == 1
    store.kept(names[4])
    store.check()
    store.close_disk()
    assert store.room == 3 and not store.dirty
    assert store.keep(names[0]) is not None and names[2] not in store.host, "the longest unused"
    assert store.take_lost() == 0, "without a disk nothing is to be saved there"
    store.kept(names[0])
    store.check()


def test_those_who_waited_for_the_disk_go_on_in_the_order_in_which_they_came() -> None:
    world = World(num_blocks=40, tier_blocks=24, disk_blocks=200, disk_block_s=0.05)

    async def main() -> None:
        for place in range(5):
            await world.ask(f"{place}", prompt(place, 80, place), 3, at=1.0 + place * 4.0)
        for name in ("a", "b", "c"):
            await world.ask(name, prompt(0, 80, 9), 3, at=30.0)
        await world.over()

    run(main())
    began = [
        each.admitted_at
        for name in ("a", "b", "c")
        for each in world.book.of(Finished)
        if each.request == name
    ]
    assert any(not event.is_out for event in world.book.of(FiledAway))
    assert began == sorted(began)
    assert [each.request for each in world.book.of(Finished)][-3:] == ["a", "b", "c"]


def test_those_who_wait_for_one_prefix_share_what_is_brought() -> None:
    world = World(num_blocks=40)

    async def main() -> None:
        await world.ask("first", prompt(0, 80), 3, at=1.0)
        await world.ask("other", prompt(1, 120), 3, at=3.0)
        for name in range(4):
            await world.ask(f"late {name}", prompt(0, 80, name), 3, at=5.0)
        await world.over()

    run(main())
    assert [world.cached()[f"late {name}"] for name in range(4)] == [80] * 4
    back = [event for event in world.book.of(Transferred) if not event.is_out]
    assert sum(event.num_blocks for event in back) <= 20


def test_the_log_of_a_replica_with_tiers_replays(tmp_path: Path) -> None:
    path = tmp_path / "log.jsonl"
    sets = (
        "fleet.0.policy.fetch='always'",
        "fleet.0.executor.kind='modelled'",
        "fleet.0.executor.gpu='a100-80g'",
        "fleet.0.cache.num_blocks=300",
        "fleet.0.cache.tiers.host_bytes=14000000",
        "fleet.0.cache.tiers.disk_bytes=400000000",
    )
    config = load_config(sets=sets)
    trace = Shared(num=40)
    simulate(config, trace, log_path=path)
    events = list(LogReader(path))
    assert any(isinstance(event, FiledAway) and not event.is_out for event in events)
    assert any(isinstance(event, Transferred) and not event.is_out for event in events)
    for each in replay_log(path):
        assert each.difference is None, each.difference


class Shared:
    """Prompts of eight conversations in turn, with pauses."""

    def __init__(self, num: int) -> None:
        self._num = num
        self.meta = TraceMeta("conversations in turn", "drawn", num, num)

    def __iter__(self) -> Iterator[tuple[float, Request]]:
        rng = random.Random(0)
        for place in range(self._num):
            group = rng.randrange(8)
            ids = (*range(group * 100, group * 100 + 3), 1000 + place)
            yield (
                place * 0.7,
                Request(
                    id=RequestId(f"{place}"),
                    model="default",
                    prompt=TracedPrompt(3 * 512 + 20, ids, 512),
                    sampling=Sampling(max_tokens=20),
                    true_output=20,
                ),
            )


def test_what_will_have_to_leave_next_is_saved_before_it_does() -> None:
    """A sixteenth of the device: prompts that come then find places without waiting for a copy."""
    world = World(num_blocks=64)

    async def main() -> None:
        for group in range(6):  # 10 blocks each
            await world.ask(f"{group}", prompt(group, 40), 3, at=1.0 + 2 * group)
        await asyncio.sleep(1.5)
        outward = [event for event in world.book.of(Transferred) if event.is_out]
        assert 0 < sum(event.num_blocks for event in outward) <= 12
        names = TokenPrompt(prompt(0, 40)).blocks(SIZE)
        kept = [name in world.store.host for name in names]
        assert any(kept) and not all(kept), kept
        assert kept == sorted(kept), "the end of the oldest one first"
        await world.over()

    run(main())


@pytest.mark.parametrize("seed", range(24))
def test_at_random_the_words_are_those_without_tiers(seed: int) -> None:
    """Small memories everywhere, spoilt slots, cancelled requests; and swapping beside it."""
    rng = random.Random(seed)
    swap = SwapConfig(host_blocks=16, group_blocks=2) if seed % 3 == 0 else SwapConfig()
    world = World(
        num_blocks=rng.choice((16, 24, 40)),
        tier_blocks=rng.choice((3, 8, 30)),
        disk_blocks=rng.choice((0, 5, 40)),
        fetch=rng.choice(("always", "always", "cheaper")),
        swap=swap,
        disk_block_s=rng.choice((0.0, 0.001, 0.05)),
    )
    asked: dict[str, tuple[list[int], int]] = {}

    async def main() -> None:
        at, cancelled = 0.0, set()
        for place in range(40):
            at += rng.choice((0.0, 0.02, 0.3))
            ids = prompt(rng.randrange(5), rng.choice((8, 20, 37)), rng.randrange(3))
            output = rng.randint(1, 12)
            asked[f"{place}"] = ids, output
            await world.ask(f"{place}", ids, output, at=at)
            if rng.random() < 0.15:
                gone = f"{rng.randint(0, place)}"
                world.replica.cancel(gone)
                cancelled.add(gone)
            if world.store.num_slots and rng.random() < 0.3:
                world.speaker.spoilt.add(rng.randrange(world.store.num_slots))
        await world.over()
        for name, (ids, output) in asked.items():
            told, right = world.told.get(name, []), list(said(ids, output))
            assert told == (right[: len(told)] if name in cancelled else right), name

    run(main())
    held = {}
    for ids, output in asked.values():
        held.update(contents([*ids, *said(ids, output)]))
    first = swap.host_blocks
    for name, kept in world.store.host.items():
        assert world.speaker.host[first + kept.block] == held[name], "not what its name says"
    assert not any(kept.busy for kept in (*world.store.host.values(), *world.store.disk.values()))
