"""From answers at the client and the engine's log of the same run to the constants of cost.serving.

Each answer is found in the log by its id: when the replica heard of it, and when the steps ended that gave its first
and its last token. What lies before, between client and replica, is the request's way; what comes after each of
the two steps is the reply's. The engine's cycles are those of the log.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from penstock.core.errors import StepFailed
from penstock.core.events import Arrived, Completed, Event
from penstock.cost.fitted import TERMS, Fitted, fit_steps, solve_relative
from penstock.cost.jitter import kind_of, scatter_of
from penstock.cost.profile import SchedulerCost
from penstock.cost.serving import ServingCost
from penstock.lab.refit import Cycle, cycles_of_log
from penstock.lab.serving import Answered

# Prompts that nobody sent before are read from their beginning: then what prefill chunks read is what they compute, and
# the two terms cannot be told apart.
SERVED = tuple(name for name in TERMS if name != "prefill_context")
FEWEST = 30  # answers that a fit of three constants needs
IDLE_S = 0.05  # after so long without work a step counts as a cold one
LEAST_S = 1e-5  # a way is taken to last at least so long: clocks of one millisecond may show less than nothing
Told = tuple[float, int]  # when a step ended, and how many tokens it gave


@dataclass(slots=True)
class _Seen:
    """What the log says of the requests, by their ids."""

    heard_at: dict[str, float] = field(default_factory=dict)
    first: dict[str, Told] = field(default_factory=dict)
    last: dict[str, Told] = field(default_factory=dict)


def _seen(events: Iterable[Event]) -> _Seen:
    seen, names = _Seen(), dict[int, str]()
    for event in events:
        if isinstance(event, Arrived):
            names[event.seq] = event.request
            seen.heard_at[event.request] = event.at
        elif isinstance(event, Completed):
            gave = [seq for seq, tokens, _, _ in event.outputs if tokens]
            for seq in gave:
                told = event.at, len(gave)
                seen.first.setdefault(names[seq], told)
                seen.last[names[seq]] = told
    return seen


def serving_cost(
    answers: Sequence[Answered],
    events: Sequence[Event],
    scheduler: SchedulerCost,
    *,
    measured: str = "",
    neighbours: float | None = None,
) -> ServingCost:
    """Fit all constants. Raises StepFailed when there is too little to fit."""
    seen = _seen(events)
    known = [one for one in answers if one.id in seen.last]
    if len(known) < FEWEST:
        raise StepFailed(
            f"only {len(known)} answers came while serving was measured; a fit needs {FEWEST}",
            hint="this machine is slow or very busy: leave it alone, or calibrate without --quick",
        )
    request = [(1.0, one.num_prompt, one.others) for one in known]
    request_s = [seen.heard_at[one.id] - one.sent_at for one in known]
    reply, reply_s = [], []
    for one in known:
        for (ended_at, num_tokens), read_at in (
            (seen.first[one.id], one.first_at),
            (seen.last[one.id], one.last_at),
        ):
            reply.append((1.0, num_tokens))
            reply_s.append(read_at - ended_at)
    ways = [*_ways(request, request_s), *_ways(reply, reply_s)]
    cycles = cycles_of_log(events)
    warm = [one for one in cycles if one.idle_s < IDLE_S]
    bare_s = _bare(warm, scheduler)
    fit = fit_steps([one.features for one in warm], bare_s, terms=SERVED)
    return ServingCost(
        request_s=ways[0],
        request_token_s=ways[1],
        request_other_s=ways[2],
        reply_s=ways[3],
        reply_token_s=ways[4],
        steps=fit.coefficients,
        cold_s=_cold_s(
            fit.coefficients, [one for one in cycles if one.idle_s >= IDLE_S], scheduler
        ),
        scatter=_scatter(fit.coefficients, warm, bare_s),
        num_steps=fit.num_steps,
        num_answers=len(known),
        mape=fit.mape,
        left_out=fit.left_out,
        neighbours=neighbours,
        measured=measured,
    )


def _bare(cycles: Sequence[Cycle], scheduler: SchedulerCost) -> list[float]:
    """Seconds of the cycles without the scheduler's, which is charged apart; a tenth of the cycle at least."""
    return [
        max(
            one.seconds - scheduler.seconds(one.num_running, one.num_waiting),
            0.1 * one.seconds,
        )
        for one in cycles
    ]


def _scatter(
    steps: dict[str, float], cycles: Sequence[Cycle], bare_s: Sequence[float]
) -> dict[str, tuple[float, ...]]:
    model = Fitted(steps, name="", digest="", num_layers=1)
    measured_s: defaultdict[str, list[float]] = defaultdict(list)
    fitted_s: defaultdict[str, list[float]] = defaultdict(list)
    for one, seconds in zip(cycles, bare_s, strict=True):
        kind = kind_of(one.features)
        measured_s[kind].append(seconds)
        fitted_s[kind].append(model.seconds(one.features))
    return {kind: scatter_of(found, fitted_s[kind]) for kind, found in measured_s.items()}


def _cold_s(steps: dict[str, float], cold: Sequence[Cycle], scheduler: SchedulerCost) -> float:
    """The mean that cold steps take longer than warm ones would."""
    if not cold:
        return 0.0
    model = Fitted(steps, name="", digest="", num_layers=1)
    pairs = zip(cold, _bare(cold, scheduler), strict=True)
    return max(
        0.0, float(np.mean([seconds - model.seconds(one.features) for one, seconds in pairs]))
    )


def _ways(table: Sequence[tuple[float, ...]], seconds: Sequence[float]) -> list[float]:
    target = np.maximum(np.asarray(seconds, dtype=float), LEAST_S)
    found: list[float] = solve_relative(np.asarray(table, dtype=float), target).tolist()
    return found
