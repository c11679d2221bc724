"""What the two phases of a request take, in eight numbers: for policies that compare many machines for each request.

    prefill_s(new | cached) = A + B * new + C * ((cached + new)^2 - cached^2)
    decode_s(jobs, tokens)  = a + b * tokens + c * jobs

The form is that of DistServe's simulator and of Llumnix v2. `phases_of` fits both to any step model by least squares on
the relative error, over the sizes that one step of it may have; asking takes well under a microsecond then, where the
model itself would take ten.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from penstock.cost.step import StepModel, features_of

NEW = (64, 256, 1024, 2048, 4096, 8192, 16384)
CACHED = (0, 2048, 16384)
JOBS = (1, 8, 32, 128)
CONTEXTS = (256, 1024, 4096)
ROUNDS = 20


@dataclass(frozen=True, slots=True, kw_only=True)
class Phases:
    """A core.views.PhaseCost. Coefficients in seconds, in the order of the module's text."""

    prefill: tuple[float, float, float]
    decode: tuple[float, float, float]

    def prefill_s(self, new: int, cached: int = 0) -> float:
        fixed, each, pair = self.prefill
        return fixed + each * new + pair * new * (new + 2 * cached)

    def decode_s(self, num_jobs: int, tokens: int) -> float:
        fixed, context, each = self.decode
        return fixed + context * tokens + each * num_jobs


def phases_of(model: StepModel) -> Phases:
    """The two lines that come nearest to a step model."""
    prefill, decode = [], []
    for cached in CACHED:
        for new in NEW:
            seconds = model.seconds(features_of([(cached, new, True)]))
            prefill.append((1.0, new, new * (new + 2 * cached), seconds))
    for jobs in JOBS:
        for context in CONTEXTS:
            seconds = model.seconds(features_of([(context - 1, 1, True)] * jobs))
            decode.append((1.0, jobs * context, jobs, seconds))
    return Phases(prefill=_fit(prefill), decode=_fit(decode))


def _fit(rows: Sequence[tuple[float, float, float, float]]) -> tuple[float, float, float]:
    """Non-negative least squares on the relative error; a term that would be negative is left out."""
    table = np.array(rows, dtype=np.float64)
    terms, seconds = table[:, :3], np.maximum(table[:, 3], 1e-12)
    weighed = terms / seconds[:, None]
    kept = [0, 1, 2]
    while kept:
        found = np.linalg.lstsq(weighed[:, kept], np.ones(len(rows)), rcond=None)[0]
        if (found >= 0).all():
            solution = np.zeros(3)
            solution[kept] = found
            return float(solution[0]), float(solution[1]), float(solution[2])
        kept.pop(int(np.argmin(found * weighed[:, kept].max(axis=0))))
    return 0.0, 0.0, 0.0
