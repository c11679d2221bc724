"""The ledger keeps runs of blocks; told the same, a ledger that keeps single blocks says the same to the last id.

Prompts are paths in a small tree, so that they share beginnings of every length, meet while they are computed (twins)
and part again. What a replica does to its ledger is drawn: steps of several chunks, answers of one request, decodes,
steps that fail, preemption, cancels, resets, and policies that empty any idle block.
"""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.prompt import HashedPrompt
from penstock.core.types import BlockHash, Job, Request, RequestId
from penstock.engine.ledger import BlockLedger
from tests.engine.plain_ledger import PlainLedger

SIZE = 4
thorough = settings(max_examples=60, deadline=None, derandomize=True)


def path(labels: list[int]) -> list[BlockHash]:
    return [BlockHash(bytes(labels[: place + 1])) for place in range(len(labels))]


def new_job(seq: int, num_prompt: int, hashes: list[BlockHash]) -> Job:
    request = Request(id=RequestId(str(seq)), model="m", prompt=HashedPrompt(num_prompt))
    return Job(
        seq=seq,
        request=request,
        answer=0,
        arrived_at=0.0,
        hashes=hashes,
        num_prompt=num_prompt,
        max_tokens=1000,
    )


class Both:
    """Two ledgers that are told the same, and the jobs in them. `labels`: what each job's blocks hold."""

    def __init__(self, rng: random.Random) -> None:
        total, has_cache = rng.choice((8, 20, 45)), rng.random() < 0.9
        self.rng, self.next_seq = rng, 0
        self.runs = BlockLedger(total, SIZE, has_prefix_cache=has_cache)
        self.plain = PlainLedger(total, SIZE, has_prefix_cache=has_cache)
        self.running: list[Job] = []
        self.waiting: list[Job] = []
        self.labels: dict[int, list[int]] = {}
        self.emptied: list[int] = []
        if rng.random() < 0.4:
            self.runs.choose_idle = self.plain.choose_idle = self._choose
        self.choices = rng.randrange(1 << 30)

    def _choose(self, num: int) -> list[int]:
        """Any idle blocks, the same for both."""
        assert list(self.runs.idle_blocks()) == self.plain.idle or self.plain.idle == self.emptied
        self.emptied = list(self.plain.idle)
        return random.Random(self.choices).sample(self.plain.idle, num)

    def act(self) -> None:
        deed = self.rng.random()
        if deed < 0.3:
            self.arrive()
        elif deed < 0.8:
            self.step()
        elif deed < 0.95 and self.running:
            self.leave(self.rng.choice(self.running))
        elif deed > 0.98:
            assert self.runs.reset_cache() == self.plain.reset_cache()
        self.compare()

    def arrive(self) -> None:
        """One prompt, for one answer or two."""
        labels = [int(self.rng.random() < 0.2) for _ in range(self.rng.randrange(12))]
        num_prompt = len(labels) * SIZE + self.rng.randrange(1, SIZE)
        for _ in range(self.rng.choice((1, 1, 2))):
            job = new_job(self.next_seq, num_prompt, path(labels))
            self.labels[job.seq] = list(labels)
            self.next_seq += 1
            self.waiting.append(job)

    def step(self) -> None:
        """Admissions pin what is cached, then every chunk takes blocks and names those it fills."""
        chunks: dict[int, int] = {}
        self.rng.shuffle(self.waiting)
        admitted = self.waiting[: self.rng.randrange(3)]
        for job in admitted:
            job.computed = self.runs.adopt(job)
            assert job.computed == self.plain.adopt(job)
            self.compare()
        self.waiting = self.waiting[len(admitted) :]
        for job in [*self.running, *admitted]:
            if job in admitted:
                job.computed = self.runs.adopt(job)
                assert job.computed == self.plain.adopt(job)
            upto = job.computed + self.rng.choice((1, self.rng.randrange(1, 40)))
            upto = min(upto, job.known)
            if -(-upto // SIZE) - self.runs.held(job) > self.plain.free:
                self.preempt(job)
                continue
            self.choices += 1
            for ledger in (self.runs, self.plain):
                ledger.extend(job, upto)
                ledger.register(job, upto)
            chunks[job.seq] = upto
            self.compare()
            if job in admitted:
                self.running.append(job)
        if self.rng.random() < 0.1:
            self.fail(chunks)
        else:
            self.complete(chunks)

    def complete(self, chunks: dict[int, int]) -> None:
        for job in self.running:
            job.computed = chunks.get(job.seq, job.computed)
            if job.computed == job.known:
                job.num_output += 1
                labels = self.labels[job.seq]
                if self.rng.random() < 0.7 and job.hashes and len(labels) < job.computed // SIZE:
                    labels.append(int(self.rng.random() < 0.2))
                    job.hashes = path(labels)
                    self.runs.register(job, job.computed)
                    self.plain.register(job, job.computed)

    def fail(self, chunks: dict[int, int]) -> None:
        """One chunk was not computed; those who share its blocks fail with it, as engine.replica says."""
        victims = [job for job in self.running if job.seq in chunks]
        if not victims:
            return
        first = self.rng.choice(victims)
        lost: set[int] = set()
        failed = []
        for job in victims[victims.index(first) :]:
            if job is first or not lost.isdisjoint(self.plain.tables[job.seq]):
                disowned = self.runs.disown(job, job.computed)
                assert disowned == self.plain.disown(job, job.computed)
                lost |= disowned
                failed.append(job)
        self.compare()
        for job in self.running:
            if job not in failed and not lost.isdisjoint(self.plain.tables[job.seq]):
                failed.append(job)
        ended = {job.seq for job in failed}
        self.complete({seq: upto for seq, upto in chunks.items() if seq not in ended})
        for job in failed:
            self.leave(job)

    def preempt(self, job: Job) -> None:
        assert self.runs.release(job, job.computed) == self.plain.release(job, job.computed)
        if job in self.running:
            self.running.remove(job)
        job.computed = 0
        self.waiting.append(job)

    def leave(self, job: Job) -> None:
        if self.rng.random() < 0.1:  # the rest was never computed, whoever shared it
            job.computed = self.rng.randrange(job.computed + 1)
        assert self.runs.release(job, job.computed) == self.plain.release(job, job.computed)
        self.running.remove(job)
        if self.rng.random() < 0.3:
            job.computed = 0
            self.waiting.append(job)

    def compare(self) -> None:
        self.runs.check()
        assert self.runs.tables == self.plain.tables
        assert self.runs.registered == self.plain.registered
        assert self.runs.free == self.plain.free
        assert list(self.runs.idle_blocks()) == self.plain.idle
        assert self.runs.contents() == self.plain.names


@thorough
@given(seed=st.integers(0, 2**32 - 1))
def test_runs_and_single_blocks_agree(seed: int) -> None:
    both = Both(random.Random(seed))
    for _ in range(40):
        both.act()


@thorough
@given(seed=st.integers(0, 2**32 - 1))
def test_hashes_that_name_no_prefixes_do_no_harm(seed: int) -> None:
    """Equal blocks behind different ones: fewer may be found, but none is lost or held by two who did not share it."""
    rng = random.Random(seed)
    ledger, inside = BlockLedger(30, SIZE), []
    for seq in range(40):
        labels = rng.sample(range(12), rng.randrange(1, 9))
        job = new_job(seq, len(labels) * SIZE + 1, [BlockHash(bytes([label])) for label in labels])
        while ledger.free < len(labels) + 1 and inside:
            leaving = inside.pop(rng.randrange(len(inside)))
            ledger.release(leaving, leaving.computed)
        start = ledger.adopt(job)
        assert start <= len(labels) * SIZE
        for upto in (rng.randrange(start, job.known), job.known):
            ledger.extend(job, upto)
            ledger.register(job, upto)
            ledger.check()
            named = ledger.contents()
            for block, contents in zip(
                ledger.tables[seq], job.hashes[: upto // SIZE], strict=False
            ):
                assert named[block] == contents
            if rng.random() < 0.1:
                ledger.disown(job, rng.randrange(job.known))
                ledger.check()
                break
            job.computed = upto
        inside.append(job)


def test_a_short_run_keeps_no_long_list_of_names() -> None:
    """A beginning that many prompts share must not keep the names of all that followed it once."""
    ledger = BlockLedger(200, SIZE)
    job, other = (new_job(seq, 100 * SIZE + 1, path([0] * 100)) for seq in range(2))
    other.hashes[5:] = path([0] * 5 + [1] * 95)[5:]
    for each in (job, other):
        each.computed = ledger.adopt(each)
        ledger.extend(each, 100 * SIZE)
        ledger.register(each, 100 * SIZE)
        each.computed = 100 * SIZE
    ledger.release(job)
    begin = ledger.runs(other.seq)[0]
    assert len(begin.blocks) == 5
    ledger.release(other)
    assert begin.names == path([0] * 5)


def test_a_block_behind_a_forgotten_one_is_still_known() -> None:
    """Its beginning was never computed by the one who named it; the one who went on did compute what it named."""
    ledger = BlockLedger(20, SIZE)
    short, long, again = (new_job(seq, 3 * SIZE + 1, path([0, 0, 0])) for seq in range(3))
    del short.hashes[2:]
    for job, upto in ((short, 2 * SIZE), (long, 3 * SIZE), (again, 3 * SIZE)):
        assert ledger.adopt(job) == (2 * SIZE if job is long else 0)
        ledger.extend(job, upto)
        ledger.register(job, upto)
        if job is long:
            end = ledger.tables[job.seq][2]
            ledger.release(long, 3 * SIZE)
            ledger.release(short, 0)
            assert list(ledger.idle_blocks()) == [end]
    ledger.check()
    ledger.release(again, 3 * SIZE)
    assert ledger.adopt(new_job(3, 4 * SIZE, path([0, 0, 0]))) == 3 * SIZE
    assert ledger.tables[3][2] == end


def compute(ledger: BlockLedger, job: Job, upto: int) -> list[int]:
    """Take the blocks of positions [0, upto) and name those that are full; they count as computed."""
    ledger.extend(job, upto)
    ledger.register(job, upto)
    job.computed = upto
    ledger.check()
    return list(ledger.tables[job.seq])


def test_of_three_copies_the_next_oldest_serves() -> None:
    """Three jobs compute a prompt at once; it is cut; then whoever served is forgotten, twice."""
    ledger, names = BlockLedger(30, SIZE), path([0, 0, 0])
    jobs = [new_job(seq, 3 * SIZE + 1, list(names)) for seq in range(3)]
    tables = [compute(ledger, job, 3 * SIZE) for job in jobs]
    short = new_job(3, 2 * SIZE + 1, names[:2])
    assert ledger.adopt(short) == 2 * SIZE and ledger.tables[3] == tables[0][:2]
    ledger.release(short, 2 * SIZE)
    for place in range(2):
        ledger.release(jobs[place], 0)
        ledger.check()
        reader = new_job(10 + place, 3 * SIZE + 1, list(names))
        assert ledger.adopt(reader) == 3 * SIZE
        assert ledger.tables[reader.seq] == tables[place + 1]
        ledger.release(reader, 3 * SIZE)


def test_who_fills_a_gap_copies_what_is_known_behind_it() -> None:
    """A policy emptied the middle of a prompt. It is computed again with all that follows; the older end serves."""
    ledger, names = BlockLedger(20, SIZE), path([0, 0, 0])
    first, again, reader = (new_job(seq, 3 * SIZE + 1, list(names)) for seq in range(3))
    _, middle, end = compute(ledger, first, 3 * SIZE)
    ledger.release(first, 3 * SIZE)
    ledger.choose_idle = lambda need: [middle]
    filler = new_job(9, 18 * SIZE, [])
    ledger.extend(filler, 18 * SIZE)
    ledger.release(filler, 0)
    again.computed = ledger.adopt(again)
    assert again.computed == SIZE
    assert compute(ledger, again, 3 * SIZE)[2] != end
    assert ledger.adopt(reader) == 3 * SIZE and ledger.tables[2][2] == end


def test_what_follows_a_disowned_block_is_still_known() -> None:
    """One job's step failed; another had gone on behind the same block, and wrote what it named."""
    ledger, names = BlockLedger(20, SIZE), path([0, 0, 0])
    short, long, again, reader = (new_job(seq, 3 * SIZE + 1, list(names)) for seq in range(4))
    del short.hashes[2:]
    compute(ledger, short, 2 * SIZE)
    assert ledger.adopt(long) == 2 * SIZE
    end = compute(ledger, long, 3 * SIZE)[2]
    assert ledger.disown(short, SIZE) == {ledger.tables[0][1]}
    ledger.check()
    again.computed = ledger.adopt(again)
    assert again.computed == SIZE
    compute(ledger, again, 3 * SIZE)
    assert ledger.adopt(reader) == 3 * SIZE and ledger.tables[3][2] == end


def test_nobody_finds_what_comes_behind_a_disowned_block() -> None:
    ledger, names = BlockLedger(20, SIZE), path([0, 0, 0])
    job, reader = (new_job(seq, 3 * SIZE + 1, list(names)) for seq in range(2))
    compute(ledger, job, 2 * SIZE)
    ledger.disown(job, SIZE)
    compute(ledger, job, 3 * SIZE)
    assert set(ledger.index) == {names[0]}
    assert ledger.adopt(reader) == SIZE


def test_a_run_is_found_once() -> None:
    """Names that repeat inside a prompt: no block may stand at a place that is not its own."""
    ledger = BlockLedger(20, SIZE)
    a, b = BlockHash(b"a"), BlockHash(b"b")
    for seq, name in enumerate((a, b)):
        compute(ledger, new_job(seq, SIZE + 1, [name]), SIZE)
    reader = new_job(2, 3 * SIZE + 1, [a, a, b])
    assert ledger.adopt(reader) == SIZE and ledger.tables[2] == ledger.tables[0]
