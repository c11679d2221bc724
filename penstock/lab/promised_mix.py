"""The mix of JITServe's experiment: streams, answers with a deadline and agent runs, and what is known of them before.

Lengths are drawn from one half of a trace; predictors may have seen the other half.
"""

from __future__ import annotations

import csv
import functools
import itertools
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from math import exp
from pathlib import Path
from statistics import NormalDist

from penstock.core.arrivals import arrival_of
from penstock.core.events import Finished
from penstock.core.prompt import TracedPrompt
from penstock.core.rng import stream
from penstock.core.types import ProgramId, Request, RequestId, Sampling, Slo
from penstock.core.views import JobView
from penstock.cost.lengths import RecentLengths
from penstock.cost.programs import SeenPrograms
from penstock.engine.turn import Predictors
from penstock.lab.promised import Change, Offer, true_length
from penstock.traffic import Workflow
from penstock.traffic.arrivals import Gamma
from penstock.traffic.workflow import Call

MOST_TOKENS = 2048  # of an answer
STREAM, ANSWER, CALL = Slo(ttft_s=2.0, tpot_s=0.1), Slo(deadline_s=20.0), Slo(deadline_s=13.3)
STREAMS, ANSWERS = 0.5, 0.8  # a draw below the first is a stream, below the second an answer
CALLS, WAIT_S = (3, 6), 0.5
BURSTS = 2**0.5  # coefficient of variation of a gamma process of shape 0.5
TAUGHT, TAUGHT_RUNS = 1000, 100  # answers and runs of the trace's other half that predictors know
PACE_S = 0.025  # a token, in the runs they know
GUESS = 0.3  # standard deviation of the logarithm of a guess


@functools.cache
def pool_of(trace: Path | None) -> tuple[tuple[int, int], ...]:
    """(prompt, answer) tokens; without the trace, draws with its means."""
    if trace is None:
        chance = stream(0, "experiments", "jitserve", "lengths")
        draws = [
            (chance.lognormvariate(4.9, 1.3), chance.lognormvariate(5.3, 1.0))
            for _ in range(20_000)
        ]
        pairs = [(round(prompt), round(output)) for prompt, output in draws]
    else:
        with trace.open(encoding="utf-8", newline="") as file:
            pairs = [(int(prompt), int(output)) for _, prompt, output in list(csv.reader(file))[1:]]
    return tuple(
        (prompt, min(output, MOST_TOKENS))
        for prompt, output in pairs
        if prompt >= 4 and output >= 4 and prompt + output <= 4096
    )


def pairs_of(trace: Path | None, seed: int, *, is_past: bool) -> Iterator[tuple[int, int]]:
    """Draws from one half of the pool for ever: predictors have seen the other one."""
    pool = pool_of(trace)
    half = len(pool) // 2
    some = pool[:half] if is_past else pool[half:]
    chance = stream(seed, "experiments", "jitserve", "past" if is_past else "offered")
    while True:
        yield some[chance.randrange(len(some))]


def offers_of(trace: Path | None, seed: int, rate_per_s: float, window_s: float) -> list[Offer]:
    """What arrives within the window."""
    pairs = pairs_of(trace, seed, is_past=False)
    chance = stream(seed, "experiments", "jitserve", "classes")
    found: list[Offer] = []
    for place, at in enumerate(Gamma(rate_per_s=rate_per_s, cv=BURSTS).instants(seed)):
        if at > window_s:
            return found
        drawn = chance.random()
        if drawn < ANSWERS:
            slo = STREAM if drawn < STREAMS else ANSWER
            found.append((at, request_of(f"r{place}", next(pairs), slo)))
        else:
            found.append((at, run_of(ProgramId(f"p{place}"), chance.randint(*CALLS), pairs)))
    raise AssertionError("arrivals never end")


def request_of(name: str, pair: tuple[int, int], slo: Slo, run: ProgramId | None = None) -> Request:
    prompt, output = pair
    return Request(
        id=RequestId(name),
        model="default",
        prompt=TracedPrompt(prompt),
        sampling=Sampling(max_tokens=MOST_TOKENS),
        slo=slo,
        program=run,
        true_output=output,
    )


def run_of(name: ProgramId, num: int, pairs: Iterator[tuple[int, int]]) -> Workflow:
    calls = [
        Call(
            request=request_of(f"{name}.{place}", next(pairs), CALL, name),
            after=(place - 1,) if place else (),
            wait_s=WAIT_S if place else 0.0,
        )
        for place in range(num)
    ]
    return Workflow(id=name, kind="program", calls=tuple(calls))


# ---------------------------------------------------------------------------- what is known beforehand


def taught(trace: Path | None, seed: int) -> tuple[RecentLengths, SeenPrograms]:
    """Predictors that know answers and runs of the other half of the trace."""
    pairs = pairs_of(trace, seed, is_past=True)
    chance = stream(seed, "experiments", "jitserve", "runs")
    lengths, programs = RecentLengths(), SeenPrograms()
    for _, output in itertools.islice(pairs, TAUGHT):
        lengths.add(output)
    for place in range(TAUGHT_RUNS):
        at = 1e3 * (place - TAUGHT_RUNS - 1)
        for call in run_of(ProgramId(f"past{place}"), chance.randint(*CALLS), pairs).calls:
            _teach(programs, call.request, at)
            at += PACE_S * (call.request.true_output or 0) + WAIT_S
    return lengths, programs


def _teach(programs: SeenPrograms, request: Request, at: float) -> None:
    output = request.true_output or 0
    programs.observe(arrival_of(request, at=at, who="past", seq=0, hashes=()))
    end_at = at + PACE_S * output
    programs.observe(
        Finished(
            at=end_at,
            who="past",
            request=request.id,
            answer=0,
            reason="stop",
            arrived_at=at,
            admitted_at=at,
            first_token_at=at,
            last_token_at=end_at,
            num_prompt=request.prompt.num_tokens,
            num_cached=0,
            num_output=output,
            num_preemptions=0,
            tenant=request.tenant,
            priority=0,
            slo=request.slo,
        )  # fmt: skip
    )


@dataclass
class Knowing:
    """Lengths that know, but for a lognormal error of `sigma`; implements core.views.Lengths."""

    sigma: float
    seed: int
    _errors: dict[str, float] = field(default_factory=dict)

    def quantile(self, job: JobView, q: float) -> int:
        true = true_length(job)
        if not self.sigma:
            return true
        error = self._errors.get(job.request.id)
        if error is None:
            chance = stream(self.seed, "experiments", "jitserve", "guess", job.request.id)
            error = self._errors[job.request.id] = chance.gauss(0.0, self.sigma)
        guess = true * exp(error + self.sigma * NormalDist().inv_cdf(q))
        return min(job.max_tokens, max(job.num_output + 1, round(guess)))

    def quantiles(self, jobs: Sequence[JobView], q: float) -> list[int]:
        return [self.quantile(job, q) for job in jobs]

    def sample(self, job: JobView, u: float) -> int:
        return self.quantile(job, u)


def change_of(variant: str, trace: Path | None, seed: int) -> Change:
    """The predictors of a variant in the place of fresh ones."""
    lengths, programs = taught(trace, seed)

    def change(found: Predictors) -> Predictors:
        if variant.endswith(("true", "guess")):
            sigma = GUESS if variant.endswith("guess") else 0.0
            return replace(found, lengths=Knowing(sigma, seed), programs=programs)
        return replace(found, lengths=lengths, programs=programs)

    return change
