"""Which replica takes this request? Asked by the fleet for each request and stage.

Law: the answer is a replica that is alive, not draining and of a fitting role (as overflow: one that writes answers),
or None (refuse for now). So are the alternates, each once; a move names two other replicas of the view, and the target
is such a one.

What a policy needs beside counts and reports it says as attributes of its class, and its fleet keeps it up (what nobody
needs costs nothing):

    needs_blocks   view.blocks: what replicas hold by hash (policy.block_index)
    needs_queued   view.queued: what the fleet has sent to a replica and has not heard of yet
    needs_cost     view.cost and view.token_s: predictions of what prompts and steps take
    needs_steady   reports that come all the while there is work, and not only when something happened
    needs_jobs     Report.jobs
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import repeat
from typing import Protocol

from penstock.core.records import Fact, Record
from penstock.core.types import Report, Role, Stage
from penstock.core.views import Behind, BlockFinder, Move, PhaseCost, RequestView, Rng
from penstock.policy.kept_loads import KeptLoads, Load, Number, loads_of
from penstock.policy.loads import NOTHING_SENT, Sent, pending_tokens, queue_s

ONE_OUTSTANDING = 1 << 32  # more than a replica can have jobs


def is_candidate(report: Report, stage: Stage) -> bool:
    """Whether the law allows this replica."""
    is_able = report.is_alive and not report.is_draining and not report.is_suspect
    return is_able and (report.role in ("any", stage) or takes(report.role, stage))


def takes(role: Role, stage: Stage) -> bool:
    """Whether replicas of that role take requests for the stage."""
    return role in ("any", stage) or (role == "encode-decode" and stage != "prefill")


@dataclass(slots=True)
class Columns:
    """The candidates by name, and the load of each: requests outstanding first, then the jobs it reported.

    Both in one number, so that the least loaded of hundreds are found in a few microseconds; see `load_of`.
    """

    names: list[str]
    loads: list[int]

    @classmethod
    def of(cls, candidates: Sequence[Report], outstanding: Mapping[str, int]) -> Columns:
        reports = sorted(candidates, key=lambda report: report.replica)
        return cls(
            [report.replica for report in reports],
            [load_of(outstanding.get(report.replica, 0), report) for report in reports],
        )


def load_of(outstanding: int, report: Report) -> int:
    """Compares as (outstanding, running + waiting)."""
    return outstanding * ONE_OUTSTANDING + report.num_running + report.num_waiting


class Queued(Record):
    """A request that was sent to a replica and not heard of: it waits there, or is being prefilled.

    `tokens`: of its prompt, to compute as it seemed when it was sent; `hit` more of them not. `sent_at`: of the fleet.
    """

    request: RequestView
    replica: str
    tokens: int
    hit: int
    sent_at: float


class View(Record):
    """`reports` may be stale; `outstanding` is the fleet's own count of requests sent and not yet ended.

    kept, kept_loads: what the fleet keeps up to date of all candidates, so that nobody has to look at every report
    sent: what was sent to each replica since the report that is shown; none where the fleet does not count
    blocks: what replicas hold; None where nobody wants to know
    cost: predictions; None where nobody can make any
    token_s: what a prompt token took on average, by these predictions, among the requests sent lately
    ages: seconds since each report came, where the fleet is to look ahead; else empty
    queued: by replica and request, the oldest first
    """

    now: float
    rng: Rng
    request: RequestView
    stage: Stage
    reports: Sequence[Report]
    outstanding: Mapping[str, int]
    kept: Columns | None = None
    kept_loads: KeptLoads | None = None
    sent: Mapping[str, Sent] = {}
    blocks: BlockFinder | None = None
    cost: PhaseCost | None = None
    token_s: float = 0.0
    ages: Mapping[str, float] = {}
    queued: Mapping[str, Mapping[str, Queued]] = {}
    found: Mapping[str, int] | None = None

    def candidates(self) -> list[Report]:
        """Replicas the law allows, in the order of the reports. Read-only."""
        if self.kept_loads is not None:
            return self.kept_loads.able
        stage = self.stage
        return [report for report in self.reports if is_candidate(report, stage)]

    def candidates_by_name(self) -> Mapping[str, Report]:
        """The same by name."""
        if self.kept_loads is not None:
            return self.kept_loads.by_name
        return {report.replica: report for report in self.candidates()}

    def columns(self) -> Columns:
        """Read-only, and valid during the call."""
        return self.kept or Columns.of(self.candidates(), self.outstanding)

    def names(self, reports: Sequence[Report]) -> list[str]:
        """Of each. Read-only."""
        kept = self.kept_loads
        if kept is not None and reports is kept.able:
            return kept.names
        return [report.replica for report in reports]

    def loads(self, load: Load[Number], reports: Sequence[Report]) -> list[Number]:
        """A load (policy.loads) of each. Read-only, and valid until the next call. See policy.kept_loads."""
        kept = self.kept_loads
        if kept is not None and reports is kept.able:
            return kept.of(load)
        return loads_of(load, reports, self.sent)

    def matched(self) -> Mapping[str, int]:
        """Blocks of the prompt's beginning that each replica holds; those that hold none are left out."""
        if self.found is None:
            size = self.reports[0].block_size if self.reports else 16
            hashes = () if self.blocks is None else self.request.prompt.blocks(size)
            self.found = self.blocks.match(hashes) if self.blocks is not None and hashes else {}
        return self.found

    def behind(self) -> Mapping[str, Behind]:
        """What lies in host memory and on disk behind those blocks; replicas where nothing does are left out."""
        if self.blocks is None or not self.blocks.has_tiers or not self.reports:
            return {}
        hashes = self.request.prompt.blocks(self.reports[0].block_size)
        return self.blocks.behind(hashes) if hashes else {}

    def held(self, reports: Sequence[Report]) -> list[int]:
        """`matched` of each."""
        return list(map(self.matched().get, self.names(reports), repeat(0)))

    def hit(self, report: Report) -> int:
        """Prompt tokens that this replica need not compute: of all of them it computes the last one."""
        found = self.matched().get(report.replica, 0) * report.block_size
        return min(found, self.request.prompt.num_tokens - 1)

    def hits(self, reports: Sequence[Report]) -> list[int]:
        """`hit` of each."""
        found = self.matched()
        if not found:
            return [0] * len(reports)
        most, size = self.request.prompt.num_tokens - 1, reports[0].block_size
        blocks = self.held(reports)
        if max(found.values()) * size <= most:
            return [num * size for num in blocks]
        return [min(num * size, most) for num in blocks]

    def queues_s(self, reports: Sequence[Report]) -> list[float]:
        """`queue_s` of each."""
        if self.ages or not self.token_s:
            return [self.queue_s(report) for report in reports]
        token_s = self.token_s
        return [token_s * tokens for tokens in self.pendings(reports)]

    def pendings(self, reports: Sequence[Report]) -> list[int]:
        """`pending` of each. Read-only, and valid until the next call."""
        return self.loads(pending_tokens, reports)

    def prefills_s(self, hits: Sequence[int]) -> list[float]:
        """What this prompt takes where so many of its tokens are held; 0 where nobody can predict."""
        if self.cost is None:
            return [0.0] * len(hits)
        predict, num = self.cost.prefill_s, self.request.prompt.num_tokens
        by_hit = {hit: predict(num - hit, hit) for hit in set(hits)}
        return list(map(by_hit.__getitem__, hits))

    def pending(self, report: Report) -> int:
        """Prompt tokens that this replica has to compute before it comes to this request."""
        return pending_tokens(report, self.sent.get(report.replica, NOTHING_SENT))

    def queue_s(self, report: Report) -> float:
        """The same in seconds."""
        name = report.replica
        sent = self.sent.get(name, NOTHING_SENT)
        return queue_s(report, sent, self.token_s, elapsed_s=self.ages.get(name, 0.0))


class Decision(Fact, frozen=True):
    """`alternates`: who is asked next, in order, when the replica turns the request away.

    `moves`: other requests that should change their place now. `again_s`: nobody can take it now, and the fleet asks
    once more, of all replicas, after so many seconds, or for the one that waits longest as soon as a request ended.
    `is_overflow`: it may be a replica of role "decode", for prompt and answer.
    """

    replica: str | None
    why: str = ""
    alternates: tuple[str, ...] = ()
    moves: tuple[Move, ...] = ()
    again_s: float | None = None
    is_overflow: bool = False


def law(view: View, decision: Decision) -> None:
    allowed = {report.replica for report in view.candidates()}
    if decision.is_overflow:
        allowed |= {each.replica for each in view.reports if is_candidate(each, "decode")}
    assert decision.replica is None or decision.replica in allowed, (
        f"{decision.replica} cannot take it"
    )
    others = decision.alternates
    assert allowed.issuperset(others), f"one of {others} cannot take it"
    assert len({*others, decision.replica}) == len(others) + 1, "an alternate is named twice"
    known = {report.replica for report in view.reports}
    for move in decision.moves:
        assert move.source in known and move.source != move.target, f"{move} from nowhere"
        assert move.target in allowed, f"{move.target} cannot take {move.request}"
    if decision.again_s is not None:
        assert decision.replica is None and decision.again_s > 0, "asked again, and sent"


def after(last: str | None, names: Sequence[str]) -> str:
    """Whose turn it is after `last`: the next of the sorted names, then from the start."""
    place = 0 if last is None else bisect_right(names, last)
    return names[place] if place < len(names) else names[0]


class Policy(Protocol):
    def decide(self, view: View) -> Decision: ...
