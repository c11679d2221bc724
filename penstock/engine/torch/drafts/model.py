"""Guesses from a smaller model with the same tokens.

It has keys and values of its own, in as many blocks of as many positions as the served model, and uses the block
tables of the jobs as they are: position p of a job lies in the same block and slot in both caches. How far a job's
positions are computed here is noted with the blocks they are in; where a job has other blocks than it had, or was not
asked about for a while, what is missing is computed first, in chunks. (Blocks that went through other hands and came
back to the job unseen hold another's keys. Then guesses are bad, and nothing else: texts do not depend on them.)

    positions    ... known-1 | known    known+1  ...        the last token, then guesses
    forwards     catch up, 1 |   2        3                  each draws the guess of the next position

A guess is drawn as the served model draws its token there, with the same wishes and the same chance, so that models
that agree draw alike at any temperature. All jobs of a step are guessed for together. Nothing is guessed beyond the
context of the smaller model.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from penstock.core.plans import Work
from penstock.engine.torch.build import Built
from penstock.engine.torch.jobs import JobState, JobTable
from penstock.engine.torch.sampler import draw
from penstock.engine.torch.step import StepArrays, lay_out

CHUNK = 512  # positions of one job that are caught up with at once


class DraftModel:
    """See the module's text."""

    def __init__(self, built: Built, max_context: int) -> None:
        self._decoder, self._device = built.decoder, built.device
        self._max_context = max_context
        self._done: dict[int, tuple[int, NDArray[np.int32]]] = {}  # positions, and their blocks

    def propose(
        self, table: JobTable, jobs: Sequence[JobState], most: Sequence[int]
    ) -> list[list[int]]:
        guesses: dict[int, list[int]] = {job.seq: [] for job in jobs}
        going = []
        for job, count in zip(jobs, most, strict=True):
            inside = min(count, self._max_context - job.known)
            if inside > 0:
                going.append((job, inside))
        depth = 0
        while going:
            owners = [job for job, _ in going]
            arrays = self._first(table, owners) if depth == 0 else _next(table, owners, depth)
            drawn = draw(self._logits(arrays), table, owners, [depth] * len(owners))
            depth, left = depth + 1, []
            for (job, count), token, is_broken in zip(
                going, drawn.ids, drawn.is_broken, strict=True
            ):
                if is_broken or token in job.stops:
                    continue
                guesses[job.seq].append(token)
                table.guess(job, guesses[job.seq])
                if depth < count:
                    left.append((job, count))
            going = left
        for job in jobs:
            if guesses[job.seq]:
                self._note(table, job, job.known + len(guesses[job.seq]) - 1)
        return [guesses[job.seq] for job in jobs]

    def close(self, seq: int) -> None:
        self._done.pop(seq, None)

    def _first(self, table: JobTable, jobs: Sequence[JobState]) -> StepArrays:
        """The forward that draws the first guess of each job, after those that are needed to catch up."""
        work = []
        for job in jobs:
            start = self._computed(table, job)
            while job.known - start > CHUNK:
                part = Work(job.seq, start, CHUNK, False)
                self._hidden(_alone(lay_out(table, [part], [job])))
                start += CHUNK
            work.append(Work(job.seq, start, job.known - start, True))
        return _alone(lay_out(table, work, jobs))

    def _computed(self, table: JobTable, job: JobState) -> int:
        """Positions whose keys are here; the last token's never count, as its logits are wanted."""
        done, blocks = self._done.get(job.seq, (0, NOTHING))
        size = min(len(blocks), job.num_blocks)
        same = blocks[:size] == table.blocks[job.row, :size]
        alike = size if same.all() else int(same.argmin())
        return max(0, min(done, alike * table.block_size, job.known - 1))

    def _note(self, table: JobTable, job: JobState, positions: int) -> None:
        num = -(-positions // table.block_size)
        self._done[job.seq] = positions, table.blocks[job.row, :num].copy()

    def _logits(self, arrays: StepArrays) -> Tensor:
        return self._decoder.logits(self._hidden(arrays)[: arrays.num_sampling])

    def _hidden(self, arrays: StepArrays) -> Tensor:
        forward: Iterator[object] = self._decoder.forward(arrays.on(self._device))
        while True:
            try:
                next(forward)
            except StopIteration as end:
                hidden: Tensor = end.value
                return hidden


NOTHING = np.zeros(0, np.int32)


def _next(table: JobTable, jobs: Sequence[JobState], depth: int) -> StepArrays:
    """A step of the `depth`-th guesses, which stand behind what the jobs know."""
    work = [Work(job.seq, job.known + depth - 1, 1, True) for job in jobs]
    ids = [int(table.tokens[job.row, job.known + depth - 1]) for job in jobs]
    return _alone(lay_out(table, work, jobs))._replace(ids=np.array(ids, np.int64))


def _alone(arrays: StepArrays) -> StepArrays:
    """Adapters are of the served model."""
    return arrays._replace(adapters=None)
