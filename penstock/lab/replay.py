"""Takes a log's decisions again: the same mechanisms, made as the log says, fed its inputs at its instants.

A replica is replayed on the virtual loop. Its executor is a leaf that runs nothing: what a plan yielded is in the log
and is fed as any other input. A fleet's router waits for nothing and is called directly. Whatever the mechanism
writes is compared, whole, with what the log holds at that place, so a decision counts as identical only if its digest,
chunks, reason and the sizes it was taken on are; inputs that were misread show up as well.

Inputs of one instant are fed together, and a decision in the log is waited for before anything behind it is fed: that
is how turns were divided, see engine.replica. A log that ends early (a killed process) is replayed up to its end.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from penstock.cluster.predictors import predictors_of_model, profile_of
from penstock.cluster.spec import ReplicaSpec, policies_of
from penstock.core.config import build
from penstock.core.errors import BadConfig, BadTrace
from penstock.core.events import (
    AdapterLoaded,
    Arrived,
    Cancelled,
    Completed,
    Drafted,
    Event,
    FiledAway,
    Finished,
    Header,
    Opened,
    Refused,
    Stepped,
    Suspended,
    Transferred,
)
from penstock.core.fetching import SeekBegun
from penstock.core.moving import Departed, Granted, Parted
from penstock.core.plans import Adapted, Filed, Moved, Yielded
from penstock.core.types import BlockHash, Caps, PlanId, Request
from penstock.engine.replica import Replica, ReplicaConfig
from penstock.engine.turn import Predictors, ReplicaPolicies
from penstock.lab.inputs import (
    MOVES,
    ReplayedExecutor,
    done_of,
    order_of,
    request_of,
    resumed,
)
from penstock.lab.judge import Difference, Diverged, Judge
from penstock.lab.replay_fleet import replay_fleet
from penstock.report.log import LogReader, log_paths
from penstock.report.made import MadeReplica, made_of
from penstock.sim.loop import run

SAID = (
    Stepped,
    Finished,
    Parted,
    Granted,
    Departed,
    SeekBegun,
)  # what a replica writes without being fed it
UNFED = (Header, Opened, Refused)  # a replica's refusals come before its inputs: nothing reached it
TOLD_EVERY = 200  # events between two words of progress
OnProgress = Callable[[int, int], None]
PATIENCE = 8  # rounds of the loop within which a turn of this instant must have come


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """One mechanism's replay. `num_decisions` were identical; `difference` is the first that was not."""

    path: str
    who: str
    what: str
    num_decisions: int
    num_events: int
    difference: Difference | None
    notes: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True)
class ReplicaParts:
    """What a replica is made of, but for the leaf."""

    config: ReplicaConfig
    caps: Caps
    policies: ReplicaPolicies
    predictors: Predictors
    notes: tuple[str, ...] = ()
    found: tuple[tuple[BlockHash, int], ...] = ()


def parts_of(made: MadeReplica, profile: str = "") -> ReplicaParts:
    """Fresh parts, as the log says. `profile` is the digest its predictions came from. Raises BadTrace."""
    try:
        spec = build(ReplicaSpec, made.spec, "the replica of the log")
        policies = policies_of(spec.policies)
    except BadConfig as error:
        raise BadTrace(
            f"the log's replica cannot be made again: {error.message}",
            hint="replay it with the Penstock release that wrote it",
        ) from None
    notes = []
    found = profile_of(spec.executor)
    if profile and found is not None and found.digest not in profile.split("+"):
        notes.append(
            f"the profile {spec.executor.profile} has changed since: predictions may differ"
        )
    return ReplicaParts(
        config=ReplicaConfig(
            name=spec.name,
            num_blocks=made.num_blocks,
            block_size=spec.block_size,
            has_prefix_cache=spec.has_prefix_cache,
            store=spec.store,
            seed=spec.seed,
            swap=spec.swap,
            tells=spec.tells,
            pull_share=spec.pull_share,
        ),
        caps=made.caps,
        policies=policies,
        predictors=predictors_of_model(spec.executor, spec.model, spec.lengths),
        notes=tuple(notes),
        found=tuple((BlockHash(bytes.fromhex(name)), slot) for name, slot in made.found or ()),
    )


E = TypeVar("E", bound=Event)


class Foreseen(Iterator[E]):
    """Events, of which some may be looked up before their turn."""

    def __init__(self, events: Iterator[E]) -> None:
        self._events = events
        self._seen: deque[E] = deque()
        self._last: tuple[E | None, E | None] = None, None  # taken, and perhaps not fed yet

    def __next__(self) -> E:
        found = self._seen.popleft() if self._seen else next(self._events)
        self._last = self._last[1], found
        return found

    def steps_of(self, plan: PlanId) -> int | None:
        """How many steps the plan will have run; None when the log ends before it does."""
        for event in (*self._last, *self._seen):
            if isinstance(event, Completed) and event.plan == plan:
                return event.steps_run
        for event in self._events:
            self._seen.append(event)
            if isinstance(event, Completed) and event.plan == plan:
                return event.steps_run
        return None


async def _feed(events: Iterable[Event], parts: ReplicaParts, judge: Judge) -> None:
    executor = ReplayedExecutor(parts.caps, parts.found)
    replica = Replica(parts.config, executor, parts.policies, parts.predictors, log=judge)
    size = parts.config.block_size
    told = Foreseen(event for event in events if not isinstance(event, UNFED))
    executor.steps_of = told.steps_of
    following = next(told, None)
    coming: dict[int, Request] = {}  # by movement, until it is taken
    drafted: dict[int, int] = {}  # of the plan that is to complete next
    while following is not None:
        event, following = following, next(told, None)
        await _wait_until(event.at)
        judge.expected.append(event)
        if isinstance(event, Arrived):
            arrived = request_of(event, size)
            if isinstance(event.move, int):
                coming[event.move] = arrived
            else:
                replica.submit(arrived, every_token=False, state=resumed(event))
        elif isinstance(event, MOVES):
            replica.move(order_of(event, coming))
        elif isinstance(event, Cancelled):
            replica.cancel(event.request)
        elif isinstance(event, Drafted):
            drafted = {seq: count for seq, count, _ in event.guesses}
        elif isinstance(event, Completed):
            executor.complete(done_of(event, drafted))
            drafted = {}
        elif isinstance(event, Suspended):
            executor.complete(Yielded(PlanId(event.plan), event.at, event.activation_bytes))
        elif isinstance(event, Transferred):
            executor.complete(Moved(event.transfer, event.at))
        elif isinstance(event, FiledAway):
            executor.complete(Filed(event.filing, event.at, event.bad, event.error))
        elif isinstance(event, AdapterLoaded):
            executor.complete(Adapted(event.adapter, event.slot, event.at, event.error))
        elif isinstance(event, Stepped):
            # What the same turn, or the next of this instant, said further needs no input either.
            while isinstance(following, SAID) and following.at == event.at:
                judge.expected.append(following)
                following = next(told, None)
            await _catch_up(judge)
    judge.is_over = True
    await asyncio.sleep(0)


async def _catch_up(judge: Judge) -> None:
    """Let the replica's turns come, up to the last decision the log holds."""
    left, rounds = len(judge.expected), 0
    while judge.expected and rounds < PATIENCE:
        await asyncio.sleep(0)
        rounds = rounds + 1 if len(judge.expected) == left else 0
        left = len(judge.expected)
    if not judge.expected:
        return
    raise Diverged(judge.difference(judge.expected[0], None))


async def _wait_until(at: float) -> None:
    """Until the clock reads exactly `at`: a timer set for an instant, not for a delay, is not rounded."""
    loop = asyncio.get_running_loop()
    if at > loop.time():
        reached = loop.create_future()
        loop.call_at(at, reached.set_result, None)
        await reached


def replay_replica(events: Iterable[Event], parts: ReplicaParts, start_at: float = 0.0) -> Judge:
    """Replay one replica's events. Raises Diverged at the first that differs."""
    judge = Judge(parts.config.name)
    try:
        run(_feed(events, parts, judge), start_at=start_at)
    except AssertionError as error:
        recorded = judge.expected[0] if judge.expected else None
        raise Diverged(judge.difference(recorded, None, f"{error}")) from error
    return judge


def replay_log(path: Path | str, on_progress: OnProgress | None = None) -> list[Outcome]:
    """Replay every mechanism of one log file. Raises BadTrace when it cannot be replayed at all.

    `on_progress` hears now and then how many events of how many were fed.
    """
    reader = LogReader(path)
    header = reader.header()
    births = reader.births()
    notes = ("its last line was cut off",) if reader.is_truncated else ()
    if not births:
        raise BadTrace(
            f"the log {path} does not say how its mechanisms were made (no record of kind opened)"
        )
    watch = _Watch(Path(path), on_progress)
    return [_outcome(watch, reader, header, birth, notes) for birth in births]


class _Watch:
    """Counts the events that pass. Each belongs to one mechanism, so all pass once."""

    def __init__(self, path: Path, on_progress: OnProgress | None) -> None:
        self.path = path
        self._on_progress = on_progress
        self._done, self._total = 0, 0
        if on_progress is not None:
            with path.open("rb") as file:
                self._total = sum(1 for _ in file)

    def over(self, events: Iterable[Event]) -> Iterable[Event]:
        return events if self._on_progress is None else self._counted(events, self._on_progress)

    def _counted(self, events: Iterable[Event], on_progress: OnProgress) -> Iterator[Event]:
        for event in events:
            if self._done % TOLD_EVERY == 0:
                on_progress(self._done, self._total)
            self._done += 1
            yield event


def _outcome(
    watch: _Watch, reader: LogReader, header: Header, birth: Opened, notes: tuple[str, ...]
) -> Outcome:
    made, difference = made_of(birth), None
    judge = Judge(birth.who)
    try:
        events = watch.over(reader.of(birth.who))
        if isinstance(made, MadeReplica):
            parts = parts_of(made, header.profile)
            notes += parts.notes
            judge = replay_replica(events, parts, header.loop_at)
        else:
            judge = replay_fleet(events, birth.who, made)
    except Diverged as diverged:
        difference = diverged.difference
    return Outcome(
        path=str(watch.path),
        who=birth.who,
        what=birth.what,
        num_decisions=judge.num_decisions if difference is None else difference.number - 1,
        num_events=judge.num_events,
        difference=difference,
        notes=notes,
    )


def replay(path: Path | str) -> list[Outcome]:
    """Replay a log file, or every log of a folder."""
    return [outcome for each in log_paths(path) for outcome in replay_log(each)]
