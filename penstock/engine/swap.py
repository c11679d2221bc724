"""Slower memory behind the blocks of a replica: who has a copy there, and what is on the way.

    put    a job leaves the device: its own blocks are copied to host blocks and given back
    fetch  it is admitted again: it takes blocks and gets its copy back, and goes on where it stood

**Copies stay valid.** Keys and values are only ever appended, so a copy is right up to the position that was computed
when it was made: `upto`. It is kept while the job runs, and the next time it leaves only blocks behind `upto` move.
When host memory is short, copies of running jobs go first, those fetched longest ago before the others. A job for which
nothing is left keeps what copy it has and computes the rest again.

**What is shared stays.** Blocks at the beginning that other jobs hold as well are not copied: the copy begins behind
them (`first`). On the way back they are found by their names; if they are gone, the copy is of no use and all is
computed. What is still found on the device under its name is not fetched either.

**Runs.** Blocks next to each other in both memories are copied as one piece, if `group_blocks` > 1; both memories then
give out consecutive blocks where they can (engine.free_runs). With 1 each block is copied by itself.

**Waiting for a copy, or not.** `mode` "sync": the next plan begins when the copies have ended. "async": plans go on,
and who is fetched joins the running when its copy is there. "adaptive": out as async; in, the plan waits if the copies
take less than what the fetched jobs add to it is worth, and if nobody else is in it,

    seconds of the copies < step_s * tokens of the fetched / tokens of the whole step

Source: FastSwitch; the rule of "adaptive" is ours where the paper describes one in words only.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import chain, count
from typing import Literal, NamedTuple

from penstock.core.plans import Transfer
from penstock.core.types import HostLink, Job
from penstock.core.views import Lane, Singles
from penstock.engine.free_runs import FreeRuns
from penstock.engine.grouped import GroupedLedger, GroupedRadixLedger
from penstock.engine.host_copy import HostCopy
from penstock.engine.ledger import BlockLedger
from penstock.engine.lending_ledger import LendingLedger
from penstock.engine.radix import RadixLedger

Mode = Literal["sync", "async", "adaptive"]
Store = Literal["hash", "radix"]


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapConfig:
    """`host_blocks` 0 = no slower memory. `dispatch_s` and `gb_s` are what a modelled executor charges for copies.

    `keeps_copies`: copies stay valid while their jobs run. `threads` start copies side by side.
    """

    host_blocks: int = 0
    group_blocks: int = 60
    keeps_copies: bool = True
    mode: Mode = "adaptive"
    threads: int = 4
    dispatch_s: float = 8e-6
    gb_s: float = 25.0

    def __post_init__(self) -> None:
        if self.host_blocks < 0:
            raise ValueError(f"host_blocks must be 0 (none) or more, got {self.host_blocks}")
        for name in ("group_blocks", "threads"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} must be at least 1, got {getattr(self, name)}")
        if not self.dispatch_s >= 0 or not self.gb_s > 0:
            raise ValueError("dispatch_s must not be negative and gb_s must be positive")


class Under(NamedTuple):
    """A transfer under way."""

    transfer: Transfer
    job: Job
    copy: HostCopy


class Swap:
    """One per replica with host memory. Decides where copies go; the executor makes them."""

    def __init__(
        self,
        config: SwapConfig,
        ledger: BlockLedger,
        link: HostLink | None,
        numbers: Iterator[int] | None = None,
    ) -> None:
        """`numbers`: of transfers; others may draw from them too."""
        self.config = config
        self._ledger, self._link = ledger, link
        self._copies = ledger.copies
        self._host = FreeRuns(config.host_blocks, config.group_blocks)
        self._kept: dict[int, HostCopy] = {}  # of running jobs, those fetched longest ago first
        self._under: dict[int, Under] = {}
        self._leaving: dict[int, HostCopy] = {}  # dropped while something of them is under way
        self._numbers = count() if numbers is None else numbers

    @property
    def is_moving(self) -> bool:
        return bool(self._under)

    def copied(self) -> set[int]:
        """Device blocks that are being copied from or to."""
        return device_blocks([under.transfer for under in self._under.values()])

    # ------------------------------------------------------------------ out

    def put(self, job: Job) -> Transfer | None:
        """Copy what a job that leaves now has computed, as far as no copy of it is there. None: nothing has to move."""
        seq, size, ledger = job.seq, self._ledger.block_size, self._ledger
        copy = self._kept.pop(seq, None) or self._copies.get(seq)
        shared = num_shared(ledger, seq)
        if copy is not None and copy.first > shared:
            self._drop(seq)
            copy = None
        begin = shared if copy is None else copy.upto // size
        end = -(-job.computed // size)
        if begin >= end:
            return None
        if copy is None:
            copy = HostCopy(shared, shared * size)
        need = end - copy.first - len(copy.blocks)
        if need > 0 and not self._make_room(need):
            return None
        copy.blocks += self._host.take(seq, need, copy.blocks[-1] if copy.blocks else None)
        copy.upto = job.computed
        self._copies[seq] = copy
        return self._begin(job, copy, True, range(begin, end), self.config.mode == "sync")

    def _make_room(self, need: int) -> bool:
        for seq in [seq for seq, copy in self._kept.items() if not copy.num_moving]:
            if len(self._host) >= need:
                break
            self._drop(seq)
        return len(self._host) >= need

    # ------------------------------------------------------------------ in

    def num_to_fetch(self, job: Job) -> int:
        """Positions that its copy adds to what an admitted job has found on the device."""
        copy = self._copies.get(job.seq)
        if copy is None or job.computed < copy.first * self._ledger.block_size:
            return 0
        return max(0, copy.upto - job.computed)

    def waits(self, jobs: list[Job], num_tokens: int, step_s: float) -> bool:
        """Whether the plan waits for these to come back. `num_tokens`: of the whole step, theirs included."""
        if self.config.mode != "adaptive":
            return self.config.mode == "sync"
        others = num_tokens - len(jobs)
        if others < 1 or self._link is None:
            return others < 1
        blocks = sum([self.num_to_fetch(job) for job in jobs]) / self._ledger.block_size
        runs = blocks / self.config.group_blocks + len(jobs)
        copies_s = self._link.seconds(round(runs), round(blocks), self.config.threads)
        return copies_s < step_s * len(jobs) / num_tokens

    def fetch(self, job: Job, tokens: int, is_sync: bool) -> Transfer:
        """Take blocks for what is in the copy and not on the device; it counts as computed.

        And for the `tokens` that are to be computed next: whoever comes back can go on. If blocks were short by then,
        two jobs could make each other leave for ever.
        """
        seq, size = job.seq, self._ledger.block_size
        copy = self._copies[seq]
        begin, end = job.computed // size, -(-copy.upto // size)
        self._ledger.extend(job, copy.upto + tokens)
        job.num_recomputed -= max(0, min(job.furthest, copy.upto) - job.computed)
        job.computed = copy.upto
        self._kept[seq] = copy
        return self._begin(job, copy, False, range(begin, end), is_sync)

    def settle(self, job: Job) -> None:
        """An admitted job fetches nothing: what it found on the device is all it needs, or its copy is of no use."""
        copy = self._copies.get(job.seq)
        if copy is None:
            return
        if job.computed < copy.first * self._ledger.block_size:
            self._drop(job.seq)
        else:
            self._kept[job.seq] = copy

    # ------------------------------------------------------------------ on the way

    def _begin(
        self, job: Job, copy: HostCopy, is_out: bool, places: range, is_sync: bool
    ) -> Transfer:
        table, first = self._ledger.tables[job.seq], copy.first
        pairs = [(table[place], copy.blocks[place - first]) for place in places]
        transfer = Transfer(
            next(self._numbers),
            job.seq,
            is_out,
            joined(pairs)
            if self.config.group_blocks > 1
            else tuple([(*pair, 1) for pair in pairs]),
            is_sync,
            self.config.threads,
        )
        copy.num_moving += 1
        self._under[transfer.id] = Under(transfer, job, copy)
        return transfer

    def moved(self, number: int) -> Under:
        """A transfer has ended."""
        under = self._under.pop(number)
        transfer, job, copy = under
        copy.num_moving -= 1
        if copy.is_dropped:
            if not copy.num_moving:
                self._free(self._leaving, job.seq, copy)
        elif not transfer.is_out and not self.config.keeps_copies:
            self._drop(job.seq)
        return under

    def forget(self, seq: int) -> None:
        """The job has ended."""
        if seq in self._copies:
            self._drop(seq)

    def _drop(self, seq: int) -> None:
        copy = self._copies.pop(seq)
        self._kept.pop(seq, None)
        if copy.num_moving:
            copy.is_dropped = True
            assert seq not in self._leaving, "a job has two copies under way"
            self._leaving[seq] = copy
        else:
            self._free({}, seq, copy)

    def _free(self, among: dict[int, HostCopy], seq: int, copy: HostCopy) -> None:
        among.pop(seq, None)
        if seq not in self._copies:
            self._host.leave(seq)
        self._host += copy.blocks

    def check(self) -> None:
        """Every host block is in one copy or free, and copies cover what they say."""
        size = self._ledger.block_size
        copies = [*self._copies.values(), *self._leaving.values()]
        held = [block for copy in copies for block in copy.blocks]
        free = list(self._host)
        assert len(free) == len(self._host), "free host blocks are miscounted"
        assert sorted([*held, *free]) == list(range(self.config.host_blocks)), (
            "a host block is lost"
        )
        for copy in copies:
            assert copy.upto <= (copy.first + len(copy.blocks)) * size, (
                "a copy is shorter than it says"
            )
        for seq in self._kept:
            assert seq in self._copies, "a copy is kept of a job that has none"


def device_blocks(transfers: Iterable[Transfer]) -> set[int]:
    """Those that transfers touch."""
    runs = chain.from_iterable(transfer.runs for transfer in transfers)
    return {first + at for first, _, count in runs for at in range(count)}


def joined(pairs: list[tuple[int, int]]) -> tuple[tuple[int, int, int], ...]:
    """(device, host) blocks as runs that are consecutive in both."""
    runs: list[tuple[int, int, int]] = []
    for device, host in pairs:
        if runs:
            first, start, size = runs[-1]
            if device == first + size and host == start + size:
                runs[-1] = first, start, size + 1
                continue
        runs.append((device, host, 1))
    return tuple(runs)


def ledger_of(
    config: SwapConfig,
    num_blocks: int,
    block_size: int,
    has_prefix_cache: bool,
    store: Store = "hash",
    *,
    lends: bool = False,
) -> BlockLedger:
    """The ledger of a replica: blocks are given out in groups if they are to be moved in groups."""
    if lends:
        assert store == "hash" and not config.host_blocks, "lending goes with neither"
        return LendingLedger(num_blocks, block_size, has_prefix_cache=has_prefix_cache)
    if not config.host_blocks or config.group_blocks == 1:
        plain = RadixLedger if store == "radix" else BlockLedger
        return plain(num_blocks, block_size, has_prefix_cache=has_prefix_cache)
    grouped = GroupedRadixLedger if store == "radix" else GroupedLedger
    return grouped(
        num_blocks, block_size, has_prefix_cache=has_prefix_cache, group=config.group_blocks
    )


def without(lane: Lane, late: set[int]) -> Lane:
    """The lane without the chunks of some jobs, which have just been admitted."""
    chunks = lane.chunks
    if isinstance(chunks, Singles):
        left = tuple([one for one in chunks.others if one.job.seq not in late])
        return lane._replace(chunks=Singles(chunks.jobs, left))
    return lane._replace(chunks=tuple([one for one in chunks if one.job.seq not in late]))


def num_shared(ledger: BlockLedger, seq: int) -> int:
    """Blocks at the beginning of a job's table up to the last one that others hold as well."""
    num = shared = 0
    for run in ledger.runs(seq):
        num += len(run.blocks)
        if run.refs > 1:
            shared = num
    return shared
