"""Step time fitted to measured steps: linear in a few sums, with coefficients that cannot be negative.

    seconds = sum_i coefficient_i * term_i(features)

    step             1: what every step takes
    token            num_tokens (matrix products, once rows outweigh weights)
    token_past_8     max(0, num_tokens - 8), and past 64: the slope grows where products turn from reading weights
    token_past_64    to arithmetic
    decode_to_4      num_decodes by pieces: the first 4, the next 12, the rest. A kernel's tiles, and a gateway and
    decode_to_16     clients that want the engine's cores, bend the line either way
    decode_past_16
    decode_context   positions read by decodes
    prefill          num_prefills: what a chunk costs besides its tokens
    prefill_pairs    (query, key) pairs of prefill chunks
    prefill_context  positions read by prefill chunks
    sample           num_samples: the LM head and the sampler

Non-negative coefficients keep every prediction positive and rising with the work, whatever noise was in the steps. Each
step is weighed by 1/predicted seconds (a few rounds of it), so the fit minimises the relative error and still charges
the mean: weights of 1/measured would favour the fast ones of equal steps. Fits speak for the machine, model and engine
they were made on, and within the ranges they saw.

A lane's share enters as in the roofline: arithmetic slows by 1/x; whether a term is arithmetic or memory traffic is
not known here, so all but the constant slow by 1/x. That is pessimistic for decodes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np

from penstock.cost.shapes import ModelShape
from penstock.cost.step import StepCost, StepFeatures, line_of_steps
from penstock.cost.work import work_of

if TYPE_CHECKING:
    from numpy import float64
    from numpy.typing import NDArray

TERMS: dict[str, Callable[[StepFeatures], float]] = {
    "step": lambda f: 1.0,
    "token": lambda f: f.num_tokens,
    "token_past_8": lambda f: max(0, f.num_tokens - 8),
    "token_past_64": lambda f: max(0, f.num_tokens - 64),
    "decode_to_4": lambda f: min(4, f.num_decodes),
    "decode_to_16": lambda f: min(12, max(0, f.num_decodes - 4)),
    "decode_past_16": lambda f: max(0, f.num_decodes - 16),
    "decode_context": lambda f: f.decode_context,
    "prefill": lambda f: f.num_prefills,
    "prefill_pairs": lambda f: f.prefill_pairs,
    "prefill_context": lambda f: f.prefill_context,
    "sample": lambda f: f.num_samples,
}
ROUNDS = 6  # of weighing anew; the weights move less than a percent after three
GROWING = "decode_context"  # the only term that changes within a run of decode steps


class Fitted:
    """Prices steps by coefficients, missing ones being 0.

    A fit sees times only: without `watts` energy is not known, without `shape` neither are bytes and flops.
    """

    def __init__(
        self,
        coefficients: Mapping[str, float],
        *,
        name: str,
        digest: str,
        num_layers: int,
        watts: float | None = None,
        shape: ModelShape | None = None,
    ) -> None:
        unknown = set(coefficients) - set(TERMS)
        assert not unknown, f"unknown terms {sorted(unknown)}"
        self.name, self.digest, self.watts, self.shape = name, digest, watts, shape
        self._num_layers = num_layers
        self._growth = coefficients.get(GROWING, 0.0)
        self._step = coefficients.get("step", 0.0)
        skipped = (GROWING, "step")
        self._rest = [
            (TERMS[key], value) for key, value in coefficients.items() if key not in skipped
        ]

    def seconds(self, features: StepFeatures, share: float = 1.0) -> float:
        fixed, growth = self._line(features, share)
        return fixed + growth * features.decode_context

    def run_seconds(self, features: StepFeatures, count: int, share: float = 1.0) -> list[float]:
        return line_of_steps(features, count, *self._line(features, share))

    def step(self, features: StepFeatures, share: float = 1.0) -> StepCost:
        time_s = self.seconds(features, share)
        energy_j = None if self.watts is None else self.watts * time_s
        parts = (("fitted", time_s),)
        if self.shape is None:
            return StepCost(time_s, energy_j, None, None, parts)
        return StepCost(time_s, energy_j, *work_of(self.shape, features), parts)

    def _line(self, features: StepFeatures, share: float) -> tuple[float, float]:
        part = 1.0 if features.layers is None else features.layers / self._num_layers
        scale = part / share
        rest = math.fsum(value * term(features) for term, value in self._rest)
        return self._step * part + scale * rest, scale * self._growth


@dataclass(frozen=True, slots=True)
class Fit:
    """`mape`: mean of |predicted - measured| / measured over the steps of the fit; `left_out`: the same over steps
    predicted by fits that had not seen their fold."""

    coefficients: dict[str, float]
    num_steps: int
    mape: float
    left_out: float
    worst: float


def fit_steps(
    features: Sequence[StepFeatures],
    seconds: Sequence[float],
    *,
    terms: Sequence[str] = tuple(TERMS),
    folds: int = 5,
) -> Fit:
    """Fit the terms to measured steps. Needs at least twice as many steps as terms."""
    table = np.array([[TERMS[name](one) for name in terms] for one in features], dtype=float)
    times = np.asarray(seconds, dtype=float)
    if len(times) < 2 * len(terms) or not (times > 0).all():
        raise ValueError(
            f"a fit needs {2 * len(terms)} steps of positive duration, got {len(times)}"
        )
    solution = solve_relative(table, times)
    left_out = np.empty(len(times))
    for fold in range(folds):
        is_out = np.arange(len(times)) % folds == fold
        seen = solve_relative(table[~is_out], times[~is_out])
        left_out[is_out] = np.abs(table[is_out] @ seen / times[is_out] - 1)
    errors = np.abs(table @ solution / times - 1)
    named = dict(zip(terms, solution.tolist(), strict=True))
    return Fit(
        named, len(times), float(errors.mean()), float(left_out.mean()), float(left_out.max())
    )


def solve_relative(matrix: NDArray[float64], target: NDArray[float64]) -> NDArray[float64]:
    """The x >= 0 whose predictions miss positive targets least, as shares of the predictions."""
    weights = 1.0 / target
    for _ in range(ROUNDS):
        x = solve_nonnegative(matrix * weights[:, None], target * weights)
        predicted = matrix @ x
        weights = 1.0 / np.maximum(predicted, 1e-3 * target.mean())
    return x


def solve_nonnegative(matrix: NDArray[float64], target: NDArray[float64]) -> NDArray[float64]:
    """argmin |matrix x - target| over x >= 0, by Lawson and Hanson's active set on columns scaled to unit length."""
    norms = np.linalg.norm(matrix, axis=0)
    scale = np.where(norms > 0, norms, 1.0)
    scaled = matrix / scale
    num = matrix.shape[1]
    x, is_in = np.zeros(num), np.zeros(num, dtype=bool)
    for _ in range(10 * num):
        gradient = scaled.T @ (target - scaled @ x)
        gradient[is_in | (norms == 0)] = -np.inf
        best = int(np.argmax(gradient))
        if not gradient[best] > 1e-10 * np.linalg.norm(target):
            break
        is_in[best] = True
        x = _retreat(scaled, target, x, is_in)
    return x / scale


def _retreat(
    matrix: NDArray[float64],
    target: NDArray[float64],
    x: NDArray[float64],
    is_in: NDArray[np.bool_],
) -> NDArray[float64]:
    """Solve on the active columns, walking back and dropping columns while any coefficient is not positive."""
    while True:
        trial = np.zeros_like(x)
        trial[is_in] = np.linalg.lstsq(matrix[:, is_in], target, rcond=None)[0]
        bad = is_in & (trial <= 0)
        if not bad.any():
            return trial
        step = np.min(x[bad] / np.maximum(x[bad] - trial[bad], 1e-300))
        x = x + step * (trial - x)
        is_in &= x > 1e-12
        x[~is_in] = 0.0
        if not is_in.any():
            return x
