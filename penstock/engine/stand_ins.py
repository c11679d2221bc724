"""Jobs that nobody asked for and no policy sees: they hold cached blocks while somebody reads or writes them.

Their numbers go down from -1, as they are nobody's arrival; the executor never hears of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from penstock.core.prompt import HashedPrompt
from penstock.core.types import BlockHash, Job, Request, RequestId
from penstock.engine.parts import Parts


class StandIns:
    """One per replica. `answers`, of those who use them, are given at the end of a turn."""

    def __init__(self, parts: Parts, take_blocks: Callable[[], None]) -> None:
        """`take_blocks`: what plans under way will need is taken before others get blocks."""
        self._parts, self._take_blocks = parts, take_blocks
        self._count = 0
        self.answers: list[Callable[[], None]] = []

    def make(self, names: Sequence[BlockHash]) -> Job:
        """A job of these blocks, which holds those of the first ones that are on the device."""
        ledger = self._parts.ledger
        self._count += 1
        tokens = len(names) * ledger.block_size + 1  # one is always left to compute
        prompt = HashedPrompt(tokens, tuple(names), ledger.block_size)
        job = Job(
            seq=-self._count,
            request=Request(id=RequestId("blocks"), model="", prompt=prompt),
            answer=0,
            arrived_at=0.0,
            hashes=list(names),
            num_prompt=tokens,
            max_tokens=1,
        )
        self._parts.roster.stand_ins.add(job.seq)
        self._take_blocks()
        ledger.adopt(job)
        return job

    def end(self, job: Job, upto: int) -> None:
        """Let its blocks go; what lies behind position `upto` was never written."""
        self._parts.ledger.release(job, upto)
        self._parts.roster.stand_ins.remove(job.seq)
