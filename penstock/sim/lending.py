"""A modelled replica that keeps context for others, and whose own jobs have some of theirs elsewhere.

A step at the home of such a job is priced with what is left there: contexts are shorter by what is away, positions are
not. Meanwhile, in each layer, queries travel to the creditors and parts come back, all creditors at the same time:

    remote_s = layers * 2 * latency + bytes of queries and parts / bandwidth + the slowest creditor
    step_s   = step at home + max(0, remote_s - attention at home)

A creditor attends at the speed of its step model, for one home after the other, and pays for it: what runs there ends
with its step, and the next one begins later by the seconds that it attended. An idle one has them behind it when
something comes. So what is lent slows down its owner, as it would on one device.

`attention_s(tokens, kept)`, what so many queries of one job take over `kept` positions before them, is read off the
step model: the time of such a chunk, less that of the same chunk with nothing before it.

Blocks that move over to a creditor take the wires of sim.transport, and the job stands still. A creditor that has gone
ends the jobs it kept blocks for with an error, as the real one does.
"""

from __future__ import annotations

import asyncio
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from itertools import chain
from typing import Any

import numpy as np
from msgspec import Struct

from penstock.core.plans import Decodes, Done, Plan, Sampled, Work
from penstock.core.types import PlanId
from penstock.cost.step import StepModel, features_of
from penstock.sim.executor import ModelledExecutor, _Run
from penstock.sim.transport import Fabric

LOST = "a replica that kept a part of this request's context is gone; send the request again"
Kept = tuple[tuple[str, int], ...]  # creditors' addresses, and blocks at each


class _Debt(Struct, gc=False):
    first: int
    count: int
    address: str


class ModelledSharing:
    """One replica's core.sharing.ContextSharing."""

    def __init__(self, executor: LendingExecutor, fabric: Fabric, address: str) -> None:
        self._executor, self._fabric, self._address = executor, fabric, address
        self.debts: dict[int, _Debt] = {}

    def lend(self, loan: int, blocks: Sequence[int]) -> str:
        return self._address

    def take_back(self, loan: int, num_blocks: int | None = None) -> None:
        """Nothing is written here."""

    def borrow(self, loan: int, first: int, count: int, address: str) -> None:
        self.debts[loan] = _Debt(first, count, address)
        self._executor.end_steps()

    def give_back(self, loan: int) -> None:
        self.debts.pop(loan, None)

    def spill(
        self, runs: Sequence[tuple[int, int, int]], tell: Callable[[str | None], None]
    ) -> None:
        counts = self.kept_by([number + at for _, number, count in runs for at in range(count)])
        self._carry([(self._address, address, count) for address, count in counts], tell)

    def relocate(
        self, runs: Sequence[tuple[int, int, int]], tell: Callable[[str | None], None]
    ) -> None:
        ways: Counter[tuple[str, str]] = Counter()
        for number, target, count in runs:
            ways[self._place_of(number), self._place_of(target)] += count
        self._carry([(*way, count) for way, count in ways.items()], tell)

    def _place_of(self, number: int) -> str:
        """Whose memory a block is in."""
        kept = self.kept_by((number,))
        return kept[0][0] if kept else self._address

    def _carry(
        self, ways: Sequence[tuple[str, str, int]], tell: Callable[[str | None], None]
    ) -> None:
        """Blocks from one replica to another: (source, target, how many)."""
        loop, fabric, num_bytes = (
            asyncio.get_running_loop(),
            self._fabric,
            self._executor.block_bytes,
        )
        ends = [fabric.carry(source, target, count * num_bytes) for source, target, count in ways]

        def arrive() -> None:
            is_here = all(
                end in fabric.lenders for source, target, _ in ways for end in (source, target)
            )
            fabric.num_bytes += num_bytes * sum([count for _, _, count in ways])
            tell(None if is_here else LOST)

        at = max([loop.time() if end is None else end for end in ends])
        self._executor.later(at, arrive)

    def kept_by(self, numbers: Sequence[int]) -> Kept:
        found: dict[str, int] = {}
        asked = np.array(numbers, np.int64)
        for debt in self.debts.values():
            inside = (asked >= debt.first) & (asked < debt.first + debt.count)
            count = int(inside.sum())
            if count:
                found[debt.address] = found.get(debt.address, 0) + count
        return tuple(found.items())


class LendingExecutor(ModelledExecutor):
    """See the module's text, and ModelledExecutor. `row_bytes`: of one position's queries, and of their parts with the
    log-sum-exp of each head, over all layers.
    """

    def __init__(
        self,
        model: StepModel,
        fabric: Fabric,
        *,
        address: str,
        num_blocks: int,
        block_size: int,
        block_bytes: int,
        row_bytes: int,
        **more: Any,
    ) -> None:
        super().__init__(model, **more)
        assert self.caps.max_lanes == 1, "a replica that lends has one lane"
        self._model, self._fabric, self._address = model, fabric, address
        self._num_blocks, self._size = num_blocks, block_size
        self.block_bytes, self._row_bytes = block_bytes, row_bytes
        self._away: dict[int, Kept] = {}  # by seq
        self._attention: dict[tuple[int, int], float] = {}
        self._lost: frozenset[int] = frozenset()  # jobs of the plan that runs
        self._owed_s = self._attends_until = 0.0
        self._timers: set[asyncio.TimerHandle] = set()
        self.sharing = ModelledSharing(self, fabric, address)
        fabric.lenders[address] = self

    # ---------------------------------------------------------------- as creditor

    def attend(self, at: float, seconds: float) -> float:
        """Somebody's queries come; the instant at which they are answered."""
        end = max(at, self._attends_until) + seconds
        self._attends_until = end
        if self._runs:
            self._owed_s += seconds
            self.end_steps()
        return end

    def ready_at(self, plan: Plan, at: float) -> float:
        begin, self._owed_s = super().ready_at(plan, at) + self._owed_s, 0.0
        return max(begin, self._attends_until)

    def end_steps(self) -> None:
        """What runs ends with its step, as the next one is another."""
        for plan, run in list(self._runs.items()):
            if run.target > 1:
                self.interrupt(plan)

    # ---------------------------------------------------------------- as home

    def launch(self, plan: Plan, repeat: int = 1) -> PlanId:
        self._note(plan)
        return super().launch(plan, 1 if self.sharing.debts else repeat)

    def close_jobs(self, seqs: Sequence[int]) -> None:
        super().close_jobs(seqs)
        for seq in seqs:
            self._away.pop(seq, None)

    def later(self, at: float, act: Callable[[], None]) -> None:
        def ring() -> None:
            self._timers.discard(timer)
            act()

        timer = asyncio.get_running_loop().call_at(at, ring)
        self._timers.add(timer)

    async def stop(self) -> None:
        for timer in self._timers:
            timer.cancel()
        self._timers.clear()
        self._fabric.lenders.pop(self._address, None)
        await super().stop()

    def _note(self, plan: Plan) -> None:
        """Whose context is where from now on."""
        work = plan.work
        told = [(one.seq, one.blocks) for one in _others(plan) if one.is_fresh]
        if isinstance(work, Decodes):
            told += [(seq, blocks) for seq, blocks in work.fresh.items() if seq not in self._away]
        for seq, blocks in told:
            numbers = [number for number in blocks if number >= self._num_blocks]
            if numbers:
                self._away[seq] = self.sharing.kept_by(numbers)
            else:
                self._away.pop(seq, None)

    def _begin(self, plan: Plan, at: float, repeat: int) -> _Run:
        run = super()._begin(plan, at, repeat)
        self._lost = frozenset()
        away = self._away
        if not away or away.keys().isdisjoint([one.seq for one in plan.work]):
            return run
        assert run.target == 1, "a step with context elsewhere is one step"
        lenders = self._fabric.lenders
        self._lost = frozenset(
            [
                one.seq
                for one in plan.work
                if any([address not in lenders for address, _ in away.get(one.seq, ())])
            ]
        )
        run.ends[0] = at + self._split_s(plan, at) + run.extra_s
        return run

    def _split_s(self, plan: Plan, at: float) -> float:
        """What the step takes when it begins at `at`; its creditors are told."""
        model, share, size = self._model, plan.share, self._size
        here: list[tuple[int, int, int]] = []
        alone: list[tuple[int, int, int]] = []
        asked: dict[str, float] = {}
        rows = 0
        for one in plan.work:
            kept = self._away.get(one.seq, ())
            blocks = sum([count for _, count in kept])
            assert one.layers is None, "a step through some of the layers has no part elsewhere"
            here.append((one.start - blocks * size, one.tokens, one.samples))
            alone.append((0, one.tokens, one.samples))
            for address, count in kept:
                seconds = self._attention_s(one.tokens, count * size)
                asked[address] = asked.get(address, 0.0) + seconds
                rows += one.tokens
        home_s = model.seconds(features_of(here), share)
        attention_s = home_s - model.seconds(features_of(alone), share)
        remote_s = self._hops_s(rows) + self._slowest(at, asked) - at
        return home_s + max(0.0, remote_s - attention_s)

    def _hops_s(self, rows: int) -> float:
        link = self._fabric.link
        return 2 * self.caps.num_layers * link.latency_s + rows * self._row_bytes / link.bytes_per_s

    def _slowest(self, at: float, asked: Mapping[str, float]) -> float:
        ends = [
            self._fabric.lenders[address].attend(at, seconds)
            for address, seconds in asked.items()
            if address in self._fabric.lenders
        ]
        return max(ends, default=at)

    def _attention_s(self, tokens: int, kept: int) -> float:
        found = self._attention.get((tokens, kept))
        if found is None:
            with_it, without = features_of([(kept, tokens, 0)]), features_of([(0, tokens, 0)])
            found = self._model.seconds(with_it) - self._model.seconds(without)
            self._attention[tokens, kept] = found = max(0.0, found)
        return found

    def _finish(self, run: _Run) -> None:
        lost, self._lost = self._lost, frozenset()
        if not lost:
            super()._finish(run)
            return
        plan, run.timer = run.plan, None
        counts = self._counts(run, 1)
        del self._runs[plan.id], self._busy[plan.lane]
        well = [
            Sampled(seq, tokens, (), is_stop)
            for seq, tokens, is_stop, _ in counts
            if seq not in lost
        ]
        ended = [Sampled(seq, 0, error=LOST) for seq in sorted(lost)]
        assert self._tell is not None, "nobody listens"
        self._tell(Done(plan.id, 1, tuple(chain(well, ended)), (run.ends[0],)))


def _others(plan: Plan) -> Sequence[Work]:
    return plan.work.others if isinstance(plan.work, Decodes) else plan.work
