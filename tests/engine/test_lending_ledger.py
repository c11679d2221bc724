"""The ledger of a replica that lends and borrows: every block is somebody's, whatever is asked in whatever order."""

from __future__ import annotations

import random

import pytest

from penstock.core.prompt import TokenPrompt
from penstock.core.types import Job, Request, RequestId, Sampling
from penstock.engine.lending_ledger import LendingLedger

SIZE, TOTAL = 4, 40


def job_of(seq: int, num_prompt: int) -> Job:
    prompt = TokenPrompt([seq % 7 + 1] * num_prompt)
    request = Request(
        id=RequestId(f"r{seq}"), model="m", prompt=prompt, sampling=Sampling(max_tokens=8)
    )
    return Job(
        seq=seq,
        request=request,
        answer=0,
        arrived_at=0.0,
        hashes=list(prompt.blocks(SIZE)),
        num_prompt=num_prompt,
        max_tokens=8,
        priority=0,
        is_streamed=True,
    )


@pytest.mark.parametrize("seed", range(30))
def test_no_block_is_lost(seed: int) -> None:
    chance, ledger = random.Random(seed), LendingLedger(TOTAL, SIZE)
    jobs: dict[int, Job] = {}
    for turn in range(120):
        what = chance.choice(("come", "grow", "spill", "go", "lend", "return", "home", "less"))
        job = jobs[chance.choice(sorted(jobs))] if jobs else None
        if what == "come":
            fresh = job_of(turn, chance.randint(1, 40))
            if ledger.fork().need(fresh, fresh.num_prompt) <= ledger.free:
                fresh.computed = ledger.adopt(fresh)
                ledger.extend(fresh, fresh.num_prompt)
                ledger.register(fresh, fresh.num_prompt)
                fresh.computed, jobs[turn] = fresh.num_prompt, fresh
        elif what == "grow" and job is not None and ledger.free > 1:
            ledger.extend(job, job.computed + SIZE)
            job.computed += SIZE
        elif what == "spill" and job is not None and ledger.unname(job):
            job.hashes.clear()
            away, before = ledger.away.get(job.seq, 0), ledger.free
            count = chance.randint(0, job.computed // SIZE - away)
            first, ours = TOTAL + 1000 * turn, ledger.at_home(job, count)
            blocks = [ledger.tables[job.seq][at] for at in ours]
            assert len(ours) == count and all(block < TOTAL for block in blocks)
            ledger.spill(job, list(range(first, first + count)))
            assert ledger.free == before + count and ledger.away.get(job.seq, 0) == away + count
            assert ledger.held(job) * SIZE >= job.computed  # as ever, for who asks
        elif what == "go" and job is not None:
            freed = ledger.fork().release(job)
            assert ledger.fork().freeable(job) == freed
            assert ledger.release(job, job.computed) == freed
            del jobs[job.seq]
        elif what == "lend":
            count = chance.randint(1, 8)
            if count <= ledger.free:
                blocks = ledger.lend(turn, count)
                assert len(set(blocks)) == count and max(blocks) < TOTAL
        elif what == "return" and ledger.lent:
            ledger.take_back(chance.choice(sorted(ledger.lent)))
        elif what == "less" and ledger.lent:
            loan = chance.choice(sorted(ledger.lent))
            count, before = chance.randint(0, len(ledger.lent[loan]) - 1), ledger.free
            last = ledger.lent[loan][-1]
            ledger.take_back(loan, count)
            assert ledger.free == before + count and ledger.lent[loan][-1] == last
        elif what == "home" and job is not None and ledger.away.get(job.seq):
            table = ledger.tables[job.seq]
            places = [at for at, block in enumerate(table) if block >= TOTAL]
            chosen = chance.sample(places, chance.randint(0, len(places)))
            count = chance.randint(0, min(len(chosen), ledger.free))
            before, blocks = ledger.free, ledger.take_home(turn, count)
            ledger.check()
            assert ledger.homing.pop(turn) == blocks
            if chance.random() < 0.3:  # they come for nothing
                ledger.put_back(blocks)
                assert ledger.free == before
            else:
                others = [TOTAL + 1000 * turn + at for at in range(len(chosen) - count)]
                ledger.relocate(job, dict(zip(chosen, [*blocks, *others], strict=True)))
                assert ledger.free == before - count
                assert ledger.away.get(job.seq, 0) == len(places) - count
        ledger.check()
    for job in jobs.values():
        ledger.release(job)
    for loan in list(ledger.lent):
        ledger.take_back(loan)
    assert ledger.free == TOTAL
    ledger.check()


def test_who_may_borrow_is_admitted_with_less_room() -> None:
    ledger, job = LendingLedger(TOTAL, SIZE), job_of(1, TOTAL * SIZE * 2)
    assert ledger.fork().need(job, job.num_prompt) == 2 * TOTAL
    ledger.credit["r1"] = 2 * TOTAL - ledger.working
    fork = ledger.fork()
    assert fork.need(job, job.num_prompt) == ledger.working
    assert fork.need(job, 2 * SIZE) == 2  # a chunk takes what it takes
    assert fork.total == TOTAL + ledger.credit["r1"]
