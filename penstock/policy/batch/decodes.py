"""Plain decode steps, shared by the batch policies: one token of every running job."""

from __future__ import annotations

from collections.abc import Sequence

from penstock.core.views import JobView, LedgerFork, Singles


def is_quiet(start: int, block_size: int) -> bool:
    """Whether the position `start` of a running job neither begins a block nor fills one: then a fork need not hear."""
    return 0 < start % block_size < block_size - 1


def all_decodes(running: Sequence[JobView], fork: LedgerFork) -> Singles | None:
    """One token of every running job, booked on `fork`, if that is all there is to do and it fits.

    The fork hears only of positions that begin a block, which take one, and that fill a block, which others may then
    share.
    """
    size = fork.block_size
    last = size - 1
    for job in running:
        start = job.computed + job.in_flight
        if job.num_prompt + job.num_output - start != 1:
            return None
        if not job.num_output and job.request.kind != "generate":
            return None
        place = start % size
        if (place == 0 or place == last) and not fork.reserve(job, start + 1):
            return None
    return Singles(tuple(running))
