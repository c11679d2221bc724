"""Both block stores, told what replicas tell them, over a memory that remembers what was written into each block.

Prompts are paths in a small tree; steps have several chunks, answers of one request share, jobs write and go on, leave
and come back, fail and are cancelled; cached blocks are taken by the oldest, by rank, or as somebody likes. After each
step every full block of every job holds what the job believes it holds.
"""

from __future__ import annotations

import random
from collections.abc import Callable

import pytest

from penstock.core.types import BlockHash, Job
from penstock.engine.grouped import GroupedLedger, GroupedRadixLedger
from penstock.engine.ledger import BlockLedger
from penstock.engine.radix import RadixLedger
from penstock.policy.evict.leaves import RANKS, Leaves
from tests.engine.test_ledger_runs import new_job, path

STORES: dict[str, Callable[..., BlockLedger]] = {
    "hash": BlockLedger,
    "hash-grouped": lambda *sizes, **rest: GroupedLedger(*sizes, **rest, group=5),
    "radix": RadixLedger,
    "radix-grouped": lambda *sizes, **rest: GroupedRadixLedger(*sizes, **rest, group=5),
}


class Machine:
    """A store, the jobs in it, and what is in its blocks. `labels`: what each job's blocks should hold."""

    def __init__(self, store: str, rng: random.Random) -> None:
        self.rng, self.size = rng, rng.choice((1, 4))
        self.ledger = STORES[store](
            rng.choice((30, 60)), self.size, has_prefix_cache=rng.random() < 0.9
        )
        self.memory: dict[int, BlockHash] = {}
        self.labels: dict[int, list[int]] = {}
        self.running: list[Job] = []
        self.waiting: list[Job] = []
        self.next_seq = self.num_changed = self.num_emptied = self.num_cached = 0
        if rng.random() < 0.4:
            self.ledger.choose_idle = self._choose
        elif rng.random() < 0.8:
            self.ledger.keeps_order(Leaves(rng.choice(list(RANKS))).rank)

    def _choose(self, need: int) -> list[int]:
        items = list(self.ledger.idle_items())
        self.rng.shuffle(items)
        chosen, found = [], 0
        for item in items:
            if found < need:
                chosen.append(item.id)
                found += item.num_blocks
        self.num_emptied += found
        return chosen

    def arrive(self) -> None:
        labels = [int(self.rng.random() < 0.2) for _ in range(self.rng.randrange(9))]
        num_prompt = len(labels) * self.size + self.rng.randrange(self.size) + 1
        for _ in range(self.rng.choice((1, 1, 2))):
            job = new_job(self.next_seq, num_prompt, path(labels))
            self.labels[job.seq] = list(labels)
            self.next_seq += 1
            self.waiting.append(job)

    def step(self) -> None:
        admitted = self.waiting[: self.rng.randrange(3)]
        for job in admitted:
            job.computed = self.ledger.adopt(job)
            self.num_cached += job.computed
            self.waiting.remove(job)
            self.running.append(job)
        chunks = {}
        for job in list(self.running):
            if job in admitted:
                job.computed = self.ledger.adopt(job)
            upto = min(job.known, job.computed + self.rng.choice((1, self.rng.randrange(1, 24))))
            if -(-upto // self.size) - self.ledger.held(job) > self.ledger.free:
                self.leave(job, comes_back=True)
                continue
            self.ledger.extend(job, upto)
            if self.ledger.names_ahead:
                self.ledger.register(job, upto)
            chunks[job.seq] = upto
        failed = self.fail(chunks) if self.rng.random() < 0.05 else set()
        self.write(chunks, failed)
        for job in [job for job in self.running if job.seq in failed]:
            self.leave(job, comes_back=False)

    def fail(self, chunks: dict[int, int]) -> set[int]:
        """One chunk is not computed, and nor are those that share its blocks."""
        lost: set[int] = set()
        failed: set[int] = set()
        for job in [job for job in self.running if job.seq in chunks]:
            if not failed or not lost.isdisjoint(self.ledger.tables[job.seq]):
                lost |= self.ledger.disown(job, job.computed)
                failed.add(job.seq)
        return failed

    def write(self, chunks: dict[int, int], failed: set[int]) -> None:
        """Everything is written, then everything is read."""
        jobs = [job for job in self.running if job.seq in chunks and job.seq not in failed]
        for job in jobs:
            begin, end = job.computed // self.size, chunks[job.seq] // self.size
            labels = self.labels[job.seq]
            while len(labels) < end:  # it fills a block with what it writes
                labels.append(int(self.rng.random() < 0.2))
            for place, name in enumerate(path(labels)[begin:end], begin):
                self.memory[self.ledger.tables[job.seq][place]] = name
        for job in jobs:
            job.computed = chunks[job.seq]
            self.read(job)
        for job in jobs:
            if not self.ledger.names_ahead:
                self.register(job)
            if job.computed == job.known:
                job.num_output += 1
                if job.hashes and self.rng.random() < 0.9:
                    job.hashes += path(self.labels[job.seq])[len(job.hashes) :]
                    self.register(job)
            self.read(job)

    def register(self, job: Job) -> None:
        before = list(self.ledger.tables[job.seq])
        is_changed = self.ledger.register(job, job.computed)
        assert is_changed == (before != self.ledger.tables[job.seq])
        self.num_changed += is_changed

    def read(self, job: Job) -> None:
        table, full = self.ledger.tables[job.seq], job.computed // self.size
        assert [self.memory[block] for block in table[:full]] == path(self.labels[job.seq])[:full]

    def leave(self, job: Job, *, comes_back: bool) -> None:
        fork = self.ledger.fork()
        freed = fork.release(job)
        assert self.ledger.release(job, job.computed) == freed
        assert fork.free == self.ledger.free
        self.running.remove(job)
        if comes_back:
            job.computed = 0
            self.waiting.append(job)

    def act(self) -> None:
        deed = self.rng.random()
        if deed < 0.35:
            self.arrive()
        elif deed < 0.85 or not self.running:
            self.step()
        elif deed < 0.995:
            self.leave(self.rng.choice(self.running), comes_back=self.rng.random() < 0.3)
        else:
            self.ledger.reset_cache()
        del self.waiting[12:]

    def plan(self) -> None:
        """What a fork says of jobs that start one after the other is what happens."""
        if self.ledger.names_ahead or not self.waiting:
            return
        fork, before = self.ledger.fork(), self.ledger.free
        starts: list[tuple[Job, int]] = []
        for job in self.waiting[:2]:
            cached = fork.cached(job)
            upto = self.rng.randrange(cached + 1, job.known + 1)
            free, need = fork.free, fork.need(job, upto)
            assert fork.reserve(job, upto) == (need <= free)
            if need <= free:
                assert fork.free == free - need
                starts.append((job, upto))
        assert self.ledger.free == before
        for job, _ in starts:
            job.computed = self.ledger.adopt(job)
        for job, upto in starts:
            self.ledger.extend(job, upto)
            assert self.ledger.held(job) == fork.held(job)
        assert self.ledger.free == fork.free
        for job, _ in starts:
            self.running.append(job)
            self.waiting.remove(job)
            self.leave(job, comes_back=True)


def act_often(store: str, seed: int, deeds: int) -> Machine:
    rng = random.Random(f"{store} {seed}")
    machine = Machine(store, rng)
    for number in range(deeds):
        machine.act()
        if number % 20 == 0:
            machine.plan()
            machine.ledger.check()
    for job in list(machine.running):
        machine.leave(job, comes_back=False)
    machine.ledger.check()
    assert machine.ledger.free == machine.ledger.total, "a block is lost"
    return machine


@pytest.mark.parametrize("store", STORES)
def test_blocks_hold_what_their_jobs_believe(store: str) -> None:
    machines = [act_often(store, seed, 200) for seed in range(8)]
    assert sum(machine.num_cached for machine in machines) > 200
    assert sum(machine.num_emptied for machine in machines) > 50
    assert any(machine.num_changed for machine in machines) == store.startswith("radix")


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.parametrize("store", STORES)
def test_blocks_hold_what_their_jobs_believe_for_long(store: str) -> None:
    for seed in range(20):
        act_often(store, 100 + seed, 5_000)


@pytest.mark.parametrize("store", STORES)
def test_without_a_cache_only_living_jobs_share(store: str) -> None:
    ledger = STORES[store](20, 4, has_prefix_cache=False)
    jobs = [new_job(seq, 9, path([0, 0])) for seq in range(3)]
    for job, found in zip(jobs[:2], (0, 8), strict=True):
        assert ledger.adopt(job) == found
        ledger.extend(job, 9)
        ledger.register(job, 9)
        job.computed = 9
    assert ledger.tables[0][:2] == ledger.tables[1][:2]
    for job in jobs[:2]:
        ledger.release(job, job.computed)
        ledger.check()
    assert not list(ledger.idle_items())
    assert ledger.adopt(jobs[2]) == 0
