"""Two phases as queues: the level of detail at which the DistServe simulator judges a placement.

One instance prefills, one decodes, or one does both. What is told of an instance: its prompts come first in, first out,
and as many as its memory holds go in one step; its decodes all go in one step while their contexts fit. An answer's
first token is there when its prompt is, and one step brings one more to every job that decodes.

    disaggregated   arrivals -> prompts -> transfer -> decodes        the two never wait for each other's steps
    colocated       a prompt step whenever a prompt waits, else a decode step
    chunked         steps of at most `chunk` tokens, of prompts first, and decodes beside them

With pp stages a step takes 1/pp of its time in each, and its jobs come back when they have passed all: while they are
on the way the first stage takes whoever waits. HOP_S * pp is what the publication adds to a stage of a prompt step.

Runs of equal decode steps are taken at once: step i of n jobs costs x + y i, so k of them k x + y k (k - 1) / 2.

Not told: blocks, prefix caches, preemption, schedulers' own time, reports, routing. For these there is the simulator.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from heapq import heappop, heappush
from typing import Literal

from penstock.cost.linear_five import LinearFive
from penstock.cost.step import StepFeatures, StepModel

HOP_S = 1e-3
REACH = 64  # decode steps over which a step model is taken to be a line

Work = Literal["prefill", "decode", "both"]


@dataclass(slots=True)
class Job:
    """One request; instants in seconds. `ready_at`: when the phase at hand may begin."""

    arrived_at: float
    prompt: int
    output: int  # tokens after the first
    ready_at: float = 0.0
    first_at: float = math.inf
    last_at: float = math.inf
    left: int = 0  # of the prompt, then of the answer

    @property
    def ttft_s(self) -> float:
        return self.first_at - self.arrived_at

    @property
    def tpot_s(self) -> float:
        return (self.last_at - self.first_at) / self.output if self.output else 0.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Instance:
    """What runs a phase. `kv_tokens`: positions that fit. `chunk`: tokens of a step of both kinds; None = no such.

    `is_published`: as the publication's simulator has it, jobs that do not fit together take turns, step by step, and
    decodes beside a chunk cost nothing. Otherwise the oldest go on, and both are paid for.
    """

    model: StepModel
    work: Work
    kv_tokens: int
    pp: int = 1
    chunk: int | None = None
    is_published: bool = False

    def stage_s(self, features: StepFeatures, *, is_first: bool = True) -> float:
        """Seconds that a step is in one of the stages."""
        whole = self.model.seconds(features)
        if self.pp == 1 and not isinstance(self.model, LinearFive):
            return whole
        around = self.model.overhead_s(features) if isinstance(self.model, LinearFive) else 0.0
        hop = HOP_S * self.pp if features.num_prefills else 0.0
        return (whole - around) / self.pp + hop + (around if is_first else 0.0)


def decode_features(num: int, context: int) -> StepFeatures:
    return StepFeatures(num, num, num, num, context, -(-context // num))


def prompt_features(lengths: Sequence[int]) -> StepFeatures:
    tokens = sum(lengths)
    pairs = sum(length * (length + 1) // 2 for length in lengths)
    num = len(lengths)
    return StepFeatures(
        tokens, num, num, num_prefills=num, prefill_pairs=pairs, prefill_context=tokens
    )


@dataclass
class Running:
    """An instance at work on jobs in the order of `ready_at`, until all are done."""

    instance: Instance
    coming: deque[Job]
    prompts: deque[Job] = field(default_factory=deque)
    decodes: list[Job] = field(default_factory=list)  # in the order they came
    on_way: list[tuple[float, int, list[Job]]] = field(default_factory=list)  # passing the stages
    free_at: list[float] = field(default_factory=list)  # of each stage
    num: int = 0

    def run(self) -> None:
        self.free_at = [0.0] * self.instance.pp
        while self.coming or self.prompts or self.decodes or self.on_way:
            at = max(self.free_at[0], self._next_at())
            self._gather(at)
            if self.prompts:
                if self.instance.chunk is None:
                    self._prompt_step(at)
                else:
                    self._chunk_step(at, self.instance.chunk)
            else:
                self._decode_steps(at)

    def _next_at(self) -> float:
        if self.prompts or self.decodes:
            return 0.0
        ready = [self.coming[0].ready_at] if self.coming else []
        return min(ready + ([self.on_way[0][0]] if self.on_way else []))

    def _gather(self, at: float) -> None:
        """Whoever has come by now."""
        while self.on_way and self.on_way[0][0] <= at:
            self.decodes += heappop(self.on_way)[2]
        while self.coming and self.coming[0].ready_at <= at:
            job = self.coming.popleft()
            if self.instance.work == "decode":
                self.decodes.append(job)
            else:
                self.prompts.append(job)

    # ------------------------------------------------------------------ steps

    def _pass(self, at: float, features: StepFeatures) -> float:
        """A step through all stages; when it leaves the last."""
        end = at
        for stage in range(self.instance.pp):
            begin = max(end, self.free_at[stage])
            end = begin + self.instance.stage_s(features, is_first=stage == 0)
            self.free_at[stage] = end
        return end

    def _prompt_step(self, at: float) -> None:
        room = self.instance.kv_tokens
        taken: list[Job] = []
        while self.prompts and (not taken or self.prompts[0].prompt <= room):
            taken.append(self.prompts.popleft())
            room -= taken[-1].prompt
        end = self._pass(at, prompt_features([job.prompt for job in taken]))
        for job in taken:
            self._answer(job, end)
        self._return(end, [job for job in taken if job.left])

    def _answer(self, job: Job, end: float) -> None:
        job.first_at = end
        job.left = job.output if self.instance.work == "both" else 0
        if not job.output:
            job.last_at = end

    def _return(self, end: float, jobs: list[Job]) -> None:
        if jobs:
            self.num += 1
            heappush(self.on_way, (end, self.num, jobs))

    def _fitting(self) -> tuple[list[Job], int]:
        """The oldest jobs whose contexts fit together, and the sum of these."""
        context, num = 0, 0
        for job in self.decodes:
            position = job.prompt + job.output - job.left + 1
            if num and context + position > self.instance.kv_tokens:
                break
            context += position
            num += 1
        taken, self.decodes = self.decodes[:num], self.decodes[num:]
        return taken, context

    def _decode_steps(self, at: float) -> None:
        taken, context = self._fitting()
        num = len(taken)
        features = decode_features(num, context)
        if self.instance.pp > 1:
            end, steps = self._pass(at, features), 1
        else:
            first = self.instance.stage_s(features)
            last = self.instance.stage_s(decode_features(num, context + REACH * num))
            growth = (last - first) / REACH
            wait_s = self.coming[0].ready_at - at if self.coming else math.inf
            steps = min(REACH, min(job.left for job in taken), steps_until(wait_s, first, growth))
            if self.decodes:
                steps = 1
            end = at + steps * first + growth * steps * (steps - 1) / 2
            self.free_at[0] = end
        self._tell(taken, steps, end)

    def _tell(self, taken: list[Job], steps: int, end: float) -> None:
        going = []
        for job in taken:
            job.left -= steps
            if job.left:
                going.append(job)
            else:
                job.last_at = end
        if self.instance.pp > 1:
            self._return(end, going)
        elif self.instance.is_published:
            self.decodes += going
        else:
            self.decodes = going + self.decodes

    def _chunk_step(self, at: float, chunk: int) -> None:
        """Prompts up to the chunk, and decodes in what is left of it."""
        room, pieces, done = chunk, [], []
        while self.prompts and room:
            job = self.prompts[0]
            left = job.left or job.prompt
            tokens = min(left, room)
            pieces.append((job.prompt - left, tokens))
            room -= tokens
            job.left = left - tokens
            if not job.left:
                done.append(self.prompts.popleft())
        riders, context = self._fitting() if room else ([], 0)
        self.decodes = riders[room:] + self.decodes
        riders = riders[:room]
        features = self._mixed(pieces, len(riders), context)
        end = self._pass(at, features)
        self._tell(riders, 1, end)
        for job in done:
            self._answer(job, end)
        self._return(end, [job for job in done if job.left])

    def _mixed(self, pieces: list[tuple[int, int]], num: int, context: int) -> StepFeatures:
        tokens = sum(piece for _, piece in pieces)
        pairs = sum(start * piece + piece * (piece + 1) // 2 for start, piece in pieces)
        seen = sum(start + piece for start, piece in pieces)
        jobs = len(pieces)
        if self.instance.is_published:
            flat = sum(piece * (piece + 1) // 2 for _, piece in pieces)
            return StepFeatures(
                tokens, jobs, jobs, num_prefills=jobs, prefill_pairs=flat, prefill_context=seen + context
            )  # fmt: skip
        return StepFeatures(
            tokens + num, jobs + num, jobs + num, num, context, -(-context // num) if num else 0,
            jobs, pairs, seen,
        )  # fmt: skip


def steps_until(wait_s: float, first: float, growth: float) -> int:
    """The fewest steps, at least one, that take `wait_s`: k first + growth k (k - 1) / 2 >= wait_s."""
    if wait_s <= first:
        return 1
    if math.isinf(wait_s):
        return 1 << 60
    half = first - growth / 2
    return max(
        1, math.ceil(2 * wait_s / (half + math.sqrt(half * half + 2 * growth * wait_s)) - 1e-12)
    )


def serve(
    jobs: Sequence[Job],
    first: Instance,
    second: Instance | None = None,
    transfer_s: Callable[[Job], float] = lambda job: 0.0,
) -> None:
    """Fill in the instants of jobs, which arrive in order. `second`: decodes what `first` prefilled."""
    for job in jobs:
        job.ready_at, job.left = job.arrived_at, 0
    Running(first, deque(jobs)).run()
    if second is not None:
        for job in jobs:
            job.ready_at = job.first_at + transfer_s(job)
        serve_decodes(jobs, second)


def serve_decodes(jobs: Sequence[Job], instance: Instance) -> None:
    """Jobs that have their first token, and whose KV is there at `ready_at`."""
    later = [job for job in jobs if job.output]
    for job in later:
        job.left = job.output
    Running(instance, deque(sorted(later, key=lambda job: job.ready_at))).run()
