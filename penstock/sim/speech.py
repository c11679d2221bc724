"""A modelled executor that says tokens which can be checked, computed from a modelled memory of keys and values.

It wraps an executor that only counts (and so takes the times from it). Every block has a slot for each position, and a
slot holds one number, which plays the part of keys and values:

    kv[p]      = mix(token[p], p, kv[0] + ... + kv[p-1])        attention reads all that came before
    token[p+1] = kv[p] mod VOCABULARY                           greedy: nothing is drawn

The sum is read from the slots of the job's own block table, so an answer is right only if every block that the job was
given holds what belongs there: blocks that were mixed up, shared too early, given away too soon, or copied badly change
the tokens, and reading a slot that nobody wrote is an error at once. `said` computes the same without any memory: the
answer of a run in which nothing went wrong.

A job that goes on here brings what was said of it (`Opening.state`), and its blocks through a `SpeechTransport`, which
copies slots of one speaker to another at the instant a modelled copy ends: a block that its old replica gave away too
early brings something else by then.

A step that is to fail (`fail_next`) writes nothing; it may be the next one that computes more than one position of a
job, since others could already count on what it writes. One that stands still (`stand_still`) says so when it goes on.
"""

from __future__ import annotations

import asyncio
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import cast

from penstock.core.clock import now, sleep_until
from penstock.core.errors import ReplicaLost
from penstock.core.moving import KvCard
from penstock.core.plans import (
    Adapted,
    Done,
    Filed,
    Filing,
    Moved,
    Opening,
    Plan,
    Sampled,
    Transfer,
    Work,
    Yielded,
)
from penstock.core.ports import Completion, Executor, FilingExecutor, Grain, Runs, Transport
from penstock.core.prompt import TokenPrompt
from penstock.core.types import BlockHash, Caps, PlanId
from penstock.sim.transport import Fabric

VOCABULARY = 50_000
MASK = (1 << 61) - 1
Slots = list[list[int | None]]


def mix(token: int, position: int, before: int) -> int:
    """Keys and values of one position."""
    told = (token * 0x9E3779B97F4A7C15 + position * 0xC2B2AE3D27D4EB4F + before) & MASK
    told ^= told >> 29
    told = (told * 0xBF58476D1CE4E5B9) & MASK
    return told ^ (told >> 32)


def said(prompt: Sequence[int], count: int) -> tuple[int, ...]:
    """The first `count` tokens that follow a prompt."""
    total, token = 0, 0
    for place, token in enumerate(prompt):
        token = mix(token, place, total)
        total += token
    answer = [token % VOCABULARY]
    while len(answer) < count:
        token = mix(answer[-1], len(prompt) + len(answer) - 1, total)
        total += token
        answer.append(token % VOCABULARY)
    return tuple(answer[:count])


def _empty(num_blocks: int, size: int) -> Slots:
    return [[None] * size for _ in range(num_blocks)]


class Unwritten(AssertionError):
    """Keys and values were read that nobody has written."""


@dataclass(slots=True)
class _Job:
    """`tokens`: those of the prompt, then what was said. `hashes`: of blocks that are full."""

    prompt: TokenPrompt
    tokens: list[int]
    hashes: list[BlockHash]
    blocks: list[int] = field(default_factory=list)


class Speaker:
    """An executor around another one; see the module's text. Implements core.ports.FilingExecutor."""

    def __init__(
        self,
        inner: Executor,
        *,
        num_blocks: int,
        block_size: int,
        host_blocks: int = 0,
        disk_blocks: int = 0,
    ) -> None:
        self.slots = _empty(num_blocks, block_size)
        self.host, self.disk = _empty(host_blocks, block_size), _empty(disk_blocks, block_size)
        self.spoilt: set[int] = set()  # slots of the disk that do not hold what was written
        self._filings: dict[int, Filing] = {}
        self._inner, self._size = inner, block_size
        self._caps = replace(inner.caps, max_repeat=1, has_layer_ranges=False, yield_grain="step")
        self._tell: Callable[[Completion], None] | None = None
        self._jobs: dict[int, _Job] = {}
        self._plans: dict[PlanId, Plan] = {}
        self._transfers: dict[int, Transfer] = {}
        self._failure: str | None = None
        self._failing_from = 1  # positions of one job
        self._fails_whole = True
        self._still_until = 0.0
        self._held: list[Completion] = []
        self._timer: asyncio.TimerHandle | None = None

    @property
    def caps(self) -> Caps:
        return self._caps

    @property
    def kv_block_bytes(self) -> int:
        return cast(FilingExecutor, self._inner).kv_block_bytes

    @property
    def is_clear(self) -> bool:
        """Whether nothing of any job is left but what blocks hold."""
        under_way = self._transfers or self._filings
        return not (self._jobs or self._plans or under_way or self._held)

    def block(self, number: int) -> list[int | None]:
        """The slots of a block of the device, or of host memory behind it."""
        size = len(self.slots)
        return self.slots[number] if number < size else self.host[number - size]

    def listen(self, on_completion: Callable[[Completion], None]) -> None:
        self._tell = on_completion
        self._inner.listen(self._hear)

    # ---------------------------------------------------------------- what goes wrong

    def fail_next(self, why: str, *, positions: int = 1, is_whole: bool = True) -> None:
        """The next step that completes has failed, or that job of it, if it computes so many positions of one job."""
        self._failure, self._failing_from, self._fails_whole = why, positions, is_whole

    def stand_still(self, until: float) -> None:
        """Whatever completes before that instant is told then."""
        self._still_until = max(self._still_until, until)
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        self._arm()

    # ---------------------------------------------------------------- core.ports.Executor

    def launch(self, plan: Plan, repeat: int = 1) -> PlanId:
        assert repeat == 1, "what is said next decides how a step goes on"
        self._forget(plan.closed)
        for opening in plan.opened:
            self._open(opening)
        for work in plan.work:
            job = self._jobs[work.seq]
            if work.is_fresh:
                job.blocks = list(work.blocks)
            else:
                job.blocks += work.blocks
        self._plans[plan.id] = plan
        return self._inner.launch(plan, 1)

    def interrupt(self, plan: PlanId, grain: Grain = "step") -> int | None:
        return self._inner.interrupt(plan, grain)

    def resume(self, plan: PlanId) -> None:
        self._inner.resume(plan)

    def abort(self, plan: PlanId) -> None:
        self._plans.pop(plan, None)
        self._held = [one for one in self._held if getattr(one, "plan", None) != plan]
        self._inner.abort(plan)

    def close_jobs(self, seqs: Sequence[int]) -> None:
        self._forget(seqs)
        self._inner.close_jobs(seqs)

    def take_out(self, seq: int, num_output: int) -> tuple[tuple[int, ...], int | None]:
        job = self._jobs.get(seq)
        assert job is not None or not num_output, f"job {seq} has said something to nobody"
        if job is None:
            return (), None
        return tuple(job.tokens[job.prompt.num_tokens :][:num_output]), None

    def transfer(self, transfer: Transfer) -> None:
        self._transfers[transfer.id] = transfer
        cast(FilingExecutor, self._inner).transfer(transfer)

    @property
    def found(self) -> Sequence[tuple[BlockHash, int]]:
        return cast(FilingExecutor, self._inner).found

    def file(self, filing: Filing) -> None:
        self._filings[filing.id] = filing
        cast(FilingExecutor, self._inner).file(filing)

    async def stop(self) -> None:
        if self._timer is not None:
            self._timer.cancel()
            self._timer = None
        for each in (self._jobs, self._plans, self._transfers, self._filings, self._held):
            each.clear()
        await self._inner.stop()

    # ---------------------------------------------------------------- inside

    def _open(self, opening: Opening) -> None:
        prompt = opening.request.prompt
        assert isinstance(prompt, TokenPrompt), "a prompt without tokens has no answer to check"
        assert opening.seq not in self._jobs, f"job {opening.seq} is opened twice"
        hashes, tokens = list(prompt.blocks(self._size)), list(prompt.ids)
        if opening.state is not None:
            hashes += opening.state.filled
            tokens += opening.state.output_ids
        self._jobs[opening.seq] = _Job(prompt, tokens, hashes)

    def _forget(self, seqs: Sequence[int]) -> None:
        for seq in seqs:
            self._jobs.pop(seq, None)

    def _hear(self, completion: Completion) -> None:
        if self._held or now() < self._still_until:
            self._held.append(completion)
            self._arm()
            return
        assert self._tell is not None, "nobody listens"
        self._tell(self._told(completion))

    def _arm(self) -> None:
        if self._timer is None and self._held:
            loop = asyncio.get_running_loop()
            self._timer = loop.call_at(self._still_until, self._go_on)

    def _go_on(self) -> None:
        self._timer = None
        held, self._held = self._held, []
        assert self._tell is not None, "nobody listens"
        for completion in held:
            self._tell(self._told(completion))

    def _told(self, completion: Completion) -> Completion:
        if isinstance(completion, Moved):
            self._copy(self._transfers.pop(completion.transfer))
            return completion
        if isinstance(completion, Filed):
            return self._filed(completion)
        if isinstance(completion, Yielded | Adapted):
            return completion
        plan = self._plans.pop(completion.plan)
        stops = {one.seq: one.is_stop for one in completion.outputs}
        failing = self._failing(plan)
        if failing is not None and self._fails_whole:
            return Done(plan.id, 1, (), completion.ends, error=self._fail())
        found = [self._one(work, stops, failing) for work in plan.work]
        outputs = tuple([one for one in found if one is not None])
        return Done(plan.id, completion.steps_run, outputs, completion.ends)

    def _failing(self, plan: Plan) -> int | None:
        """The job of a plan that fails."""
        if self._failure is None:
            return None
        able = [work.seq for work in plan.work if work.tokens >= self._failing_from]
        return able[0] if able else None

    def _fail(self) -> str:
        failure, self._failure = self._failure, None
        assert failure is not None
        return failure

    def _one(self, work: Work, stops: dict[int, bool], failing: int | None) -> Sampled | None:
        """What a job gets. Who reads what the failing one should have written says something; nobody may hear it."""
        if failing is None:
            return self._run(work, stops)
        if work.seq == failing:
            return Sampled(work.seq, 0, error=self._fail())
        try:
            return self._run(work, stops)
        except Unwritten:
            return Sampled(work.seq, 1, (0,), stops[work.seq]) if work.samples else None

    def _run(self, work: Work, stops: dict[int, bool]) -> Sampled | None:
        """Compute the positions of one chunk and write what they leave behind."""
        job, size, slots = self._jobs[work.seq], self._size, self.slots
        blocks, tokens = job.blocks, job.tokens
        total = self._read(job, work.start)
        for place in range(work.start, work.start + work.tokens):
            kept = mix(tokens[place], place, total)
            slots[blocks[place // size]][place % size] = kept
            total += kept
        if not work.samples:
            return None
        end = work.start + work.tokens
        assert end == len(tokens), f"job {work.seq} samples at {end} and knows {len(tokens)} tokens"
        tokens.append(kept % VOCABULARY)
        fresh = tuple(job.prompt.extend(job.hashes, tokens[:end], size))
        job.hashes += fresh
        return Sampled(work.seq, 1, (tokens[-1],), stops[work.seq], fresh)

    def _read(self, job: _Job, upto: int) -> int:
        """The sum over all positions before; whoever finds a hole was given a block too early."""
        size, slots = self._size, self.slots
        full, rest = divmod(upto, size)
        read: list[int | None] = []
        for block in job.blocks[:full]:
            read += slots[block]
        if rest:
            read += slots[job.blocks[full]][:rest]
        try:
            return sum(read)  # type: ignore[arg-type]
        except TypeError:
            hole = read.index(None)
            raise Unwritten(f"position {hole} of {upto} was read and never written") from None

    def _copy(self, transfer: Transfer) -> None:
        for device, host, count in transfer.runs:
            for place in range(count):
                here, there = self.slots[device + place], self.host[host + place]
                if transfer.is_out:
                    there[:] = here
                else:
                    here[:] = there

    def _filed(self, told: Filed) -> Filed:
        filing, bad = self._filings.pop(told.filing), []
        for place, (host, slot) in enumerate(filing.pairs):
            if filing.is_out:
                self.disk[slot][:] = self.host[host]
                self.spoilt.discard(slot)
            elif slot in self.spoilt:
                bad.append(place)
            else:
                self.host[host][:] = self.disk[slot]
        return Filed(told.filing, told.at, tuple(bad), told.error)


@dataclass(slots=True)
class SpeechFabric:
    """What copies take, who is at which address, and which requests have moved, or tried to."""

    wires: Fabric
    speakers: dict[str, Speaker] = field(default_factory=dict)
    moved: set[str] = field(default_factory=set)


class SpeechTransport:
    """A core.ports.Transport around a modelled one.

    Until `broken_until` copies fail, in the middle of what they copy; until `hung_until` they do not end. Until
    `spoilt_until` checksums are those of something else.
    """

    def __init__(self, inner: Transport, speaker: Speaker, fabric: SpeechFabric) -> None:
        self._inner, self._speaker, self._speakers = inner, speaker, fabric.speakers
        self.broken_until = self.hung_until = self.spoilt_until = -math.inf
        self._speakers[inner.card.address] = speaker

    @property
    def card(self) -> KvCard:
        return self._inner.card

    @property
    def behind(self) -> int | None:
        return len(self._speaker.slots)

    async def sums(self, blocks: Sequence[int]) -> tuple[int, ...]:
        found = tuple([hash(tuple(self._speaker.block(each))) for each in blocks])
        return tuple([one + 1 for one in found]) if now() < self.spoilt_until else found

    async def pull(self, address: str, runs: Runs) -> None:
        peer = self._speakers.get(address)
        await self._inner.pull(address, runs)
        await sleep_until(self.hung_until)
        if peer is None or self._speakers.get(address) is not peer:
            raise ReplicaLost(f"{address} has gone while it was read")
        is_broken = now() < self.broken_until
        for there, here, count in runs[: len(runs) // 2] if is_broken else runs:
            for place in range(count):
                self._speaker.slots[here + place][:] = peer.block(there + place)
        if is_broken:
            raise ReplicaLost(f"the connection to {address} was lost")

    async def close(self) -> None:
        if self._speakers.get(self.card.address) is self._speaker:
            del self._speakers[self.card.address]
        await self._inner.close()
