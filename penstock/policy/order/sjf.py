"""Shortest job first, by what is left of it, and waiting makes a job shorter.

Source: highest response ratio next (P. Brinch Hansen, "Short-term scheduling in multiprogramming systems", SOSP 1971;
in SGLang 0.5.23 as schedule policy hrrn), with shortest job first at its other end.

Idea: mean waiting is least when the shortest go first, but a steady stream of short jobs starves the long ones. So rank
by the wait in units of the job's own size, with a start that all jobs are given:

    size(job)  = predicted prefill of all it has to compute + (expected length - output so far) * predicted decode
    rank by      (patience_s + time waited) / size, highest first

With patience_s = 0 that is highest response ratio next, with a large one shortest job first until jobs have waited
about that long. Nobody starves: once a job has waited w, a newcomer overtakes it only if it is smaller by the factor 1
+ w / patience_s, and sizes are bounded.

Parameters
    patience_s   seconds, default 10; None = never mind the wait, plain shortest job first (the long may starve)
    quantile     of the output length to expect, in (0, 1), default 0.5

Where we differ: Brinch Hansen's jobs tell their size; ours is predicted, alone on the machine, from what recent answers
have told (view.lengths). SGLang's ratio counts uncached prompt tokens only. A preempted job counts with what is left
and what must be computed again. Prefills are interpolated between 9 sizes, one decode step stands for all. Lengths
are asked for of at most 32 newcomers a call (others of them count as middling meanwhile) and again every 64 calls.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from penstock.core.views import Chunk, Columns
from penstock.policy.order import STABLE, Decision, View, in_order
from penstock.policy.order.sizes import prefills_s

POINTS = 9
ASKED = 32
CALLS = 64  # after which a job's length is asked for again
LEAST_S = 1e-9  # of a size, so that nothing is divided by zero


@dataclass(slots=True)
class Sjf:
    patience_s: float | None = 10.0
    quantile: float = 0.5
    _seqs: NDArray[np.float64] = field(init=False, repr=False, compare=False)
    _left: NDArray[np.float64] = field(init=False, repr=False, compare=False)  # tokens, of _seqs
    _next: int = field(init=False, default=0, repr=False)  # place of the next to renew

    def __post_init__(self) -> None:
        if not 0 < self.quantile < 1:
            raise ValueError(f"quantile must be in (0, 1), got {self.quantile}")
        if self.patience_s is not None and self.patience_s < 0:
            raise ValueError(f"patience_s must not be negative, got {self.patience_s}")
        self._seqs = self._left = np.empty(0)

    def decide(self, view: View) -> Decision:
        waiting = view.waiting
        if len(waiting) < 2:
            return Decision(waiting, stable_for=STABLE)
        columns = view.columns()
        left = self._expected(view, columns)
        decode_s = view.cost.predict((Chunk(waiting[len(waiting) // 2], 1),))
        size = np.maximum(prefills_s(view, columns["todo"], POINTS) + left * decode_s, LEAST_S)
        if self.patience_s is None:
            ranks = np.argsort(size, kind="stable")
        else:
            waited = view.now - columns["arrived_at"]
            ranks = np.argsort(-(self.patience_s + waited) / size, kind="stable")
        return Decision(in_order(waiting, ranks))

    def _expected(self, view: View, columns: Columns) -> NDArray[np.float64]:
        """Tokens each waiting job is expected to write still."""
        seqs = columns["seq"]
        left = self._remembered(seqs)
        newcomers = np.flatnonzero(np.isnan(left))[:ASKED]
        renewed = (self._next + np.arange(min(ASKED, 1 + len(left) // CALLS))) % len(left)
        self._next = int(renewed[-1]) + 1
        places = np.concatenate((newcomers, renewed))
        asked = [view.waiting[place] for place in places.tolist()]
        lengths = np.array(view.lengths.quantiles(asked, self.quantile), dtype=np.float64)
        lengths = np.minimum(lengths, columns["max_tokens"][places])
        left[places] = np.maximum(1.0, lengths - columns["num_output"][places])
        self._seqs, self._left = seqs.copy(), left
        is_unknown = np.isnan(left)
        if is_unknown.any():
            usual = np.median(left[~is_unknown])
            left = np.where(is_unknown, np.minimum(usual, columns["max_tokens"]), left)
        return left

    def _remembered(self, seqs: NDArray[np.float64]) -> NDArray[np.float64]:
        """What was expected in the call before, of those who were waiting then; nan of the others."""
        if not len(self._seqs):
            return np.full(len(seqs), np.nan)
        if np.array_equal(seqs, self._seqs):
            return self._left
        by_seq = np.argsort(self._seqs, kind="stable")  # nearly in order: that is the fast kind
        known = self._seqs[by_seq]
        places = np.minimum(np.searchsorted(known, seqs), len(known) - 1)
        return np.where(known[places] == seqs, self._left[by_seq][places], np.nan)
