"""A trace held in arrays, to fit and to compare: when each request came, how long it was, whose conversation it was."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from penstock.core.errors import BadTrace
from penstock.core.types import Request
from penstock.traffic.lengths import Pairs
from penstock.traffic.process import Floats
from penstock.traffic.rows import Row


@dataclass(frozen=True, slots=True)
class Sample:
    """Requests by arrival. `end_s` is the last arrival unless the span is known to be longer."""

    at_s: Floats
    pairs: Pairs
    tenants: tuple[str, ...]
    sessions: tuple[str | None, ...]
    end_s: float

    def __len__(self) -> int:
        return len(self.at_s)

    @property
    def mean_rate_per_s(self) -> float:
        return len(self.at_s) / self.end_s if self.end_s > 0 else float("nan")

    @classmethod
    def of_rows(cls, rows: Iterable[Row], *, end_s: float | None = None) -> Sample:
        """From generated or traced rows with instants; with `end_s`, those before it. Raises BadTrace without any."""
        kept = list(_before(rows, end_s))
        if not kept:
            raise BadTrace("there are no requests to look at")
        at = np.array([row.at_s for row in kept], np.float64)
        pairs = np.array([(row.num_prompt, row.num_output) for row in kept], np.int64)
        tenants, sessions = tuple(row.tenant for row in kept), tuple(row.session for row in kept)
        return cls(at, pairs, tenants, sessions, float(at[-1]) if end_s is None else end_s)

    @classmethod
    def of_trace(cls, trace: Iterable[tuple[float, object]]) -> Sample:
        """From `open_trace(...)`. Raises BadTrace for callers that wait for answers: their instants depend on those."""
        return cls.of_rows(_row(at_s, item) for at_s, item in trace)


def _before(rows: Iterable[Row], end_s: float | None) -> Iterator[Row]:
    for row in rows:
        if row.at_s is None:
            raise BadTrace(
                "a file without arrival times cannot be fitted",
                hint="its lengths can be: fit_lengths",
            )
        if end_s is not None and row.at_s >= end_s:
            return
        yield row


def _row(at_s: float, item: object) -> Row:
    if not isinstance(item, Request):
        raise BadTrace("a trace whose callers wait for answers has no arrivals to fit")
    row = Row(at_s, item.prompt.num_tokens, item.true_output or 1, item.tenant)
    return row if item.program is None else row._replace(session=str(item.program))
