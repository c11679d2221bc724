"""Guesses from a job's own text: what followed when its last tokens stood there before.

Of the runs of `longest` down to `shortest` last tokens the longest one that stood there before counts, its latest place
counts, and the tokens behind it are the guess. Where they run into the present the guess goes on with itself, as in
LZ77, so that a pattern which repeats every three tokens is guessed as far as one likes.

A text is indexed as it grows: (longest - shortest + 1) entries a token, so a step costs the same for long texts and for
short ones. An index is made when a job is asked about for the first time; the prompt's part in one pass of arrays.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import NDArray

from penstock.engine.torch.jobs import JobState, JobTable

MANY = 64  # tokens from which on arrays are faster than a loop

Ids = NDArray[np.int32]


class Text:
    """Where each run of tokens stood last: `places` has the position behind it. Indexed up to `num` tokens."""

    __slots__ = ("places", "num")

    def __init__(self) -> None:
        self.places: dict[bytes, int] = {}
        self.num = 0

    def index(self, ids: Ids, lengths: Sequence[int]) -> None:
        """Take in the runs that end before the last token; the one that ends with it has nothing behind it yet."""
        first, end = self.num, len(ids)
        for length in lengths:
            begin = max(first, length)
            if end - begin > MANY:
                self._index_many(ids[begin - length : end - 1], begin, length)
            else:
                for behind in range(begin, end):
                    self.places[ids[behind - length : behind].tobytes()] = behind
        self.num = end

    def _index_many(self, ids: Ids, begin: int, length: int) -> None:
        runs = np.lib.stride_tricks.sliding_window_view(ids, length)
        keys = np.ascontiguousarray(runs).view(f"V{4 * length}").ravel().tolist()
        self.places.update(zip(keys, range(begin, begin + len(keys)), strict=True))

    def guess(self, ids: Ids, lengths: Sequence[int], most: int) -> list[int]:
        known = len(ids)
        for length in lengths:
            if length < known:
                place = self.places.get(ids[known - length :].tobytes())
                if place is not None:
                    period = known - place
                    behind: list[int] = ids[place : place + most].tolist()
                    return [behind[at % period] for at in range(most)]
        return []


class Ngrams:
    """See the module's text."""

    def __init__(self, shortest: int = 2, longest: int = 4) -> None:
        assert 1 <= shortest <= longest
        self._lengths = range(longest, shortest - 1, -1)
        self._texts: dict[int, Text] = {}

    def propose(
        self, table: JobTable, jobs: Sequence[JobState], most: Sequence[int]
    ) -> list[list[int]]:
        found = []
        for job, count in zip(jobs, most, strict=True):
            text = self._texts.get(job.seq)
            if text is None or job.known < text.num:  # or an aborted plan's tokens were forgotten
                text = self._texts[job.seq] = Text()
            ids = table.tokens[job.row, : job.known]
            text.index(ids, self._lengths)
            found.append(text.guess(ids, self._lengths, count))
        return found

    def close(self, seq: int) -> None:
        self._texts.pop(seq, None)
