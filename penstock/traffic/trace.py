"""A trace: rows of a file turned into requests, in time order, with an account of what was left out.

Rules
- `at_s` counts from the first kept row and is divided by `speed`. A row earlier than the one before it is moved to
  that one's instant and counted (`num_late`): the published files are sorted but for a few rows.
- A file without times needs `rate_per_s`: arrivals are then a Poisson process drawn from the stream of `seed`.
- `true_output` is the traced output length. No policy sees it; `sampling.max_tokens` they do see, and it is the
  stated cap (4,096 unless told), clipped to what `max_context` leaves. With max_tokens="trace" it is the traced length.
- Ids are the file's stem and the number of the row in it, so any run names a request alike.
- Reading is lazy, AT_ONCE rows at a time: memory does not grow with the file. `meta` counts as rows are read and is
  whole when the trace ends.
- A workload file (`.toml`, see `traffic.workload`) is a trace whose rows are generated as they are read, from the same
  `seed`. Callers that wait for answers come as a `Workflow` at its first instant; `speed` moves that instant, thinking
  takes as long as ever. `limit` counts requests, and the workflow that reaches it is yielded whole.
- A promise by tenant wins, then the file's own, then `slo`.
"""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from itertools import islice
from pathlib import Path
from typing import Literal, TypedDict, Unpack

from penstock.core.errors import BadTrace
from penstock.core.images import parts_of
from penstock.core.prompt import TracedPrompt
from penstock.core.rng import stream
from penstock.core.types import ProgramId, Request, RequestId, Sampling, Slo
from penstock.traffic.custom import Columns
from penstock.traffic.formats import WORKLOAD, reader_of
from penstock.traffic.promises import Promise, promise_to
from penstock.traffic.rows import UNREADABLE, Drop, Flow, Found, Row, Source, open_text
from penstock.traffic.workflow import Call, Workflow

CHARS_PER_TOKEN = 4
MAX_TOKENS = 4096
AT_ONCE = 64  # rows read together: what reads them stays in the processor's caches
Item = Request | Workflow


class NoArrivals(BadTrace):
    """The rows have no instants, and no rate was stated."""


def estimate_tokens(text: str) -> int:
    """A guess for when no tokenizer is at hand: four characters a token, rounded up."""
    return -(-len(text) // CHARS_PER_TOKEN)


@dataclass(slots=True)
class TraceMeta:
    """What a trace held. rows_read = rows_kept + the sum of `drops`; `shown` is the first row nobody could read."""

    path: str
    format: str
    rows_read: int = 0
    rows_kept: int = 0
    drops: dict[str, int] = field(default_factory=dict)
    shown: str | None = None
    num_late: int = 0
    prompt_tokens: int = 0
    output_tokens: int = 0
    last_at_s: float = 0.0
    is_whole: bool = False
    notes: list[str] = field(default_factory=list)

    def reasons(self) -> list[tuple[str, int]]:
        """Why rows were dropped and how many, the most frequent first."""
        return sorted(self.drops.items(), key=lambda item: -item[1])

    def __str__(self) -> str:
        told = f"{self.path} ({self.format}): {self.rows_kept} requests of {self.rows_read} rows"
        if self.drops:
            told += "; dropped " + ", ".join(f"{count} ({why})" for why, count in self.reasons())
        if self.num_late:
            told += f"; {self.num_late} out of order, moved to their predecessor's instant"
        return "; ".join((told, *self.notes))


class TraceOptions(TypedDict, total=False):
    """The keywords of `open_trace`; see Trace for meanings and defaults."""

    format: str | None
    columns: Columns | None
    limit: int | None
    speed: float
    seed: int
    max_tokens: int | Literal["trace"]
    max_context: int | None
    model: str
    rate_per_s: float | None
    slo: Slo
    promises: Sequence[Promise]
    count_tokens: Callable[[str], int] | None


@dataclass(kw_only=True)
class Trace:
    """Iterate for (at_s, Request) and (at_s, Workflow); every iteration starts again and gives the same.

    limit: requests to yield. speed: 2.0 plays twice as fast. max_context: rows whose prompt leaves no room for a
    token are dropped. slo: the promise stated for requests whose tenant fits none of `promises`. columns: which columns
    of a CSV of one's own mean what. count_tokens: sizes texts, None estimates.
    """

    path: Path
    format: str | None = None
    columns: Columns | None = None
    limit: int | None = None
    speed: float = 1.0
    seed: int = 0
    max_tokens: int | Literal["trace"] = MAX_TOKENS
    max_context: int | None = None
    model: str = "default"
    rate_per_s: float | None = None
    slo: Slo = Slo()
    promises: Sequence[Promise] = ()
    count_tokens: Callable[[str], int] | None = None
    meta: TraceMeta = field(init=False)

    def __post_init__(self) -> None:
        for name, value in (("speed", self.speed), ("rate", self.rate_per_s)):
            if value is not None and not 0 < value < math.inf:
                raise BadTrace(f"the {name} of a trace must be positive and finite, got {value}")
        for name, number in (("limit", self.limit), ("max_tokens", self.max_tokens)):
            if isinstance(number, int) and number < 1:
                raise BadTrace(f"{name} must be at least 1, got {number}")
        self.format, self._reader = reader_of(self.path, self.format, self.columns)
        self._stem = re.sub(r"[^\w.-]+", "-", self.path.name.partition(".")[0])
        self.meta = self._fresh_meta()

    def __iter__(self) -> Iterator[tuple[float, Item]]:
        timed = self.timed()
        while some := list(islice(timed, AT_ONCE)):
            yield from [(at_s, self._item(number, found)) for number, at_s, found in some]

    def _item(self, number: int, found: Row | Flow) -> Item:
        if isinstance(found, Row):
            return self._request(RequestId(f"{self._stem}-{number}"), found)
        return self._workflow(number, found)

    def timed(self) -> Iterator[tuple[int, float, Row | Flow]]:
        """(number in the file, instant, what is kept): what iterating makes requests of. Begins a new `meta`."""
        meta = self.meta = self._fresh_meta()
        for number, found in self._found(meta):
            at_s = self._instant(found)
            if at_s < meta.last_at_s:
                meta.num_late += 1
            at_s = meta.last_at_s = max(at_s, meta.last_at_s)
            for row in rows_of(found):
                meta.prompt_tokens += row.num_prompt
                meta.output_tokens += row.num_output
            yield number, at_s, found

    def sha256(self) -> str:
        """Digest of the file, to name it in a report."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()

    def _fresh_meta(self) -> TraceMeta:
        assert self.format is not None
        meta = TraceMeta(str(self.path), self.format)
        self._first_at: float | None = None
        self._drawn_at = 0.0
        self._arrivals = stream(self.seed, "traffic", "arrivals")
        if self.format == "sharegpt" and self.count_tokens is None:
            meta.notes.append(f"token counts are estimates ({CHARS_PER_TOKEN} characters a token)")
        if self.rate_per_s is not None:
            meta.notes.append(f"Poisson arrivals at {self.rate_per_s:g}/s, seed {self.seed}")
        return meta

    def _found(self, meta: TraceMeta) -> Iterator[tuple[int, Row | Flow]]:
        """What is kept with its number in the file, counting all that pass. Instants are the file's own."""
        count = self.count_tokens or estimate_tokens
        source = Source(str(self.path), count, self.seed, self.rate_per_s)
        with open_text(self.path) as file:
            try:
                for number, told in enumerate(self._reader(file, source)):
                    if self.limit is not None and meta.rows_kept >= self.limit:
                        return
                    kept = self._fit(told, meta)
                    if kept is not None:
                        yield number, kept
            except UNREADABLE as error:
                raise BadTrace(
                    f"the trace {self.path} cannot be read past row {meta.rows_read}: {error}"
                ) from None
            except RecursionError:
                raise BadTrace(
                    f"{self.path} is a trace of itself", hint="look at what its `trace` keys name"
                ) from None
        meta.is_whole = True
        if not meta.rows_kept:
            hint = "" if meta.shown is None else f"first bad row: {meta.shown!r}"
            raise BadTrace(f"nothing to play: {meta}", hint=hint)

    def _fit(self, found: Found, meta: TraceMeta) -> Row | Flow | None:
        """Count it, and give back what of it can be asked for."""
        if isinstance(found, Flow):
            return self._fit_flow(found, meta)
        meta.rows_read += 1
        if isinstance(found, Row) and not self._fits(found):
            found = Drop(self._too_long())
        if isinstance(found, Row):
            meta.rows_kept += 1
            return found
        meta.drops[found.reason] = meta.drops.get(found.reason, 0) + 1
        if meta.shown is None and found.shown is not None:
            meta.shown = found.shown[:200]
        return None

    def _fit_flow(self, flow: Flow, meta: TraceMeta) -> Flow | None:
        """A conversation ends before the turn that does not fit; a program that does not fit is not begun."""
        num = len(flow.steps)
        meta.rows_read += num
        fitting = next((i for i, step in enumerate(flow.steps) if not self._fits(step.row)), num)
        if flow.kind != "session" and fitting < num:
            fitting = 0
        meta.rows_kept += fitting
        if fitting < num:
            reason = self._too_long()
            meta.drops[reason] = meta.drops.get(reason, 0) + num - fitting
        return flow._replace(steps=flow.steps[:fitting]) if fitting else None

    def _fits(self, row: Row) -> bool:
        return self.max_context is None or row.num_prompt < self.max_context

    def _too_long(self) -> str:
        return f"prompt does not fit a context of {self.max_context}"

    def _instant(self, found: Row | Flow) -> float:
        if (
            self.format == WORKLOAD
        ):  # its zero is the first possible arrival, and it took the rate itself
            assert found.at_s is not None
            return found.at_s / self.speed
        if self.rate_per_s is not None:
            if self._first_at is None:
                self._first_at = 0.0
            else:
                self._drawn_at += self._arrivals.expovariate(self.rate_per_s)
            return self._drawn_at / self.speed
        if found.at_s is None:
            raise NoArrivals(
                f"the trace {self.path} has no arrival times",
                hint="state a mean rate for Poisson arrivals (--rate, requests a second)",
            )
        if self._first_at is None:
            self._first_at = found.at_s
        return (found.at_s - self._first_at) / self.speed

    def _workflow(self, number: int, flow: Flow) -> Workflow:
        id = f"{self._stem}-{number}"
        session = None if flow.kind == "call" else id
        calls = [
            Call(
                request=self._request(
                    RequestId(f"{id}.{place}"),
                    step.row if session is None else step.row._replace(session=session),
                ),
                after=step.after,
                wait_s=step.wait_s,
                abandon_s=step.abandon_s,
            )
            for place, step in enumerate(flow.steps)
        ]
        return Workflow(id=ProgramId(id), kind=flow.kind, calls=tuple(calls))

    def _request(self, id: RequestId, row: Row) -> Request:
        room = None if self.max_context is None else self.max_context - row.num_prompt
        cap = row.num_output if self.max_tokens == "trace" else self.max_tokens
        slo, priority = self.slo if row.slo is None else row.slo, row.priority or 0
        promise = promise_to(row.tenant, self.promises) if self.promises else None
        if promise is not None:
            slo, priority = promise.slo, promise.priority
        return Request(
            id=id,
            model=self.model,
            prompt=TracedPrompt(row.num_prompt, row.hash_ids, row.traced_size),
            sampling=sampling_of(cap if room is None else min(cap, room)),
            slo=slo,
            priority=priority,
            tenant=row.tenant,
            program=None if row.session is None else ProgramId(row.session),
            true_output=row.num_output,
            parts=parts_of(row.images, row.num_prompt) if row.images else (),
        )


@lru_cache(maxsize=4096)
def sampling_of(max_tokens: int) -> Sampling:
    """Requests that ask alike share it: making one costs as much as the rest of a request."""
    return Sampling(max_tokens=max_tokens)


def rows_of(found: Row | Flow) -> Sequence[Row]:
    return (found,) if isinstance(found, Row) else [step.row for step in found.steps]


def open_trace(path: Path | str, **options: Unpack[TraceOptions]) -> Trace:
    """A trace of the format named or recognised. Raises BadTrace with what to do when it cannot be read."""
    return Trace(path=Path(path), **options)
