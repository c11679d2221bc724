"""Mistakes made on purpose, one at a time, in the code that serves: the seeds of every day see each of them."""

from __future__ import annotations

import itertools
from collections.abc import Callable

import pytest

from penstock.cluster.fleet import Fleet, Ticket
from penstock.cluster.link import ReplicaLink
from penstock.core.errors import PenstockError
from penstock.core.messages import Cancel, Outputs
from penstock.core.types import Job
from penstock.engine import joinings
from penstock.engine.host import Host
from penstock.engine.host_fetches import HostFetches
from penstock.engine.joinings import Joinings
from penstock.engine.ledger import BlockLedger
from penstock.engine.outcomes import Outcomes
from penstock.engine.partings import Partings, Settling
from penstock.engine.swap import Swap
from penstock.lab.faults import Ran, run_seed
from penstock.net.outbox import Outbox

NUM_SEEDS = 200  # of the runs of every day
Patch = pytest.MonkeyPatch


def a_token_is_lost(patch: Patch) -> None:
    hear, count = ReplicaLink._hear_outputs, itertools.count(1)

    def lossy(link: ReplicaLink, message: Outputs) -> None:
        if next(count) % 50 or message.items[0][1].finish is not None:
            hear(link, message)

    patch.setattr(ReplicaLink, "_hear_outputs", lossy)


def a_message_is_sent_twice(patch: Patch) -> None:
    put, count = Outbox.put, itertools.count(1)

    def twice(outbox: Outbox, message: object, num_bytes: int = 0) -> None:
        put(outbox, message, num_bytes)
        if isinstance(message, Outputs) and not next(count) % 50:
            put(outbox, message, num_bytes)

    patch.setattr(Outbox, "put", twice)


def a_block_leaks(patch: Patch) -> None:
    release = BlockLedger.release

    def leaky(ledger: BlockLedger, job: Job, upto: int) -> None:
        if job.is_cancelled and ledger.tables.get(job.seq):
            ledger.tables[job.seq].pop()
        release(ledger, job, upto)

    patch.setattr(BlockLedger, "release", leaky)


def an_end_is_told_twice(patch: Patch) -> None:
    def end(ticket: Ticket, error: Exception | None) -> None:
        if ticket.on_ended is not None:
            ticket.on_ended(error)
            if error is not None:
                ticket.on_ended(error)

    patch.setattr(Ticket, "end", end)


def a_cancel_is_forgotten(patch: Patch) -> None:
    hear = Host._hear

    def deaf(host: Host, message: object) -> None:
        is_waiting = isinstance(message, Cancel) and any(
            job.status == "waiting" for job in host.replica._roster.jobs_of(message.request)
        )
        if not is_waiting:
            hear(host, message)

    patch.setattr(Host, "_hear", deaf)


def a_lost_replica_keeps_one_of_its_requests(patch: Patch) -> None:
    fail = ReplicaLink._fail

    def forgetful(link: ReplicaLink, error: PenstockError) -> None:
        if len(link._held) > 1:
            link._held.popitem()
        fail(link, error)

    patch.setattr(ReplicaLink, "_fail", forgetful)


def a_request_that_was_heard_of_is_tried_again(patch: Patch) -> None:
    retry = Fleet.retry

    def stubborn(fleet: Fleet, ticket: Ticket, error: PenstockError) -> None:
        ticket.is_heard = False
        retry(fleet, ticket, error)

    patch.setattr(Fleet, "retry", stubborn)


def a_cancelled_request_stays_counted(patch: Patch) -> None:
    finish = Fleet.finish

    def careless(fleet: Fleet, ticket: Ticket) -> None:
        if ticket.is_cancelled:
            fleet._close(ticket, ticket.error)
        else:
            finish(fleet, ticket)

    patch.setattr(Fleet, "finish", careless)


def blocks_of_a_failed_step_keep_their_names(patch: Patch) -> None:
    patch.setattr(BlockLedger, "disown", lambda ledger, job, start: set())


def an_adopted_replica_goes_on_telling_of_the_old_requests(patch: Patch) -> None:
    let_go = Host._let_go

    def talkative(host: Host, channel: object) -> None:
        let_go(host, channel)  # type: ignore[arg-type]
        host._orphans.clear()

    patch.setattr(Host, "_let_go", talkative)


def a_copy_in_host_memory_says_it_is_longer_than_it_is(patch: Patch) -> None:
    put = Swap.put

    def boastful(swap: Swap, job: Job) -> object:
        transfer = put(swap, job)
        copy = swap._copies.get(job.seq)
        if copy is not None and transfer is not None:
            copy.upto = (copy.first + len(copy.blocks)) * swap._ledger.block_size
        return transfer

    patch.setattr(Swap, "put", boastful)


def a_step_tells_its_tokens_before_they_count(patch: Patch) -> None:
    apply = Outcomes._apply_outputs
    count = itertools.count(1)

    def hasty(outcomes: Outcomes, now: float, flight: object, done: object) -> None:
        apply(outcomes, now, flight, done)  # type: ignore[arg-type]
        told = outcomes._roster.outputs
        if told and not next(count) % 40:
            outcomes._roster.outputs = told[:-1]

    patch.setattr(Outcomes, "_apply_outputs", hasty)


def a_target_that_is_to_drop_a_request_keeps_it(patch: Patch) -> None:
    settle = Joinings.settle

    def clinging(joinings: Joinings, now: float, told: Settling) -> None:
        if told.how != "drop":
            settle(joinings, now, told)

    patch.setattr(Joinings, "settle", clinging)


def a_source_that_is_to_go_on_does_not(patch: Patch) -> None:
    settle = Partings.settle

    def idle(partings: Partings, now: float, told: Settling) -> None:
        if told.how != "resume":
            settle(partings, now, told)

    patch.setattr(Partings, "settle", idle)


def a_request_that_has_moved_stays_in_the_hands_of_its_source(patch: Patch) -> None:
    patch.setattr(ReplicaLink, "disown", lambda link, request_id: None)


def blocks_are_copied_from_the_wrong_place(patch: Patch) -> None:
    runs = joinings._runs

    def crossed(there: tuple[int, ...], here: list[int], places: range) -> joinings.Pairs:
        return runs((*there[1:], *there[:1]), here, places)

    patch.setattr(joinings, "_runs", crossed)


def a_peer_that_was_read_is_not_told(patch: Patch) -> None:
    patch.setattr(HostFetches, "_leave", lambda fetches, seek: None)


MISTAKES: dict[Callable[[Patch], None], set[str]] = {
    a_token_is_lost: {"wrong", "lost"},
    a_message_is_sent_twice: {"doubled", "wrong"},
    a_block_leaks: {"crashed", "leaked"},
    an_end_is_told_twice: {"doubled"},
    a_cancel_is_forgotten: {"leaked", "owners"},
    a_lost_replica_keeps_one_of_its_requests: {"lost", "owners"},
    a_request_that_was_heard_of_is_tried_again: {"doubled", "wrong"},
    a_cancelled_request_stays_counted: {"owners", "leaked"},
    blocks_of_a_failed_step_keep_their_names: {"crashed", "wrong"},
    an_adopted_replica_goes_on_telling_of_the_old_requests: {"wrong", "owners", "doubled"},
    a_copy_in_host_memory_says_it_is_longer_than_it_is: {"crashed", "wrong", "lost"},
    a_step_tells_its_tokens_before_they_count: {"lost", "wrong", "leaked"},
    a_target_that_is_to_drop_a_request_keeps_it: {"leaked", "crashed", "owners"},
    a_source_that_is_to_go_on_does_not: {"lost", "leaked"},
    a_request_that_has_moved_stays_in_the_hands_of_its_source: {"owners"},
    blocks_are_copied_from_the_wrong_place: {"wrong", "crashed"},
    a_peer_that_was_read_is_not_told: {"leaked"},
}


def first_broken() -> Ran | None:
    ran = (run_seed(seed) for seed in range(NUM_SEEDS))
    return next((one for one in ran if one.broken), None)


@pytest.mark.parametrize("mistake", MISTAKES, ids=lambda mistake: mistake.__name__)
def test_a_mistake_is_seen(mistake: Callable[[Patch], None], monkeypatch: Patch) -> None:
    mistake(monkeypatch)
    found = first_broken()
    assert found is not None, "no seed of the daily ones sees it"
    print(f"{mistake.__name__}: seed {found.seed}: {found.broken}: {found.told}")
    assert found.broken in MISTAKES[mistake]
