"""Plain decode steps, shared by the batch policies: one token of every running job."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from itertools import repeat

from penstock.core.views import Chunk
from penstock.policy.batch import View

as_chunk: Callable[[Iterable[object]], Chunk] = partial(tuple.__new__, Chunk)


def all_decodes(view: View) -> tuple[Chunk, ...] | None:
    """One token of every running job, if that is all there is to do and it fits; the common case, kept cheap.

    A job needs a block only when its position starts one; the position is in a block it holds otherwise. The chunks
    are built by one pass in C: this runs for nearly every step there is, and building them one by one takes half of it.
    """
    fork = view.ledger.fork()
    size = fork.block_size
    for job in view.running:
        start = job.computed + job.in_flight
        if job.num_prompt + job.num_output - start != 1:
            return None
        if start % size == 0 and not fork.reserve(job, start + 1):
            return None
    fields = zip(view.running, repeat(1), repeat(None), repeat("extend"), strict=False)
    return tuple(map(as_chunk, fields))
