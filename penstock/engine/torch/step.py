"""From a plan's work to the arrays of one forward. Also what rank 0 sends to the other ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from penstock.core.plans import Work
from penstock.engine.torch.adapters.rows import rows_of
from penstock.engine.torch.decoder import StepInput
from penstock.engine.torch.jobs import JobState, JobTable
from penstock.engine.torch.ports import StepMeta

Ints = NDArray[np.int64]
PROMPT_ROWS = 128  # logits of 128 rows of a vocabulary of 150k are 77 MB


class StepArrays(NamedTuple):
    """One step in numpy; see StepMeta and StepInput for the meaning of each."""

    ids: Ints
    positions: Ints
    rows: Ints
    slots: Ints
    query_start: NDArray[np.int32]
    context: NDArray[np.int32]
    block_table: NDArray[np.int32]
    max_query: int
    max_context: int
    num_sampling: int  # the first of `rows`; the rest score the prompt
    num_gathered: int = (
        0  # but for the last ones, of prompts that are embedded: nobody wants their logits
    )
    adapters: tuple[int | None, ...] | None = None  # slots by chunk; None = none uses any

    @property
    def is_plain_decode(self) -> bool:
        """Every chunk is one token, every row is sampled, no prompt is scored and no adapter used."""
        is_plain = self.max_query == 1 and self.num_sampling == len(self.ids) == len(self.rows)
        return is_plain and self.adapters is None

    @property
    def wants_next_tokens(self) -> bool:
        """And nothing else: no prompt is scored or embedded, and no adapter used."""
        return self.num_sampling == len(self.rows) and self.adapters is None

    def logit_slices(self) -> list[slice]:
        """Parts of `rows` whose logits are made together: those that sample, then the prompt's, bit by bit."""
        first = [slice(0, self.num_sampling)] if self.num_sampling else []
        last = len(self.rows) - self.num_gathered
        starts = range(self.num_sampling, last, PROMPT_ROWS)
        return first + [slice(at, min(at + PROMPT_ROWS, last)) for at in starts]

    def part(self, chunks: Sequence[int]) -> StepArrays:
        """Some chunks of this step as a step that wants no logits."""
        chosen = np.array(chunks)
        starts, counts = self.query_start[:-1][chosen], np.diff(self.query_start)[chosen]
        query_start = np.zeros(len(chosen) + 1, np.int32)
        np.cumsum(counts, out=query_start[1:])
        rows = np.arange(query_start[-1]) + np.repeat(starts - query_start[:-1], counts)
        context = self.context[chosen]
        return StepArrays(
            ids=self.ids[rows],
            positions=self.positions[rows],
            rows=np.zeros(0, np.int64),
            slots=self.slots[rows],
            query_start=query_start,
            context=context,
            block_table=self.block_table[chosen],
            max_query=int(counts.max()),
            max_context=int(context.max()),
            num_sampling=0,
            adapters=None if self.adapters is None else tuple([self.adapters[at] for at in chunks]),
        )

    def on(self, device: torch.device) -> StepInput:
        def moved(array: Ints | NDArray[np.int32]) -> torch.Tensor:
            tensor = torch.from_numpy(array)
            return tensor if device.type == "cpu" else tensor.to(device, non_blocking=True)

        meta = StepMeta(
            query_start=moved(self.query_start),
            context=moved(self.context),
            block_table=moved(self.block_table),
            slots=moved(self.slots),
            max_query=self.max_query,
            max_context=self.max_context,
        )
        is_whole = self.num_sampling == len(self.ids)  # single tokens that all sample, in order
        rows = None if is_whole else moved(self.rows)
        adapters = None
        if self.adapters is not None:
            adapters = rows_of(self.adapters, self.query_start.tolist(), device)
        return StepInput(moved(self.ids), moved(self.positions), rows, meta, adapters)


def lay_out(table: JobTable, work: Sequence[Work], jobs: Sequence[JobState]) -> StepArrays:
    """The arrays of a step; `jobs` are those of `work`, in the same order."""
    if all([chunk.samples and chunk.tokens == 1 for chunk in work]):
        return _lay_out_decodes(table, work, jobs)
    owners = np.array([job.row for job in jobs])
    starts = np.array([chunk.start for chunk in work])
    counts = np.array([chunk.tokens for chunk in work])
    ends, query_start = starts + counts, np.zeros(len(work) + 1, np.int32)
    np.cumsum(counts, out=query_start[1:])
    holders = np.repeat(owners, counts)
    positions = np.arange(len(holders)) + np.repeat(starts - query_start[:-1], counts)
    places, inside = np.divmod(positions, table.block_size)
    blocks = table.blocks[holders, places].astype(np.int64)
    max_context = int(ends.max())
    wanted = _wanted_rows(table, work, jobs, query_start)
    gathered = _gathered_rows(table, work, jobs, query_start)
    return StepArrays(
        ids=table.tokens[holders, positions].astype(np.int64),
        positions=positions,
        rows=np.concatenate((wanted, gathered)) if len(gathered) else wanted,
        slots=blocks * table.block_size + inside,
        query_start=query_start,
        context=ends.astype(np.int32),
        block_table=table.blocks[owners, : -(-max_context // table.block_size)],
        max_query=int(counts.max()),
        max_context=max_context,
        num_sampling=sum([chunk.num_rows for chunk in work]),
        num_gathered=len(gathered),
        adapters=table.slots_of(jobs),
    )


def _lay_out_decodes(table: JobTable, work: Sequence[Work], jobs: Sequence[JobState]) -> StepArrays:
    """The same when every job samples after its last token; then no prompt is scored."""
    size, starts = table.block_size, [chunk.start for chunk in work]
    slots = [
        job.last_block * size + start % size
        if start // size == job.num_blocks - 1
        else int(table.blocks[job.row, start // size]) * size + start % size
        for job, start in zip(jobs, starts, strict=True)
    ]
    count, max_context = len(starts), max(starts) + 1
    long = np.array([*[job.last for job in jobs], *starts, *range(count), *slots])
    ids, positions, rows, slots_of = long.reshape(4, count)
    short = np.array([*range(count + 1), *[start + 1 for start in starts]], np.int32)
    return StepArrays(
        ids=ids,
        positions=positions,
        rows=rows,
        slots=slots_of,
        query_start=short[: count + 1],
        context=short[count + 1 :],
        block_table=table.blocks.take([job.row for job in jobs], axis=0)[
            :, : -(-max_context // size)
        ],
        max_query=1,
        max_context=max_context,
        num_sampling=count,
        adapters=table.slots_of(jobs),
    )


def _wanted_rows(
    table: JobTable, work: Sequence[Work], jobs: Sequence[JobState], query_start: NDArray[np.int32]
) -> Ints:
    """Rows that sample, in order of work; then those whose prompt logprobs are wanted, job by job."""
    last = query_start[1:].astype(np.int64) - 1
    counts = np.array([chunk.num_rows for chunk in work])
    sampling = np.repeat(last, counts) - _countdown(counts)
    if all(job.num_prompt_logprobs is None for job in jobs):
        return sampling
    prompt_rows = [
        np.arange(span.start, span.stop) + (begin - chunk.start)
        for begin, chunk, job in zip(query_start.tolist(), work, jobs, strict=False)
        if (span := prompt_span(table, chunk, job))
    ]
    return np.concatenate((sampling, *prompt_rows)) if prompt_rows else sampling


def _countdown(counts: Ints) -> Ints:
    """count - 1 down to 0 for each of them, one behind the other."""
    return np.repeat(np.cumsum(counts), counts) - np.arange(1, counts.sum() + 1)


def prompt_span(table: JobTable, work: Work, job: JobState) -> range:
    """Positions of this chunk whose logits score the prompt's next token, not scored before."""
    if job.num_prompt_logprobs is None or table.is_inner(work):
        return range(0)
    first = max(work.start, len(job.prompt_logprobs) - 1, 0)
    return range(first, min(work.start + work.tokens, job.num_prompt - 1))


def _gathered_rows(
    table: JobTable, work: Sequence[Work], jobs: Sequence[JobState], query_start: NDArray[np.int32]
) -> Ints:
    """Rows whose states go into vectors, job by job."""
    found = [
        np.arange(span.start, span.stop) + (begin - chunk.start)
        for begin, chunk, job in zip(query_start.tolist(), work, jobs, strict=False)
        if (span := gathered_span(table, chunk, job))
    ]
    return np.concatenate(found) if found else np.zeros(0, np.int64)


def gathered_span(table: JobTable, work: Work, job: JobState) -> range:
    """Positions of this chunk whose states go into the job's vector."""
    if job.gathered is None or table.is_inner(work):
        return range(0)
    return job.gathered.span(work.start, work.start + work.tokens)
