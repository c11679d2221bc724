"""The block ledger and its forks against the model ledger: same operations, same answers, whatever is asked.

The model (tests/laws/model_ledger.py) is a pool of blocks with sets of holders, and its fork is a copy of it.
"""

from __future__ import annotations

import random

from hypothesis import given, settings
from hypothesis import strategies as st

from penstock.core.prompt import TokenPrompt
from penstock.core.types import BlockHash, Job, Request, RequestId
from penstock.engine.fork import Fork
from penstock.engine.ledger import BlockLedger
from tests.laws.model_ledger import ModelLedger
from tests.laws.views import SIZE, make_job

seeds = st.integers(0, 2**32 - 1)
thorough = settings(max_examples=60, deadline=None, derandomize=True)


class Pair:
    """A real and a model ledger that are told the same things, and the jobs that hold blocks in them."""

    def __init__(self, rng: random.Random) -> None:
        total = rng.choice((6, 12, 25))
        self.rng = rng
        self.real, self.model = BlockLedger(total, SIZE), ModelLedger(total, SIZE)
        self.jobs = [make_job(rng, seq, 1.0) for seq in range(12)]
        self.inside: list[Job] = []

    @property
    def outside(self) -> list[Job]:
        return [job for job in self.jobs if job not in self.inside]

    def act(self) -> None:
        """What a replica does: start a job, run a chunk of one, take one out."""
        deed = self.rng.random()
        if deed < 0.45 and self.outside:
            self._start(self.rng.choice(self.outside))
        elif deed < 0.8 and self.inside:
            self._run(self.rng.choice(self.inside))
        elif self.inside:
            self._release(self.rng.choice(self.inside))
        self.compare()

    def _start(self, job: Job) -> None:
        upto = self.rng.randrange(self.model.cached(job) + 1, job.known + 1)
        if not self.model.reserve(job, upto):
            return
        self.real.adopt(job)
        self.real.extend(job, upto)
        self.real.register(job, upto)
        job.computed = upto
        self.inside.append(job)

    def _run(self, job: Job) -> None:
        upto = self.rng.randrange(job.computed, job.known + 1)
        if not self.model.reserve(job, upto):
            return
        self.real.extend(job, upto)
        self.real.register(job, upto)
        if self.rng.random() < 0.8:  # else the step failed: the rest was never computed
            job.computed = upto

    def _release(self, job: Job) -> None:
        assert self.real.release(job, job.computed) == self.model.release(job)
        job.computed = 0
        self.inside.remove(job)

    def compare(self) -> None:
        self.real.check()
        self.model.check(self.inside)
        assert self.real.free == self.model.free
        for job in self.jobs:
            assert self.real.held(job) == self.model.held(job)
        contents = self.real.contents()
        idle = [contents[block] for block in self.real.idle_blocks()]
        assert idle == [block.contents for block in self.model.idle]
        compare_forks(self.real.fork(), self.model.fork(), self.jobs, self.rng)


def compare_forks(real: Fork, model: ModelLedger, jobs: list[Job], rng: random.Random) -> None:
    assert (real.total, real.block_size) == (model.total, model.block_size)
    assert real.free == model.free
    for job in jobs:
        assert real.held(job) == model.held(job)
        assert real.cached(job) == model.cached(job)
        upto = rng.randrange(1, job.known + 1)
        if model.held(job) or upto > model.cached(job):
            assert real.need(job, upto) == model.need(job, upto)


@thorough
@given(seed=seeds)
def test_ledger_and_model_agree(seed: int) -> None:
    pair = Pair(random.Random(seed))
    for _ in range(30):
        pair.act()


@thorough
@given(seed=seeds)
def test_fork_and_model_agree(seed: int) -> None:
    """A step as batch policies plan it: running jobs, victims among them, then waiting jobs if nobody left."""
    rng = random.Random(seed)
    pair = Pair(rng)
    for _ in range(20):
        pair.act()
    before = pair.real.free
    real, model = pair.real.fork(), pair.model.fork()
    running, is_whole = list(pair.inside), True
    for job in pair.inside:
        if job not in running:
            continue
        for other in running:
            assert real.freeable(other) == model.freeable(other)
        upto = rng.randrange(job.computed, job.known + 1)
        took = real.reserve(job, upto)
        assert took == model.reserve(job, upto)
        if not took or rng.random() < 0.1:
            victim = running.pop()
            assert real.release(victim) == model.release(victim)
            is_whole = False
        compare_forks(real, model, pair.jobs if is_whole else running, rng)
    if is_whole:
        for job in pair.outside:
            upto = rng.randrange(model.cached(job) + 1, job.known + 1)
            assert real.reserve(job, upto) == model.reserve(job, upto)
            compare_forks(real, model, pair.jobs, rng)
    assert pair.real.free == before, "planning touched the real ledger"
    pair.compare()


def test_fork_sees_blocks_that_this_step_will_fill() -> None:
    """A chunk that fills a block its job already holds takes none, and yet the next job may share that block."""
    ledger = BlockLedger(12, SIZE)
    ahead, behind = (make_job(random.Random(1), seq, 1.0) for seq in range(2))
    for job in (ahead, behind):
        job.num_prompt, job.num_output = 3 * SIZE + 1, 0
        job.hashes = [BlockHash(b"one"), BlockHash(b"two"), BlockHash(b"three")]
    ledger.extend(ahead, SIZE + 2)
    ledger.register(ahead, SIZE + 2)
    ahead.computed = SIZE + 2
    fork = ledger.fork()
    assert fork.cached(behind) == SIZE
    assert fork.reserve(ahead, 2 * SIZE) and fork.free == ledger.free
    assert fork.cached(behind) == 2 * SIZE


def test_a_booking_taken_back_is_no_longer_found() -> None:
    """A victim that was already planned in this step fills nothing, so nobody may count on its blocks."""
    ledger = BlockLedger(8, 4)
    prompt = TokenPrompt(range(13))
    jobs = [
        Job(
            seq=seq,
            request=Request(id=RequestId(str(seq)), model="m", prompt=prompt),
            answer=0,
            arrived_at=0.0,
            hashes=list(prompt.blocks(4)),
            num_prompt=13,
            max_tokens=1,
        )
        for seq in range(2)
    ]
    fork = ledger.fork()
    assert fork.reserve(jobs[0], 12) and fork.cached(jobs[1]) == 12
    fork.release(jobs[0])
    assert fork.free == 8 and fork.cached(jobs[1]) == 0


def test_blocks_that_a_booking_shares_are_not_freeable() -> None:
    ledger = BlockLedger(20, SIZE)
    jobs = [make_job(random.Random(1), seq, 1.0) for seq in range(2)]
    for job, num_prompt in zip(jobs, (5 * SIZE, 2 * SIZE + 1), strict=True):
        job.num_prompt, job.num_output = num_prompt, 0
        job.hashes = [BlockHash(b"a"), BlockHash(b"ab"), BlockHash(b"abc")]
    ledger.extend(jobs[0], 4 * SIZE)
    ledger.register(jobs[0], 4 * SIZE)
    fork = ledger.fork()
    assert fork.freeable(jobs[0]) == 4
    assert fork.reserve(jobs[1], 2 * SIZE + 1)
    assert fork.freeable(jobs[0]) == 2
    assert fork.release(jobs[0]) == 2 and fork.free == 17


def test_a_fork_counts_on_a_known_block_behind_one_that_will_be_filled() -> None:
    """A `blocks` policy emptied the middle of a prompt; who fills it again makes a copy of the end, which is known."""
    ledger = BlockLedger(20, SIZE)
    jobs = [make_job(random.Random(1), seq, 1.0) for seq in range(3)]
    for job in jobs:
        job.num_prompt, job.num_output = 3 * SIZE + 1, 0
        job.hashes = [BlockHash(b"a"), BlockHash(b"ab"), BlockHash(b"abc")]
    ledger.extend(jobs[0], 3 * SIZE)
    ledger.register(jobs[0], 3 * SIZE)
    _, middle, _ = ledger.tables[0]
    ledger.release(jobs[0])
    ledger.choose_idle = lambda need: [middle]
    ledger.extend(jobs[0], 18 * SIZE)
    ledger.release(jobs[0])
    fork = ledger.fork()
    assert fork.cached(jobs[1]) == SIZE and fork.reserve(jobs[1], 3 * SIZE + 1)
    assert fork.free == 20 - 4
    assert fork.cached(jobs[2]) == 3 * SIZE
    assert fork.need(jobs[2], 3 * SIZE + 1) == 2  # the end, which is idle, and a last one


def test_a_prompt_may_name_two_of_its_blocks_alike() -> None:
    ledger = BlockLedger(8, SIZE)
    job, other = (make_job(random.Random(1), seq, 1.0) for seq in range(2))
    for each in (job, other):
        each.num_prompt, each.num_output = 3 * SIZE + 1, 0
        each.hashes = [BlockHash(b"one"), BlockHash(b"two"), BlockHash(b"one")]
    ledger.extend(job, 3 * SIZE)
    ledger.register(job, 3 * SIZE)
    ledger.check()
    assert ledger.fork().cached(other) == 3 * SIZE
    ledger.release(job)
    ledger.extend(other, 8 * SIZE)  # throws out all of it
    ledger.check()
    assert not ledger.index


def test_blocks_of_a_run_are_those_of_each_job_alone() -> None:
    """`extend_each` takes as many blocks as `extend` would for each, when idle ones must go for it too."""
    for computed in range(1, 4 * SIZE):
        one, all_at_once = BlockLedger(12, SIZE), BlockLedger(12, SIZE)
        jobs = [make_job(random.Random(1), seq, 1.0) for seq in range(3)]
        for ledger in (one, all_at_once):
            jobs[2].computed = 2 * SIZE
            jobs[2].hashes = [BlockHash(b"one"), BlockHash(b"two")]
            ledger.extend(jobs[2], 2 * SIZE)
            ledger.register(jobs[2], 2 * SIZE)
            ledger.release(jobs[2])
            for job in jobs[:2]:
                job.computed = computed
                ledger.extend(job, computed)
        for job in jobs[:2]:
            one.extend(job, computed + SIZE + 1)
        all_at_once.extend_each(jobs[:2], SIZE + 1)
        all_at_once.check()
        assert one.tables == all_at_once.tables and one.free == all_at_once.free


def test_a_fork_counts_on_no_booking_where_blocks_get_their_names_later() -> None:
    """Another plan may run before this one has written them: who starts beside it computes its prompt as well."""
    ledger = BlockLedger(8, SIZE)
    ledger.names_ahead = False
    jobs = [make_job(random.Random(1), seq, 1.0) for seq in range(2)]
    for job in jobs:
        job.num_prompt, job.num_output = 2 * SIZE + 1, 0
        job.hashes = [BlockHash(b"one"), BlockHash(b"two")]
    fork = ledger.fork()
    assert fork.reserve(jobs[0], SIZE) and fork.reserve(jobs[0], 2 * SIZE)
    assert fork.cached(jobs[1]) == 0 and fork.need(jobs[1], 2 * SIZE + 1) == 3


def test_a_job_that_left_and_came_back_in_a_fork_leaves_only_what_it_took() -> None:
    ledger = BlockLedger(8, SIZE)
    job = make_job(random.Random(1), 0, 1.0)
    job.num_prompt, job.num_output = 4 * SIZE, 0
    job.hashes = [BlockHash(b"one"), BlockHash(b"two")]
    ledger.extend(job, 4 * SIZE)
    ledger.register(job, 4 * SIZE)
    fork = ledger.fork()
    assert fork.release(job) == 4 and fork.free == 8
    assert fork.reserve(job, 3 * SIZE) and fork.free == 5
    assert fork.release(job) == 3 and fork.free == 8
