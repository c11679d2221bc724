"""The torch executor: the real twin of the executor port.

    loop's thread:   launch / resume / interrupt / abort / close_jobs  --queue-->  lane's thread
    lane's thread:   open jobs, lay out arrays, forward piece by piece, sample, note tokens  --call_soon-->  Done

Copies of blocks to host memory and back run in threads of their own (mover.py); a step waits for those it depends on.

A lane is a thread that runs one step at a time; a step may be left between two pieces and taken up again. A job that
cannot be served (token out of range, no token ids) ends with its own error and does not disturb the others of its plan;
an exception ends its plan and leaves the engine running.

Two lanes (`EngineConfig.lanes`) run side by side over the same weights, the same cache of keys and values, and one
table of jobs, each on the cores that its plan's share gives it (cores.py). Nothing of a forward is shared: a job is in
one plan at a time and writes to its own blocks, and blocks that several jobs read were written before. What remains is
the table, which grows: it is read and written under a lock, before and after the forward. A plan that follows an abort
in the other lane waits until nothing of the aborted one runs, as it may have got that one's blocks.
"""

from __future__ import annotations

import asyncio
import math
import threading
from collections.abc import Callable, Generator, Iterable, Sequence
from contextlib import suppress
from typing import NamedTuple, Protocol

from torch import Tensor

from penstock.core.errors import StepFailed
from penstock.core.plans import Adapted, Done, Filing, Plan, Sampled, Transfer, Work, Yielded
from penstock.core.ports import Completion, Grain
from penstock.core.rng import stream
from penstock.core.types import BlockHash, Caps, PlanId
from penstock.engine.folder import ModelFacts
from penstock.engine.grammar import grammars_of
from penstock.engine.torch.adapters.store import open_adapters
from penstock.engine.torch.borrower import SplitAttention
from penstock.engine.torch.build import Built, EngineConfig
from penstock.engine.torch.cores import Seat, cores_here
from penstock.engine.torch.decoder import Piece, StepInput
from penstock.engine.torch.drafts.open import drafter_of
from penstock.engine.torch.drafts.verify import sampling_rows, with_guesses
from penstock.engine.torch.elastic.reshaper import TorchReshaper
from penstock.engine.torch.encoders.pooling import Pooler
from penstock.engine.torch.jobs import JobState, JobTable
from penstock.engine.torch.lane import Abort, Close, Lane, Launch, Resume, Step
from penstock.engine.torch.layered import forward_in_groups, settled
from penstock.engine.torch.outputs import embedded, gather, note, score
from penstock.engine.torch.pace import paced, settle
from penstock.engine.torch.played import NOT_PLAYED
from penstock.engine.torch.sampler import Drawn, draw
from penstock.engine.torch.slow_memory import open_behind
from penstock.engine.torch.step import StepArrays, lay_out


class Crew(Protocol):
    """The other ranks of a tensor-parallel model, seen from rank 0."""

    def begin(self, arrays: StepArrays) -> None:
        """Have all ranks run this step. Raises StepFailed when one of them is gone."""
        ...

    @property
    def broken(self) -> str | None:
        """Why no step can be run any more; None while it can."""
        ...

    def abandon(self, error: BaseException) -> BaseException:
        """The step broke off here, so ranks are out of step: end them; the error to tell."""
        ...

    def close(self) -> None: ...

    @property
    def pids(self) -> list[int]: ...


class Due(NamedTuple):
    """What a plan that was launched waits for, and the seeds of the jobs it opens."""

    waits: Sequence[threading.Event]
    seeds: Sequence[int]


class TorchExecutor:
    """Implements core.ports.Executor. Made by `penstock.engine.torch.open.open_executor`."""

    def __init__(
        self, built: Built, facts: ModelFacts, config: EngineConfig, crew: Crew | None = None
    ) -> None:
        self.facts, self.config, self.notes = facts, config, built.notes
        self.num_blocks, self.block_size = built.num_blocks, config.block_size
        self.beside = built.beside
        self._decoder, self._device, self._crew = built.decoder, built.device, crew
        self._graphs = built.graphs
        self.adapters = open_adapters(built, config)
        self._table = JobTable(
            vocab_size=facts.vocab_size,
            block_size=config.block_size,
            num_layers=facts.num_layers,
            eos_ids=facts.eos_ids,
            grammars=grammars_of(facts),
            pooler=Pooler(facts.package, built.device),
            has_head=facts.shape.has_head,
        )
        if self.adapters is not None:
            self._table.slot_of = self.adapters.slot_of
        self.drafter = drafter_of(config.speculation)
        self._seeds = stream(config.seed, "sampling")
        self._memory = open_behind(
            built.decoder.attention, facts.folder, config, self._hear, built.transport
        )
        room = math.inf if built.sharing else built.num_blocks * config.block_size
        self._caps = Caps(
            num_layers=facts.num_layers,
            max_context=int(min(config.max_context or facts.max_context, room)),
            has_layer_ranges=crew is None,
            yield_grain="operator" if crew is None else "step",
            host_blocks=config.host_blocks,
            tier_blocks=0 if self._memory is None else self._memory.tier_blocks,
            disk_blocks=0 if self._memory is None else self._memory.disk_blocks,
            max_adapters=config.max_adapters,
            max_lanes=config.lanes,
            max_total_share=float(config.lanes),
            moves_jobs=crew is None and config.speculation is None,
            lends=built.sharing is not None,
        )
        self.transport, self.sharing = built.transport, built.sharing
        self._due: dict[PlanId, Due] = {}
        self._leaving: list[tuple[Lane, threading.Event]] = []  # of plans that were aborted
        self._loop: asyncio.AbstractEventLoop | None = None
        self.expert_loads = built.expert_loads(facts)
        self.reshaper = TorchReshaper.of(built.changes, self.expert_loads)
        self._live: dict[PlanId, Lane] = {}
        self._on_completion: Callable[[Completion], None] | None = None
        self._guard = threading.Lock()  # of the table, and of what is counted
        self._lanes = self._open_lanes()
        self._is_stopped = False

    def _open_lanes(self) -> list[Lane]:
        threads, count = self.config.threads, self.config.lanes
        seats: list[Seat | None] = [None]
        if count > 1:
            cores = cores_here(threads)
            threads, seats = None, [Seat(place, cores) for place in range(count)]
        return [
            Lane(
                run=self._step,
                close=self._close,
                tell=self._tell,
                threads=threads,
                seat=seat,
                niceness=self.config.niceness,
            )
            for seat in seats
        ]

    @property
    def caps(self) -> Caps:
        return self._caps

    @property
    def kv_bytes(self) -> int:
        """Memory set aside for keys and values on this rank."""
        assert self._decoder.attention is not None
        return self._decoder.attention.num_bytes

    @property
    def carried_bytes(self) -> int:
        """Held by jobs between their layer groups."""
        jobs = list(self._table.jobs.values())  # a copy, as the lane's thread may open one
        return sum([job.carried.num_bytes for job in jobs if job.carried is not None])

    @property
    def pids(self) -> list[int]:
        """Processes besides this one."""
        spread = [] if self.reshaper is None else self.reshaper.pids
        return spread if self._crew is None else self._crew.pids

    def listen(self, on_completion: Callable[[Completion], None]) -> None:
        self._on_completion = on_completion

    def launch(self, plan: Plan, repeat: int = 1) -> PlanId:
        assert not self._is_stopped, "launched after stop"
        assert plan.lane < self._caps.max_lanes, f"there is no lane {plan.lane}"
        if self._crew is not None and self._crew.broken is not None:
            raise StepFailed(self._crew.broken)  # ends the replica: its process is started anew
        lane = self._live[plan.id] = self._lanes[plan.lane]
        self._leaving = [each for each in self._leaving if not each[1].is_set()]
        waits = [left for other, left in self._leaving if other is not lane]
        if self._memory is not None:
            waits += self._memory.waits_of(plan)
        if waits or plan.opened:
            # Drawn here, so that who is opened first does not depend on which lane is faster.
            seeds = [self._seeds.getrandbits(64) for _ in plan.opened]
            self._due[plan.id] = Due(waits, seeds)
        lane.send(Launch(plan))
        return plan.id

    def interrupt(self, plan: PlanId, grain: Grain = "step") -> None:
        if grain != "step" and self._caps.yield_grain != "step" and plan in self._live:
            self._live[plan].mark(plan, grain)

    def resume(self, plan: PlanId) -> None:
        if plan in self._live:
            self._live[plan].unmark(plan)
            self._live[plan].send(Resume(plan))

    def abort(self, plan: PlanId) -> None:
        lane = self._live.pop(plan, None)
        # Ranks must stay in step: there, a step is run and its end not told.
        if lane is not None and self._crew is None:
            left = threading.Event()
            self._leaving.append((lane, left))
            lane.mark(plan, "abort")
            lane.send(Abort(plan, left))

    def close_jobs(self, seqs: Sequence[int]) -> None:
        self._lanes[0].send(Close(tuple(seqs)))

    def take_out(self, seq: int, num_output: int) -> tuple[tuple[int, ...], int | None]:
        with self._guard:
            return self._table.take_out(seq, num_output)

    def transfer(self, transfer: Transfer) -> None:
        assert self._memory is not None, "this executor has no host memory"
        self._memory.transfer(transfer)

    @property
    def found(self) -> Sequence[tuple[BlockHash, int]]:
        return () if self._memory is None else self._memory.found

    @property
    def kv_block_bytes(self) -> int:
        return 0 if self._memory is None else self._memory.block_bytes

    def file(self, filing: Filing) -> None:
        assert self._memory is not None, "this executor has no disk"
        self._memory.file(filing)

    def _hear(self, told: Completion) -> None:
        assert self._on_completion is not None, "nobody listens"
        self._on_completion(told)

    def load_adapter(self, adapter: str, slot: int) -> None:
        assert self.adapters is not None and 0 <= slot < self._caps.max_adapters
        self._loop = asyncio.get_running_loop()
        self.adapters.begin(adapter, slot, self._tell_adapted)

    def _tell_adapted(self, adapter: str, slot: int, error: str | None) -> None:
        """On the loading thread."""
        assert self._loop is not None
        with suppress(RuntimeError):  # the loop is closed: nobody listens any more
            self._loop.call_soon_threadsafe(self._adapted, adapter, slot, error)

    def _adapted(self, adapter: str, slot: int, error: str | None) -> None:
        if not self._is_stopped:
            assert self.adapters is not None and self._on_completion is not None
            if error is None:
                self.adapters.settle(adapter, slot)
            at = asyncio.get_running_loop().time()
            self._on_completion(Adapted(adapter, slot, at, error))

    async def stop(self) -> None:
        if not self._is_stopped:
            self._is_stopped = True
            running = () if self._crew else tuple(self._live)
            await asyncio.gather(*(lane.stop(running) for lane in self._lanes))
            self._live.clear()
            if self._memory is not None:
                self._memory.close()
            if self.adapters is not None:
                self.adapters.close()
            if self.sharing is not None:
                self.sharing.close()
            if self._crew is not None:
                self._crew.close()
            if self.reshaper is not None:
                self.reshaper.close()

    def _tell(self, told: Done | Yielded) -> None:
        """On the loop's thread: pass on what the lane did, unless the plan was aborted meanwhile."""
        lane = self._live.get(told.plan)
        if lane is None:
            return
        at = asyncio.get_running_loop().time()
        if isinstance(told, Yielded):
            told = Yielded(told.plan, at, told.activation_bytes)
        else:
            del self._live[told.plan]
            lane.unmark(told.plan)
            told = Done(told.plan, 1, told.outputs, (at,), told.error)
        assert self._on_completion is not None, "nobody listens"
        self._on_completion(told)

    def _close(self, seqs: Iterable[int]) -> None:
        with self._guard:
            for seq in seqs:
                self._table.close(seq)
                if self.drafter is not None:
                    self.drafter.close(seq)

    def _step(self, plan: Plan) -> Step:
        """One plan, on its lane's thread."""
        table = self._table
        due = self._due.pop(plan.id, NOTHING_DUE)
        for event in due.waits:
            event.wait()
        self._close(plan.closed)
        with self._guard:
            refused = self._open(plan, due.seeds)
            work = [chunk for chunk in plan.work if chunk.seq not in refused]
            outputs = [Sampled(seq, 0, error=reason) for seq, reason in refused.items()]
            if not work:
                return tuple(outputs)
            is_layered = any([chunk.layers is not None for chunk in work])
            if is_layered:
                work = settled(work, table.num_layers)
            jobs = [table.place(chunk) for chunk in work]
            if any([chunk.phase == "verify" for chunk in work]):
                work = with_guesses(self.drafter, table, work, jobs)
            arrays = lay_out(table, work, jobs)
        if self._crew is not None:
            self._crew.begin(arrays)
        played = NOT_PLAYED if self._graphs is None or is_layered else self._graphs.play(arrays)
        step = arrays.on(self._device) if played.hidden is None else None
        if self.sharing is not None and step is not None:
            step.away = self.sharing.borrower.split(step, work, is_layered=is_layered)
        try:
            hidden = played.hidden
            if hidden is None:
                groups = (work, jobs) if is_layered else None
                hidden = yield from self._forward(arrays, step, groups)
            drawn = self._draw(arrays, hidden, played.logits, work, jobs)
            score(self._decoder, table, arrays, hidden, work=work, jobs=jobs)
            vectors = gather(table, arrays, hidden, work=work, jobs=jobs)
        except Exception as error:
            if self._crew is None:
                raise
            raise self._crew.abandon(error) from error
        with self._guard:
            if self.expert_loads is not None:
                taken = played.taken(len(work)) if step is None else step.taken
                self.expert_loads.add(plan.id, taken)
            outputs += note(table, work, jobs, drawn)
            outputs += embedded(vectors)
        if step is not None and isinstance(step.away, SplitAttention):
            outputs = step.away.judged(outputs)
        return tuple(outputs)

    def _forward(
        self,
        arrays: StepArrays,
        step: StepInput | None,
        groups: tuple[Sequence[Work], Sequence[JobState]] | None,
    ) -> Generator[Piece, None, Tensor]:
        """`groups`: of a step whose jobs do not all pass all layers."""
        assert step is not None, "it is not played"
        if groups is None:
            return (yield from paced(self._decoder.forward(step), self._device))
        work, jobs = groups
        return (yield from forward_in_groups(self._decoder, arrays, step, work=work, jobs=jobs))

    def _draw(
        self,
        arrays: StepArrays,
        hidden: Tensor,
        logits: Tensor | None,
        work: Sequence[Work],
        jobs: Sequence[JobState],
    ) -> Drawn:
        """`logits` None: they are still to be made."""
        if not arrays.num_sampling:
            settle(self._device)
            return NOTHING
        is_guessed = any([chunk.phase == "verify" for chunk in work])
        owners, ahead = sampling_rows(work, jobs, is_guessed)
        if logits is None:
            logits = self._decoder.logits(hidden[: len(owners)])
        return draw(logits, self._table, owners, ahead)

    def _open(self, plan: Plan, seeds: Sequence[int]) -> dict[int, str]:
        """Take in the plan's new jobs; reasons of those that cannot be served."""
        refused = {}
        for opening, seed in zip(plan.opened, seeds, strict=True):
            reason = self._table.open(opening, seed)
            if reason is not None:
                refused[opening.seq] = reason
        return refused


NOTHING = Drawn([], [], [])
NOTHING_DUE = Due((), ())
