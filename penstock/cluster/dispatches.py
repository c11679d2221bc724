"""What was sent to each replica and its report does not know of yet, so that a load read from a report is never old.

    load of a replica = what its last report says + the sums over what was sent since

Each request sent to a replica gets the next number of that replica; the replica says in its reports how far it has come
(Report.absorbed), and what it has counted is dropped here. So both ends agree whatever is on its way, and the sum is
what the replica would say if reports took no time. A replica that echoes no numbers (a foreign server) is trusted after
the first token of a request, or after three reports. What ended, was refused or was lost is dropped at once.

Whose sums have changed is in `changed`, until somebody takes it out (policy.kept_loads).

The same entries, kept until the first token, are the queue of a replica as its fleet sees it (`queued`), for policies
that choose among requests that wait.
"""

from __future__ import annotations

from penstock.core.records import Record
from penstock.core.types import Report, Request
from penstock.policy.loads import Sent
from penstock.policy.route import Queued

REPORTS_TRUSTED = 3  # of a replica without numbers, after which what was sent before is in them


class Entry(Record):
    """One request sent to a replica. `num_reports` came since."""

    seq: int
    num: int
    tokens: int
    blocks: int
    num_reports: int = 0


class Dispatches:
    """`counts`: whether `sent` is kept; `keeps_queue`: whether `queued` is."""

    def __init__(self, *, counts: bool = True, keeps_queue: bool = False) -> None:
        self._counts, self._keeps_queue = counts, keeps_queue
        self._seqs: dict[str, int] = {}
        self._entries: dict[str, dict[str, Entry]] = {}  # by replica and request, in order
        self.queued: dict[str, dict[str, Queued]] = {}  # by replica and request, in order
        self._is_silent: set[str] = set()  # replicas that echo no numbers
        self.sent: dict[str, Sent] = {}
        self.changed: set[str] = set()

    def last_seq(self, replica: str) -> int:
        """The number of the last request that was sent there."""
        return self._seqs.get(replica, 0)

    def send(self, now: float, request: Request, report: Report, hit: int) -> None:
        """A request goes to the replica of `report`, which seems to hold `hit` tokens of its prompt."""
        name = report.replica
        seq = self._seqs[name] = self._seqs.get(name, 0) + 1
        tokens = request.prompt.num_tokens - hit
        if self._keeps_queue:
            queued = Queued(request, name, tokens, hit, now)
            self.queued.setdefault(name, {})[request.id] = queued
        if not self._counts:
            return
        entry = Entry(
            seq, request.n, tokens, request.n * -(-request.prompt.num_tokens // report.block_size)
        )
        self._entries.setdefault(name, {})[request.id] = entry
        sent = self.sent.get(name)
        if sent is None:
            sent = self.sent[name] = Sent()
        self.changed.add(name)
        sent.num += entry.num
        sent.tokens += entry.tokens
        sent.blocks += entry.blocks

    def hear(self, report: Report) -> None:
        """Drop what this report has counted."""
        name, absorbed = report.replica, report.absorbed
        if absorbed is None:
            self._is_silent.add(name)
        entries = self._entries.get(name)
        if not entries:
            return
        known = []
        for request, entry in entries.items():
            if absorbed is None:
                entry.num_reports += 1
                if entry.num_reports < REPORTS_TRUSTED:
                    continue
            elif entry.seq > absorbed:
                break
            known.append(request)
        for request in known:
            self._drop(name, request)

    def forget(self, replica: str) -> None:
        """It left the fleet, with nothing under way. Its numbers go on should another of its name come."""
        for table in (self._entries, self.queued, self.sent):
            table.pop(replica, None)
        self._is_silent.discard(replica)
        self.changed.discard(replica)

    def wants_begin(self, replica: str) -> bool:
        """Whether the first token of a request there is news."""
        return self._keeps_queue or (self._counts and replica in self._is_silent)

    def begin(self, request: str, replica: str) -> None:
        """Its first token came."""
        if self._keeps_queue:
            self.queued.get(replica, {}).pop(request, None)
        if replica in self._is_silent:
            self._drop(replica, request)

    def end(self, request: str, replica: str) -> None:
        """It ended there, was refused, was lost or left."""
        if self._keeps_queue:
            self.queued.get(replica, {}).pop(request, None)
        self._drop(replica, request)

    def moved(self, request: str, source: str, target: str) -> None:
        """It is at another replica now, whose next report counts it."""
        self._drop(source, request)
        left = self.queued.get(source, {}).pop(request, None)
        if left is not None:
            left.replica = target
            self.queued.setdefault(target, {})[request] = left

    def _drop(self, replica: str, request: str) -> None:
        entries = self._entries.get(replica)
        entry = None if entries is None else entries.pop(request, None)
        if entry is not None:
            sent = self.sent[replica]
            self.changed.add(replica)
            sent.num -= entry.num
            sent.tokens -= entry.tokens
            sent.blocks -= entry.blocks
