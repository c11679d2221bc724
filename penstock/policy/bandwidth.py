"""What serving a job in time takes, what it is worth, and who gets it: the arithmetic of JITServe, for three policies.

A step serves so many jobs at once (`slots`), one token each, and a step takes `unit_s` (the mean of the last ten, 20 ms
before there are any). A job that needs so many seconds of service, with so many left, needs that share of one slot from
now on: its bandwidth. Everything is arrays over jobs, in the order in which they were given.

    work_s     unit_s * (output tokens left + tokens to compute / step_tokens), of a call of an agent run with what is
               expected of its later calls
    left_s     until the whole answer (the run, less its tools' time) is due; for a stream, as long as it may take
    bandwidth  work_s / left_s of a deadline, unit_s / tpot_s of a stream that flows, tokens to compute / time left of
               one that has not begun
    worth      output tokens that will be in time: of a stream those behind the tokens that are lost until it has caught
               up, at unit_s each while they are due tpot_s apart; of a deadline all or nothing; of a run all of its
               answers. Times the promise's weight
    latest_at  the instant at which service must begin, if it is not to be interrupted afterwards

"Output tokens left" are asked for twice: a bound (which bandwidth is reserved for, the conditional P95) and the usual
(which worth and chances are judged by). Both are asked again after `renew_tokens` tokens, or when the answer has grown
beyond them. At most ASKED jobs are asked about a call; of the others the middle of those known is taken meanwhile.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from math import inf, nan
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from penstock.core.events import Arrived, Completed, Event, Finished, Stepped
from penstock.core.moving import Departed, Took
from penstock.core.types import Slo
from penstock.core.views import JobView, Lengths, Programs

Floats = NDArray[np.float64]
Places = NDArray[np.intp]
FIRST_UNIT_S, UNITS = 0.02, 10
ASKED = 16
MOST_RUNS = 4096  # numbers kept; a run whose number was forgotten gets a new one, and its calls are two runs
HOPELESS = 0.5  # tokens: below, nothing of a job can be in time any more
LEAST = 1e-6  # what is left of the worth of a job that cannot be in time; and the shortest time left, seconds
(
    TTFT, TPOT, DEADLINE, WEIGHT, ARRIVED, CAP, BOUND, USUAL, ASKED_AT, RUN,
    DUE, RUN_DUE, LATER, WAITS, OTHERS, MOST, IS_KNOWN,
) = range(17)  # fmt: skip
WIDTH = 17


class Asks(Protocol):
    """What of an order's or batch's view is needed here."""

    now: float
    lengths: Lengths
    programs: Programs


@dataclass(slots=True)
class Progress:
    """Where jobs stand: `seqs` are theirs. `next_at`: the instant the next token is due, of streams."""

    seqs: Places
    num_output: Floats
    todo: Floats
    first_at: Floats  # nan before the first token

    @classmethod
    def of(cls, jobs: Sequence[JobView]) -> Progress:
        return cls(
            np.array([job.seq for job in jobs], dtype=np.intp),
            np.array([job.num_output for job in jobs], dtype=np.float64),
            np.array([job.todo for job in jobs], dtype=np.float64),
            np.array([job.first_token_at for job in jobs], dtype=np.float64),  # None is nan
        )


@dataclass(slots=True)
class Needs:
    """See the module's text. `usual_s`: work_s by the usual lengths; of the calls of one run, of all those given.

    `is_stream`: promised token by token.
    """

    work_s: Floats
    usual_s: Floats
    bandwidth: Floats
    worth: Floats
    latest_at: Floats
    is_stream: NDArray[np.bool_]


class Docket:
    """What is known of each job from its arrival on, in a table that moves along with the live jobs."""

    def __init__(self, quantile: float, usual: float, renew_tokens: int, step_tokens: int) -> None:
        for name, value in (("quantile", quantile), ("usual", usual)):
            if not 0 < value < 1:
                raise ValueError(f"{name} must be in (0, 1), got {value}")
        for name, number in (("renew_tokens", renew_tokens), ("step_tokens", step_tokens)):
            if number < 1:
                raise ValueError(f"{name} must be at least 1, got {number}")
        self._quantiles = quantile, usual
        self._renew_tokens, self._step_tokens = renew_tokens, step_tokens
        self._table = np.zeros((WIDTH, 256))  # [what, job]
        self._first = 0  # seq of the first job
        self._live: dict[int, None] = {}
        self._of: dict[str, tuple[int, int]] = {}  # by request: seq of its first job, answers left
        self._numbers: dict[str, float] = {}  # of the runs that jobs under way belong to
        self._num_runs = 0
        self._launched_at: dict[int | None, float] = {}
        self._units: deque[float] = deque(maxlen=UNITS)
        self.unit_s = FIRST_UNIT_S

    # ---------------------------------------------------------------- hearing

    def observe(self, event: Event) -> None:
        if isinstance(event, Stepped):
            if event.plan is not None:
                self._launched_at[event.plan] = event.at
        elif isinstance(event, Completed):
            began_at = self._launched_at.pop(event.plan, None)
            if began_at is not None:
                lately = (began_at, *event.ends)[-UNITS - 1 :]  # of steps that ran as one, each
                self._units.extend([end - begin for begin, end in pairwise(lately)])
                self.unit_s = max(LEAST, sum(self._units) / len(self._units))
        elif isinstance(event, Arrived):
            self._of[event.request] = event.seq, event.n
            for seq in range(event.seq, event.seq + event.n):
                self._live[seq] = None
                self._note(seq, event.slo, event.at, event.max_tokens)
        elif isinstance(event, Took):
            seq, left = self._of.get(event.request, (0, 0))
            if left:  # it was asked for at another replica first
                self._row(seq)[ARRIVED] = event.at - event.age_s
        elif isinstance(event, Finished):
            self._end(event.request, event.answer)
        elif isinstance(event, Departed):
            self._end(event.request, 0)

    def _end(self, request: str, answer: int) -> None:
        first, left = self._of.get(request, (0, 0))
        if not left:
            return
        self._live.pop(first + answer, None)
        if left > 1:
            self._of[request] = first, left - 1
        else:
            del self._of[request]

    def _note(self, seq: int, slo: Slo, arrived_at: float, max_tokens: int) -> None:
        row = self._row(seq)
        bounds = [
            inf if each is None else each for each in (slo.ttft_s, slo.tpot_s, slo.deadline_s)
        ]
        row[: USUAL + 1] = (*bounds, slo.weight, arrived_at, max_tokens, nan, nan)
        row[ASKED_AT:] = 0.0
        row[IS_KNOWN] = 1.0

    def _row(self, seq: int) -> Floats:
        place, width = seq - self._first, self._table.shape[1]
        if place < 0:
            extra = width - place
            self._table = np.concatenate((np.zeros((WIDTH, extra)), self._table), axis=1)
            self._first -= extra
        elif place >= width:
            oldest = min(next(iter(self._live), self._first), seq)
            kept = self._table[:, max(0, oldest - self._first) :]
            table = np.zeros((WIDTH, max(256, 2 * (seq - oldest + 1))))
            num = min(kept.shape[1], table.shape[1])
            table[:, :num] = kept[:, :num]
            self._table, self._first = table, oldest
        found: Floats = self._table[:, seq - self._first]
        return found

    # ---------------------------------------------------------------- judging

    def needs(self, view: Asks, jobs: Sequence[JobView], progress: Progress) -> Needs:
        """Of `jobs`, whose state `progress` holds."""
        told = self._told(view, jobs, progress)
        written, unit_s = progress.num_output, self.unit_s
        prompt_s = unit_s * np.where(progress.todo > 1, progress.todo / self._step_tokens, 0.0)
        cap, is_run = told[CAP], told[RUN] > 0
        tokens = np.clip(np.minimum(told[BOUND], cap) - written, 1.0, None)
        usual = np.clip(np.minimum(told[USUAL], cap) - written, 1.0, None)
        later_s = unit_s * told[LATER]
        own_s = prompt_s + unit_s * tokens
        needs = Needs(
            work_s=own_s + unit_s * told[MOST],
            usual_s=prompt_s + unit_s * usual + later_s,
            bandwidth=np.zeros(len(written)),
            worth=usual.copy(),
            latest_at=np.full(len(written), inf),
            is_stream=(np.minimum(told[TTFT], told[TPOT]) < inf) & ~is_run,
        )
        _promise_streams(needs, told, progress, view.now, (unit_s, prompt_s))
        run_due_at = told[RUN_DUE] - told[WAITS]
        due_at = np.where(is_run, run_due_at, told[ARRIVED] + told[DEADLINE])
        has_deadline = due_at < inf
        left_s = np.maximum(due_at - view.now, LEAST)
        share = np.where(has_deadline, needs.work_s / left_s, 0.0)
        needs.bandwidth = np.maximum(needs.bandwidth, share)
        whole = usual + written + told[OTHERS]
        chance = np.where(needs.usual_s <= left_s, 1.0, LEAST)
        is_whole = has_deadline & ~needs.is_stream
        needs.worth = np.where(is_whole, whole, needs.worth) * np.where(has_deadline, chance, 1.0)
        needs.worth *= told[WEIGHT]
        if is_run.any():
            _share(needs.usual_s, told[RUN], later_s)
        latest_at = np.where(has_deadline, due_at - needs.work_s, inf)
        latest_at = np.minimum(latest_at, np.where(is_run, told[DUE] - own_s, inf))
        needs.latest_at = np.minimum(needs.latest_at, latest_at)
        return needs

    def _told(self, view: Asks, jobs: Sequence[JobView], progress: Progress) -> Floats:
        """The columns of these jobs, with lengths that are not too old."""
        places = progress.seqs - self._first
        if len(places) and not (0 <= places.min() and places.max() < self._table.shape[1]):
            for job in jobs:
                self._row(job.seq)
            places = progress.seqs - self._first
        table = self._table
        for at in np.flatnonzero(table[IS_KNOWN].take(places) == 0.0).tolist():  # nobody told of it
            job = jobs[at]
            self._note(job.seq, job.request.slo, job.arrived_at, job.max_tokens)
        told: Floats = table.take(places, axis=1)
        bound, written = told[BOUND], progress.num_output
        with np.errstate(invalid="ignore"):
            is_old = ~(bound > written) | (told[ASKED_AT] + self._renew_tokens <= written)
        asked = np.flatnonzero(is_old)[:ASKED]
        if len(asked):
            self._ask(view, [jobs[at] for at in asked.tolist()])
            told[:, asked] = table[:, places[asked]]
        is_unknown = np.isnan(bound)
        if is_unknown.any():
            for column in (BOUND, USUAL):
                known = told[column, ~is_unknown]
                told[column, is_unknown] = np.partition(known, len(known) // 2)[len(known) // 2]
        return told

    def _number(self, program: str) -> float:
        """A number for a run, so that its calls can be told from others in arrays."""
        found = self._numbers.get(program)
        if found is None:
            if len(self._numbers) >= MOST_RUNS:
                del self._numbers[next(iter(self._numbers))]
            self._num_runs += 1
            found = self._numbers[program] = float(self._num_runs)
        return found

    def _ask(self, view: Asks, jobs: Sequence[JobView]) -> None:
        quantile, usual = self._quantiles
        bounds = view.lengths.quantiles(jobs, quantile)
        likely = view.lengths.quantiles(jobs, usual)
        for job, *lengths in zip(jobs, bounds, likely, strict=True):
            row = self._row(job.seq)
            row[CAP : ASKED_AT + 1] = (job.max_tokens, *lengths, job.num_output)
            outlook = view.programs.outlook(job)
            if outlook is not None:
                row[RUN:IS_KNOWN] = (
                    self._number(str(job.request.program)),
                    outlook.due_at,
                    outlook.deadline_at,
                    outlook.tokens_left,
                    outlook.waits_s,
                    outlook.others,
                    outlook.tokens_most,
                )


def _share(seconds: Floats, runs: Floats, later_s: Floats) -> None:
    """What the calls of a run need together stands with each of them; its later calls count once."""
    places = np.flatnonzero(runs)
    _, group = np.unique(runs[places], return_inverse=True)
    own = np.bincount(group, weights=(seconds - later_s)[places])
    seconds[places] = own[group] + later_s[places]


def _promise_streams(
    needs: Needs, told: Floats, progress: Progress, now: float, seconds: tuple[float, Floats]
) -> None:
    """Fill in what streams need; `seconds`: of a step, and of each job's prompt."""
    unit_s, prompt_s = seconds
    has_begun = ~np.isnan(progress.first_at)
    gap_s, written = told[TPOT], progress.num_output
    with np.errstate(invalid="ignore", divide="ignore"):
        flowing_at = progress.first_at + gap_s * written
        begin_at = told[ARRIVED] + told[TTFT]
        next_at = np.where(has_begun, flowing_at, begin_at)
        late_s = np.maximum(0.0, now + unit_s + prompt_s - next_at)
        lost = np.where(gap_s > unit_s, late_s / (gap_s - unit_s), np.where(late_s > 0, inf, 0.0))
        share = np.maximum(unit_s / gap_s, prompt_s / np.maximum(next_at - now, LEAST))
    stream = needs.is_stream
    needs.worth = np.where(stream, np.maximum(needs.worth - lost, LEAST), needs.worth)
    needs.bandwidth = np.where(stream, share, needs.bandwidth)
    needs.latest_at = np.where(stream, next_at - unit_s - prompt_s, needs.latest_at)


def reserve(needs: Needs, slots: float, is_by_bandwidth: bool) -> tuple[NDArray[np.bool_], Floats]:
    """Who gets bandwidth, dearest first until `slots` are taken, and everybody's score (higher is dearer)."""
    per = needs.bandwidth if is_by_bandwidth else needs.usual_s
    score = needs.worth / np.maximum(per, LEAST)
    by_score = np.argsort(-score, kind="stable")
    taken = np.cumsum(np.minimum(needs.bandwidth[by_score], 1.0))
    is_reserved = np.zeros(len(score), dtype=bool)
    is_reserved[by_score[taken <= slots]] = True
    is_reserved &= needs.worth > HOPELESS
    return is_reserved, score
