"""Replicas whose memory is full before their batch is large have others keep a part of their longest context.

Source: Infinite-LLM / DistAttention (arXiv:2401.02669, v1 and v2, known from what others wrote of them; no code).

Idea: the throughput of a replica is modelled as that of its decode steps,

    batch / T(batch, tokens),    T = f(batch) + g(tokens it attends over, for its own and for others)

with f flat while a batch is small. A **debtor** has requests that wait for memory and a batch below `small` of the one
from which f grows in proportion; a **creditor** has used less than `full` of its memory and nobody waits there. Each
round takes the debtors by their batch, the smallest first, of each the request with most blocks at home, and for it the
creditors by free memory. Of all numbers of blocks, in steps of `unit_tokens`, the one is lent that adds most to the
throughput of both: the debtor gains those who wait, the creditor attends over more. It is lent if that is more than
`gain`. What replicas do with a loan is theirs (engine.loans), and so is saying no: a loan that was refused may be asked
for again in the next round, as it was never counted.

Where replicas owe each other, in a circle of whatever length, as many blocks of each debt as the smallest of them has
come home, as far as there is room (v1's cancelling of debts). What they get back makes room for the next ones in the
next round. What others must keep of a request that is longer than a memory stays there, even where two such requests
keep replicas in each other's debt: some block of each would be away whatever came home, so each would make its round
trips as before, and each replica would attend over as much as before.

Parameters: `every_s` (heartbeat, 100 ms), `unit_tokens` (an rBlock, 512), `small` (0.5), `full` (0.6), `gain` (3 %),
`hop_s`: what the first block that is away adds to the debtor's steps, one round trip a layer.

Where we differ: a creditor lends only up to `full` of its memory. A loan that would close a circle of debts is not
made. Which batch is saturated is read off the cost model: twice as many jobs take half as long again.

Does not: find room for a request that is longer than a replica's memory (cluster.lendings does, before it is sent), or
move requests (move "llumnix" does, which costs a copy and no round trips, where they fit elsewhere).
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

from msgspec import UNSET, Struct

from penstock.core.types import JobReport, Report, RequestId
from penstock.core.views import PhaseCost
from penstock.policy.loads import LENDERS_KEEP, away_of, saturated, used_blocks
from penstock.policy.move import Decision, Loan, View


class _Replica(Struct):
    """One as the round has it by now. `lendable`: blocks."""

    report: Report
    batch: int
    tokens: int
    lendable: int

    def rate(self, cost: PhaseCost, jobs: int, tokens: int, extra_s: float = 0.0) -> float:
        """Tokens a second with so many more of each."""
        batch, attended = self.batch + jobs, max(0, self.tokens + tokens)
        seconds = cost.decode_s(batch, attended) + extra_s
        return batch / seconds if seconds > 0 else 0.0


@dataclass(slots=True)
class InfiniteLlm:
    every_s: float = 0.1
    unit_tokens: int = 512
    small: float = 0.5
    full: float = 0.6
    gain: float = 0.03
    hop_s: float = 0.0

    needs_jobs: ClassVar[bool] = True
    needs_cost: ClassVar[bool] = True
    needs_steady: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not self.every_s > 0:
            raise ValueError(f"every_s must be a positive number of seconds, got {self.every_s}")
        if self.unit_tokens < 1:
            raise ValueError(f"unit_tokens must be at least 1, got {self.unit_tokens}")
        if not (0 < self.small <= 1 and 0 < self.full <= 1):
            raise ValueError("small and full must be shares above 0 and at most 1")
        if not (self.gain >= 0 and self.hop_s >= 0):
            raise ValueError("gain and hop_s must be at least 0")

    def decide(self, view: View) -> Decision:
        cost = view.cost
        if cost is None or view.experts is not None:
            return Decision()
        able = [each for each in view.reports if each.is_alive and each.lent_blocks is not UNSET]
        recalls = cancelled(able, view.lent) if view.lent else ()
        loans, told = self._loans(able, view, cost)
        if recalls:
            circle = ", ".join(f"{each.debtor} of {each.creditor}" for each in recalls)
            told = "; ".join([*filter(None, (told,)), f"debts in a circle come home: {circle}"])
        return Decision(loans=loans, recalls=recalls, why=told) if told else Decision()

    def _loans(
        self, able: Sequence[Report], view: View, cost: PhaseCost
    ) -> tuple[tuple[Loan, ...], str]:
        """And why."""
        if not any([_is_short(report) for report in able]):
            return (), ""
        replicas = {report.replica: self._replica(report) for report in able}
        most = self.small * saturated(cost)
        debtors = [each for each in replicas.values() if _is_short(each.report)]
        debtors = [each for each in debtors if each.batch < most]
        debtors.sort(key=lambda each: (each.batch, each.report.replica))
        owes = debts_of(able, view.lent)
        loans: list[Loan] = []
        for debtor in debtors:
            job = _longest(debtor.report, view)
            if job is not None:
                loans += self._loans_of(debtor, job, replicas, owes, view, cost)
        if not loans:
            return (), ""
        told = ", ".join(f"{each.debtor} {replicas[each.debtor].batch}" for each in loans)
        return tuple(loans), f"batch of {told} is small and memory full"

    def _replica(self, report: Report) -> _Replica:
        lent, away = (
            0 if count is UNSET else count for count in (report.lent_blocks, report.away_blocks)
        )
        total, is_up = report.total_blocks, not (report.is_draining or report.is_suspect is True)
        lendable = min(
            int(self.full * total) - used_blocks(report),
            _spare(report),
        )
        return _Replica(
            report,
            report.num_decoding,
            report.decode_tokens + (lent - away) * report.block_size,
            lendable if is_up and not report.num_waiting else 0,
        )

    def _loans_of(
        self,
        debtor: _Replica,
        job: JobReport,
        replicas: Mapping[str, _Replica],
        owes: dict[str, set[str]],
        view: View,
        cost: PhaseCost,
    ) -> list[Loan]:
        """What of one job goes where."""
        name, loans = debtor.report.replica, []
        unit = max(1, self.unit_tokens // debtor.report.block_size)
        left = job.num_blocks - sum([count for _, count in view.lent.get(job.request, ())])
        hop_s = 0.0 if job.request in view.lent else self.hop_s
        for creditor in sorted(
            replicas.values(), key=lambda each: (-each.report.free_blocks, each.report.replica)
        ):
            other = creditor.report.replica
            if other == name or _reaches(owes, other, name):
                continue
            room = min(left - unit, creditor.lendable)
            best = max(
                range(unit, room + 1, unit),
                key=lambda count: (_gain(debtor, creditor, count, hop_s, cost), -count),
                default=0,
            )
            if not best or _gain(debtor, creditor, best, hop_s, cost) <= self.gain:
                continue
            loans.append(Loan(RequestId(job.request), name, other, best))
            _adopt(debtor, creditor, best)
            left, hop_s = left - best, 0.0
            owes.setdefault(name, set()).add(other)
        return loans


def debts_of(
    reports: Sequence[Report], lent: Mapping[str, Sequence[tuple[str, int]]]
) -> dict[str, set[str]]:
    """By replica, those that keep blocks of its requests."""
    owes: dict[str, set[str]] = {}
    for report in reports:
        for job in () if report.jobs is UNSET else report.jobs:
            for creditor, _ in lent.get(job.request, ()):
                owes.setdefault(report.replica, set()).add(creditor)
    return owes


def cancelled(
    reports: Sequence[Report], lent: Mapping[str, Sequence[tuple[str, int]]]
) -> tuple[Loan, ...]:
    """What comes home of the debts of one circle: of each as many blocks as the least has, and as there is room for."""
    told: dict[tuple[str, str], list[tuple[int, str]]] = {}  # by debtor and creditor
    for report in reports:
        for job in () if report.jobs is UNSET else report.jobs:
            may = _may_come_home(job, report, lent.get(job.request, ()))
            for creditor, count in lent.get(job.request, ()) if may > 0 else ():
                told.setdefault((report.replica, creditor), []).append(
                    (min(count, may), job.request)
                )
    owes: dict[str, set[str]] = {}
    for debtor, creditor in told:
        owes.setdefault(debtor, set()).add(creditor)
    circle = _circle(owes)
    pairs = list(zip(circle, [*circle[1:], *circle[:1]], strict=True))
    least = min([sum([count for count, _ in told[pair]]) for pair in pairs], default=0)
    rooms = {each.replica: 0 if each.num_waiting else _spare(each) for each in reports}
    found = []
    for debtor, creditor in pairs:
        count, request = max(told[debtor, creditor])
        num = min(count, least, rooms[debtor])
        if num > 0:
            found.append(Loan(RequestId(request), debtor, creditor, num))
    return tuple(found)


def _may_come_home(job: JobReport, report: Report, loans: Sequence[tuple[str, int]]) -> int:
    """Of the blocks that others keep of it, those that they need not."""
    blocks = -(-(job.num_prompt + job.max_tokens) // report.block_size)
    return sum([count for _, count in loans]) - away_of(blocks, report.total_blocks)


def _circle(owes: Mapping[str, set[str]]) -> list[str]:
    """Replicas of which each owes the next, and the last the first; the first such there is, or none."""
    for first in sorted(owes):
        ways = [[first]]
        for way in ways:  # breadth first: the shortest through this one
            for creditor in sorted(owes.get(way[-1], ())):
                if creditor == first:
                    return way
                if creditor not in way and creditor > first:  # those before it have had their turn
                    ways.append([*way, creditor])
    return []


def _spare(report: Report) -> int:
    """Blocks that it need not keep for what runs there."""
    return report.free_blocks - report.total_blocks // LENDERS_KEEP - 2 * report.num_running - 1


def _reaches(owes: Mapping[str, set[str]], first: str, last: str) -> bool:
    """Whether `first` owes `last` something, over others if need be."""
    seen, ahead = {first}, [first]
    while ahead:
        for creditor in owes.get(ahead.pop(), ()):
            if creditor == last:
                return True
            if creditor not in seen:
                seen.add(creditor)
                ahead.append(creditor)
    return False


def _is_short(report: Report) -> bool:
    return not report.is_draining and report.num_waiting > 0 < report.num_running and (
        report.head_blocks > report.free_blocks - report.total_blocks // 50
    )  # fmt: skip


def _longest(report: Report, view: View) -> JobReport | None:
    """The running job with most blocks. While a loan is not used up, no other is made there."""
    jobs = () if report.jobs is UNSET else report.jobs
    lent = {job.request: view.lent.get(job.request, ()) for job in jobs}
    away = 0 if report.away_blocks is UNSET else report.away_blocks
    if sum([count for each in lent.values() for _, count in each]) > away:
        jobs = tuple([job for job in jobs if not lent[job.request]])
    able = [job for job in jobs if job.status == "running" and job.request not in view.moving]
    return max(able, key=lambda job: (job.num_blocks, job.request), default=None)


def _joining(debtor: _Replica, count: int) -> int:
    """How many of those who wait find room in so many more blocks, at their mean size."""
    report = debtor.report
    each = max(1, report.waiting_blocks // max(1, report.num_waiting))
    return min(report.num_waiting, (report.free_blocks + count) // each)


def _gain(debtor: _Replica, creditor: _Replica, count: int, hop_s: float, cost: PhaseCost) -> float:
    """By how much the two make more tokens a second together, as a share."""
    report = debtor.report
    joining, size = _joining(debtor, count), report.block_size
    joined = joining * max(1, report.waiting_blocks // max(1, report.num_waiting)) * size
    before = debtor.rate(cost, 0, 0) + creditor.rate(cost, 0, 0)
    after = debtor.rate(cost, joining, joined - count * size, hop_s)
    after += creditor.rate(cost, 0, count * size)
    return after / before - 1.0 if before > 0 else 0.0


def _adopt(debtor: _Replica, creditor: _Replica, count: int) -> None:
    """The round goes on as if it had happened; reports will say what did."""
    size = debtor.report.block_size
    debtor.batch += _joining(debtor, count)
    debtor.tokens = max(0, debtor.tokens - count * size)
    creditor.tokens += count * size
    creditor.lendable -= count
