"""The modelled executor where answers are guessed ahead: how often guesses are right is told, not found out.

A guess of the token at some position is right or not, whatever plan it is made in: chance is drawn once for each job
and position, from a stream of its own, so that two policies that guess differently meet the same luck.
Of the configuration's words (core.drafts) these are for simulations:

    acceptance   chance that the j-th guess of a step is right where the ones before it were; the last entry goes on
    of_tenants   other chances for the requests of some tenants
    proposes     chance that there is anything to guess at a position (n-grams that were seen before)

A step is charged for the guesses that are made, as for any other positions that are computed together, and for those of
the model that makes them: as many plain decode steps of it as the longest guess is long.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from penstock.core.drafts import Speculation
from penstock.core.plans import Decodes, Done, Plan, Sampled, Work
from penstock.core.rng import stream
from penstock.core.types import Caps, PlanId, Request
from penstock.cost.energy import Meter
from penstock.cost.step import StepFeatures, StepModel, features_of
from penstock.sim.executor import ModelledExecutor, SchedulerTime, _Run


class Luck:
    """One answer's: by position, whether there is a guess and how easily it is right."""

    def __init__(self, told: Speculation, request: Request, answer: int, seed: int) -> None:
        self._proposes, self._chances = told.proposes, told.chances(request.tenant)
        self._first = request.prompt.num_tokens
        self._stream = stream(seed, "drafts", request.id, str(answer))
        self._drawn: list[tuple[float, float]] = []

    def guess(self, position: int, most: int) -> tuple[int, int]:
        """(guesses, right ones) for the positions behind `position`, up to `most`."""
        if self._at(position)[0] >= self._proposes:
            return 0, 0
        last = len(self._chances) - 1
        for depth in range(most):
            if self._at(position + 1 + depth)[1] >= self._chances[min(depth, last)]:
                return most, depth
        return most, most

    def _at(self, position: int) -> tuple[float, float]:
        place = position - self._first
        while len(self._drawn) <= place:
            self._drawn.append((self._stream.random(), self._stream.random()))
        return self._drawn[place]


class Drafting(NamedTuple):
    """`model`: the times of the model that guesses; None = guessing takes none."""

    told: Speculation
    model: StepModel | None = None
    seed: int = 0


class DraftingExecutor(ModelledExecutor):
    """See the module's text, and ModelledExecutor."""

    def __init__(
        self,
        model: StepModel,
        drafting: Drafting,
        *,
        caps: Caps,
        scheduler: SchedulerTime | None = None,
        meter: Meter | None = None,
        templates: Mapping[str, StepModel] | None = None,
    ) -> None:
        assert caps.max_lanes == 1, "guesses are for one lane"
        super().__init__(model, caps=caps, scheduler=scheduler, meter=meter, templates=templates)
        self._drafting = drafting
        self._luck: dict[int, Luck] = {}
        self._guessed: dict[int, tuple[int, int]] = {}  # of the plan that runs, by seq

    def launch(self, plan: Plan, repeat: int = 1) -> PlanId:
        for seq, request, answer, _ in plan.opened:
            self._luck[seq] = Luck(self._drafting.told, request, answer, self._drafting.seed)
        self._guessed = {
            one.seq: self._luck[one.seq].guess(one.start, one.tokens - 1)
            for one in _others(plan)
            if one.phase == "verify"
        }
        return super().launch(plan, repeat)

    def close_jobs(self, seqs: Sequence[int]) -> None:
        super().close_jobs(seqs)
        for seq in seqs:
            self._luck.pop(seq, None)

    def _parts(self, plan: Plan) -> Sequence[StepFeatures]:
        if not self._guessed:
            return super()._parts(plan)
        pieces: list[tuple[int, int, int]] = []
        for one in _others(plan):
            assert one.layers is None, "guesses are verified by whole models"
            rows = 1 + self._guessed[one.seq][0] if one.phase == "verify" else None
            pieces.append((one.start, rows or one.tokens, rows or one.samples))
        if isinstance(plan.work, Decodes):
            pieces += [(start, 1, 1) for start in plan.work.starts]
        return (features_of(pieces),)

    def _begin_mixed(self, plan: Plan, at: float, extra_s: float) -> _Run:
        drafting_s = 0.0
        drafter = self._drafting.model
        if drafter is not None and self._guessed:
            starts = [one.start for one in _others(plan) if one.phase == "verify"]
            longest = max([drafted for drafted, _ in self._guessed.values()])
            features = features_of([(start, 1, 1) for start in starts])
            drafting_s = sum(drafter.run_seconds(features, longest, plan.share))
        return super()._begin_mixed(plan, at, extra_s + drafting_s)

    def _finish(self, run: _Run) -> None:
        if not self._guessed:
            super()._finish(run)
            return
        guessed, self._guessed = self._guessed, {}
        plan = run.plan
        run.timer = None
        del self._runs[plan.id], self._busy[plan.lane]
        if self._meter is not None:
            self._measure(self._meter, run, 1)
        outputs = [self._sampled(one, guessed.get(one.seq)) for one in plan.work if one.samples]
        assert self._tell is not None, "nobody listens"
        self._tell(Done(plan.id, 1, tuple(outputs), (run.ends[0],)))

    def _sampled(self, work: Work, guessed: tuple[int, int] | None) -> Sampled:
        """An answer ends at its length, wherever in the guesses that is."""
        stop = self._stops[work.seq]
        if guessed is None:
            return Sampled(work.seq, 1, (), work.start + work.tokens >= stop)
        drafted, right = guessed
        tokens = min(1 + right, max(1, stop - work.start))
        return Sampled(work.seq, tokens, (), work.start + tokens >= stop, drafted=drafted)


def _others(plan: Plan) -> Sequence[Work]:
    return plan.work.others if isinstance(plan.work, Decodes) else plan.work
