"""Plain decode steps, shared by the batch policies: one token of every running job."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from functools import partial
from itertools import repeat

from penstock.core.views import Chunk, JobView, LedgerFork

as_chunk: Callable[[Iterable[object]], Chunk] = partial(tuple.__new__, Chunk)


def all_decodes(running: Sequence[JobView], fork: LedgerFork) -> tuple[Chunk, ...] | None:
    """One token of every running job, booked on `fork`, if that is all there is to do and it fits.

    The fork hears only of positions that begin a block, which take one, and that fill a block, which others may then
    share. The chunks are built by one pass in C, since this runs for nearly every step there is.
    """
    size = fork.block_size
    last = size - 1
    for job in running:
        start = job.computed + job.in_flight
        if job.num_prompt + job.num_output - start != 1:
            return None
        place = start % size
        if (place == 0 or place == last) and not fork.reserve(job, start + 1):
            return None
    return tuple(
        map(as_chunk, zip(running, repeat(1), repeat(None), repeat("extend"), strict=False))
    )
