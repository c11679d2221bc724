"""Guesses of the next tokens, and what becomes of them: speculative decoding inside the executor.

    ngram     guesses from the job's own text        model     guesses from a smaller model
    verify    guesses enter the step, and what of them was right comes out

**A guess never changes a text.** The row of every position draws its token as it would without guesses: from its own
logits, with its own chance (seed, answer, position), after the penalties, bans and grammar of all tokens before it. A
guess is right if it is that token. So the answer is what plain decoding writes, seed by seed, and not only drawn from
the same distribution. A guess x is right with its probability p(x), as often as rejection sampling accepts a guess that
is certain of itself; a model that guesses draws with the same chance, so that two similar distributions mostly draw the
same token.

What holds for text of different batch shapes holds here too: logits of a position come from kernels for more rows, and
may differ in their last bits, so two equally good tokens may change places (docs/serving.md).

Keys and values of wrong guesses stay in their slots until other tokens take these; nobody reads that far before.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

from penstock.engine.torch.jobs import JobState, JobTable


class Drafter(Protocol):
    """Whoever guesses. All calls come from the lane's thread."""

    def propose(
        self, table: JobTable, jobs: Sequence[JobState], most: Sequence[int]
    ) -> list[list[int]]:
        """Up to most[i] tokens that may follow what jobs[i] knows, for each of them; none is an answer too."""
        ...

    def close(self, seq: int) -> None:
        """The job has ended; whoever is not known is ignored."""
        ...
