"""How many tokens an answer will have, by a quantile regression forest: lengths learned from a trace, once.

Source: N. Meinshausen, "Quantile Regression Forests", JMLR 7, 2006; the length bound of JITServe is one, fed with the
prompt's text, re-asked every 50 tokens. The forest itself is quantile-forest's (extra `forest`).

Idea: recent answers of all prompts foretell the next one as if it could be anybody's. Where long prompts have short
answers, or the other way round, those of like prompts are nearer. A forest of the answer by log2(prompt tokens + 1) is
asked for all its levels once, when it is grown, for a grid of sizes; what a scheduler asks is read from that grid in a
few microseconds. What a job has written already is conditioned on, among the levels above it:

    quantile(q)   the first value at level passed + q (1 - passed) or higher; the cap when there is none
    sample(u)     the value at level passed + u (1 - passed), linear between levels, up to the longest answer known

with passed = the level that the job's output has reached. No estimate is above the job's max_tokens.

Parameters: see Growth. Who wants it names a trace in the fleet's table `lengths`: trained_on = "yesterday.csv".

What it does not do: it learns nothing while it serves (growing takes a second of a processor or two), and knows of a
request its size alone: no text, tenant or promise. What was written is no input of the forest, as it is in JITServe:
with rows for answers on their way the many rows of long answers spoil the lower quantiles of fresh ones. Another
version of the library may grow another forest from the same rows.
"""

from __future__ import annotations

import math
from bisect import bisect_left, bisect_right
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from penstock.core.errors import BadConfig, missing_extra
from penstock.core.views import JobView

LEVELS = tuple(step / 200 for step in range(1, 200))
PER_OCTAVE = 8  # sizes of prompts in the grid
NEAR = 1e-9

Row = tuple[int, int]  # tokens of a prompt and of its answer


@dataclass(frozen=True, kw_only=True)
class Growth:
    """`leaf_rows`: answers in a leaf of each of the trees, at least."""

    trees: int = 50
    leaf_rows: int = 40
    least_answers: int = 100


class ForestLengths:
    """Implements core.views.Lengths; see the module's text. Nothing in it changes, so replicas may share one."""

    def __init__(self, rows: Sequence[Row], growth: Growth | None = None) -> None:
        growth = growth or Growth()
        if len(rows) < growth.least_answers:
            raise BadConfig(
                f"a forest learns answer lengths from {growth.least_answers} requests or more, got {len(rows)}",
                hint="name a trace in `trained_on` whose requests say how many tokens were answered",
            )
        prompts, answers = np.array(rows, dtype=np.int64).T
        self._longest = int(answers.max())
        sizes = np.log2(prompts + 1)
        lowest, highest = (math.floor(PER_OCTAVE * size) for size in (sizes.min(), sizes.max()))
        grid = np.arange(lowest, highest + 1) / PER_OCTAVE
        self._edges: list[float] = ((grid[1:] + grid[:-1]) / 2).tolist()
        told = _quantiles(sizes, answers, grid, growth)
        self._rows: list[list[int]] = np.ceil(told).astype(np.int64).tolist()

    def quantile(self, job: JobView, q: float) -> int:
        return _capped(self._bound(self._place(job), job.num_output, q), job)

    def quantiles(self, jobs: Sequence[JobView], q: float) -> list[int]:
        """`quantile` of each, looked up once for jobs alike."""
        known: dict[tuple[int, int], int | None] = {}
        found = []
        for job in jobs:
            key = self._place(job), job.num_output
            if key not in known:
                known[key] = self._bound(*key, q)
            found.append(_capped(known[key], job))
        return found

    def sample(self, job: JobView, u: float) -> int:
        row, done = self._rows[self._place(job)], job.num_output
        passed = self._passed(row, done)
        level = passed + u * (1 - passed)
        values, levels = (done, *row, self._longest), (0.0, *LEVELS, 1.0)
        at = min(bisect_right(levels, level), len(LEVELS) + 1)
        part = (level - levels[at - 1]) / (levels[at] - levels[at - 1])
        found = values[at - 1] + part * (values[at] - values[at - 1])
        return _capped(max(done + 1, round(found)), job)

    def _place(self, job: JobView) -> int:
        """The nearest size of prompt in the grid."""
        return bisect_right(self._edges, math.log2(job.num_prompt + 1))

    def _bound(self, place: int, done: int, q: float) -> int | None:
        row = self._rows[place]
        passed = self._passed(row, done)
        at = bisect_left(LEVELS, passed + q * (1 - passed) - NEAR)
        at = max(at, bisect_right(row, done))
        return row[at] if at < len(row) else None

    @staticmethod
    def _passed(row: list[int], done: int) -> float:
        at = bisect_right(row, done)
        return LEVELS[at - 1] if at else 0.0


def _capped(found: int | None, job: JobView) -> int:
    return job.max_tokens if found is None else min(found, job.max_tokens)


def _quantiles(
    sizes: NDArray[np.float64],
    answers: NDArray[np.int64],
    grid: NDArray[np.float64],
    growth: Growth,
) -> NDArray[np.float64]:
    """[size of the grid, level] of a forest grown on these answers."""
    try:
        from quantile_forest import RandomForestQuantileRegressor  # type: ignore[import-untyped]
    except ImportError:
        raise missing_extra("quantile-forest", "forest") from None
    forest = RandomForestQuantileRegressor(
        n_estimators=growth.trees,
        min_samples_leaf=growth.leaf_rows,
        max_samples_leaf=None,
        random_state=0,
    )
    forest.fit(sizes[:, None], answers)
    told: NDArray[np.float64] = forest.predict(grid[:, None], quantiles=list(LEVELS))
    return told
